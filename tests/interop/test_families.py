"""Checkpoints of other libraries give the logits that those libraries give (make_goldens.py)."""

import json
import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save_file

import jaxlm
from jaxlm.interop.families import FAMILIES
from tests.interop.weights import draw

GOLDENS = {p.stem: p for p in sorted((Path(__file__).parent / "goldens").glob("*.npz"))}


def write_folder(folder, config, shapes, parts=1):
    """A folder as on the hub, the tensors in `parts` files."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    vocabulary = {f"t{i}": i for i in range(config["vocab_size"] - 1)} | {"</s>": 96}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="t0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    names, index = sorted(shapes), {}
    for i in range(parts):
        file = "model.safetensors" if parts == 1 else f"model-{i + 1:05}-of-{parts:05}.safetensors"
        mine = {n: draw(n, shapes[n]) for n in names[i::parts]}
        save_file(mine, folder / file)
        index |= dict.fromkeys(mine, file)
    if parts > 1:
        text = json.dumps({"metadata": {}, "weight_map": index})
        (folder / "model.safetensors.index.json").write_text(text)
    return folder


@pytest.fixture(params=GOLDENS)
def golden(request, tmp_path, caplog):
    file = np.load(GOLDENS[request.param])
    config, shapes = json.loads(str(file["config"])), json.loads(str(file["shapes"]))
    folder = write_folder(tmp_path / "hub", config, shapes, parts=2)
    with caplog.at_level(logging.WARNING):
        loaded = jaxlm.load(folder)
    assert not caplog.records  # every key of the config is understood
    return file, loaded


def test_logits_prefill_and_cached(golden):
    file, (model, params, _) = golden
    tokens = jnp.asarray(file["tokens"], jnp.int32)
    logits, _ = model.apply({"params": params}, tokens)
    # float32 sums in another order, over three layers: 1e-4 of the largest logit.
    close = {"rtol": 0, "atol": 1e-4 * np.abs(file["logits"]).max()}
    np.testing.assert_allclose(logits, file["logits"], **close)
    cache = jaxlm.DenseCache.init(model.config, *tokens.shape)
    step = jax.jit(lambda cache, part: model.apply({"params": params}, part, cache=cache))
    parts = [tokens[:, :30], *(tokens[:, i : i + 1] for i in range(30, 40))]
    got = []
    for part in parts:
        y, cache = step(cache, part)
        got.append(y)
    np.testing.assert_allclose(jnp.concatenate(got, 1), file["logits"], **close)


def test_greedy_tokens(golden):
    """Each token of transformers' text is the most probable after those before it."""
    file, (model, params, _) = golden
    logits, _ = model.apply({"params": params}, jnp.asarray(file["greedy"], jnp.int32)[None])
    np.testing.assert_array_equal(logits[0, 7:-1].argmax(-1), file["greedy"][8:])


def test_every_family_has_a_golden():
    tested = {json.loads(str(np.load(p)["config"]))["architectures"][0] for p in GOLDENS.values()}
    assert tested == {a for family in FAMILIES for a in family.architectures}
