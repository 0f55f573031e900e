"""Checkpoints of other libraries give the logits that those libraries give (make_goldens.py)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm.interop.families import FAMILIES, find
from jaxlm.interop.fields import read_fields
from jaxlm.interop.hub_config import HubConfig
from tests.interop.folders import ALL, GOLDENS, read_golden, write_folder
from tests.marks import slow_but


@pytest.fixture(params=GOLDENS, scope="module")
def golden(request, tmp_path_factory):
    file, config, shapes = read_golden(request.param)
    folder = write_folder(tmp_path_factory.mktemp("golden") / "hub", config, shapes, parts=2)
    return file, jaxlm.load(folder)


@pytest.mark.parametrize("case", GOLDENS)
def test_every_key_of_a_config_is_understood(case):
    _, values, _ = read_golden(case)
    config = HubConfig(values | {"some_new_key": 1, "null": None}, case)
    read_fields(find(values["architectures"][0], case).fields, config)
    assert config.unread == {"some_new_key"}


# One of each kind of layer that a cache could spoil; the others under the mark: two seconds each.
CACHED_IN_EVERY_RUN = ("bloom", "gemma3", "gpt_oss", "phi3")


@pytest.mark.parametrize("golden", slow_but(CACHED_IN_EVERY_RUN, GOLDENS), indirect=True)
def test_cached_logits(golden):
    """A prompt of 30 tokens, then one at a time."""
    file, (model, params, _) = golden
    tokens = file["tokens"].astype(np.int32)
    cache = jax.jit(lambda: jaxlm.DenseCache.init(model.config, *tokens.shape))()
    step = jax.jit(lambda cache, part: model.apply({"params": params}, part, cache=cache))
    parts = [tokens[:, :30], *(tokens[:, i : i + 1] for i in range(30, 40))]
    got = []
    for part in parts:
        y, cache = step(cache, part)
        got.append(y)
    # float32 sums in another order, over three layers: 1e-4 of the largest logit.
    close = {"rtol": 0, "atol": 1e-4 * np.abs(file["logits"]).max()}
    np.testing.assert_allclose(np.concatenate(got, 1), file["logits"], **close)


def test_logits_padding_and_greedy_tokens(golden):
    """Three rows of one program: whole; behind padding, positions counted from the first real
    token; and a text of which each token was the greedy one after those before it.
    """
    file, (model, params, _) = golden
    tokens, want, prompt = file["tokens"], file["greedy"], 8
    length = tokens.shape[1]
    padding = length - file["padded"].shape[1]
    rows = np.zeros((3, len(want)), np.int32)
    rows[:2, :length], rows[2] = tokens, want
    at = np.arange(len(want))[None] - np.array([[0], [padding], [0]])
    real = (at >= 0) & (np.arange(len(want))[None] < np.array([[length], [length], [len(want)]]))
    given = (np.where(real, x, 0).astype(np.int32) for x in (rows, at, 1))
    logits = np.asarray(jax.jit(model.apply)({"params": params}, *given)[0])
    # As above.
    close = {"rtol": 0, "atol": 1e-4 * np.abs(file["logits"]).max()}
    np.testing.assert_allclose(logits[0, :length], file["logits"][0], **close)
    np.testing.assert_allclose(logits[1:2, padding:length], file["padded"], **close)
    if "longrope" not in str(model.config.encoding):  # see the next test
        np.testing.assert_array_equal(logits[2, prompt - 1 : -1].argmax(-1), want[prompt:])


@pytest.mark.parametrize("golden", ["phi3"], indirect=True)
def test_greedy_tokens_where_rotations_depend_on_the_length_so_far(golden):
    """Token by token, each after a full forward of those before it."""
    file, (model, params, _) = golden
    want, prompt = file["greedy"], 8

    @jax.jit
    def step(tokens, length):
        there = (jnp.arange(len(want)) < length).astype(jnp.int32)[None]
        logits, _ = model.apply({"params": params}, tokens, segment_ids=there)
        return tokens.at[0, length].set(logits[0, length - 1].argmax())

    tokens = np.zeros((1, len(want)), np.int32)
    tokens[0, :prompt] = want[:prompt]
    for length in range(prompt, len(want)):
        tokens = step(tokens, length)
    np.testing.assert_array_equal(tokens[0], want)


def test_every_family_has_a_golden():
    tested = {read_golden(case)[1]["architectures"][0] for case in ALL}
    assert tested == {a for family in FAMILIES for a in family.architectures}
