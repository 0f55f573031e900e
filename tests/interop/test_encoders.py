"""Encoders of other libraries give the hidden states and logits that those libraries give, and are
written as they were read (make_encoder_goldens.py).
"""

import functools
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxlm
from jaxlm.interop.families import find
from jaxlm.interop.fields import read_fields
from jaxlm.interop.hub_config import HubConfig
from tests.interop.folders import ENCODERS, read_golden, write_folder

OLD = {"weight": "gamma", "bias": "beta"}


@pytest.fixture(params=ENCODERS, scope="module")
def golden(request, tmp_path_factory):
    file, config, shapes = read_golden(request.param)
    folder = write_folder(tmp_path_factory.mktemp("golden") / "hub", config, shapes)
    return file, jaxlm.load(folder), folder


def given(file):
    """Tokens, positions, segment ids and token types."""
    tokens, mask, types = (file[n].astype(np.int32) for n in ("tokens", "mask", "types"))
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32)[None], tokens.shape)
    return (tokens, positions, mask), {"token_types": types}


@functools.partial(jax.jit, static_argnums=0)
def hidden_states(model, params, arrays, types):
    return model.apply({"params": params}, *arrays, method="hidden", **types)[0]


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params, arrays, types):
    return model.apply({"params": params}, *arrays, **types)[0]


def test_hidden_states_and_logits(golden):
    file, (model, params, _), _ = golden
    arrays, types = given(file)
    got, want = {"hidden": hidden_states(model, params, arrays, types)}, {"hidden": file["hidden"]}
    if "logits" in file:
        got["logits"] = logits(model, params, arrays, types)
        want["logits"] = file["logits"]
    real = file["mask"] != 0
    for name, x in want.items():
        # float32 sums in another order, over three layers: 1e-5 of the largest number.
        close = {"rtol": 0, "atol": 1e-5 * np.abs(x).max()}
        np.testing.assert_allclose(np.asarray(got[name])[real], x[real], **close)


@pytest.mark.parametrize("case", ENCODERS)
def test_every_key_of_a_config_is_understood(case):
    _, values, _ = read_golden(case)
    config = HubConfig(values | {"some_new_key": 1}, case)
    read_fields(find(values["architectures"][0], case).fields, config)
    assert config.unread == {"some_new_key"}


def test_generating_is_refused(golden):
    _, (model, params, tokenizer), _ = golden
    with pytest.raises(ValueError, match=r"layer_pattern=.*; allowed: no bidirectional layer"):
        jaxlm.generate(model, params, tokenizer, ["t1 t2"], max_new_tokens=4)


def test_what_old_files_hold_beside(tmp_path):
    """As google-bert/bert-base-uncased is stored: first names of norms, another head, copies."""
    _, config, shapes = read_golden("bert_masked_lm")
    folder = write_folder(tmp_path / "hub", config, shapes)
    _, want, _ = jaxlm.load(folder)
    tensors = load_file(folder / "model.safetensors")
    old = {re.sub(r"(?<=LayerNorm\.)\w+$", lambda m: OLD[m[0]], n): x for n, x in tensors.items()}
    beside = ("bert.pooler.dense.weight", "bert.pooler.dense.bias", "cls.seq_relationship.weight")
    old |= dict.fromkeys(beside, np.zeros(2, np.float32))
    old["bert.embeddings.position_ids"] = np.arange(34)[None]
    old["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"]
    save_file(old, folder / "model.safetensors")
    _, got, _ = jaxlm.load(folder)
    assert str(got) == str(want)


def test_padding_and_neighbours_change_nothing(golden):
    """A row alone, without its padding, has the hidden states that it has in the batch."""
    file, (model, params, _), _ = golden
    arrays, types = given(file)
    whole = np.asarray(hidden_states(model, params, arrays, types))
    length = int(file["mask"][1].sum())
    (tokens, positions, mask), types = given(file)
    row = [x[1:, :length] for x in (tokens, positions, mask)]
    types = {"token_types": types["token_types"][1:, :length]}
    alone = np.asarray(hidden_states(model, params, row, types))
    # Sums over other shapes run in another order.
    np.testing.assert_allclose(alone[0], whole[1, :length], rtol=0, atol=1e-5)
