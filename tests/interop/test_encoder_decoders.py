"""Encoder–decoders of other libraries give the logits and tokens that those libraries give
(make_encoder_decoder_goldens.py).
"""

import functools
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxlm
from jaxlm.caches.crossed import CrossedCache
from jaxlm.interop.families import find
from jaxlm.interop.fields import read_fields
from jaxlm.interop.hub_config import HubConfig
from tests.interop.folders import ENCODER_DECODERS, read_golden, write_folder
from tests.marks import slow_but


@pytest.fixture(params=ENCODER_DECODERS, scope="module")
def golden(request, tmp_path_factory):
    file, config, shapes = read_golden(request.param)
    folder = write_folder(tmp_path_factory.mktemp("golden") / "hub", config, shapes)
    return file, jaxlm.load(folder)


def close(got, want):
    """float32 sums in another order, over three layers whose scores T5 does not scale down: 1e-4 of
    the largest number, as in the other families.
    """
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())


def given(file):
    return (file[n].astype(np.int32) for n in ("tokens", "mask", "targets"))


@functools.partial(jax.jit, static_argnums=0)
def encode(model, params, tokens, mask):
    return model.apply({"params": params}, tokens, mask, method="encode")


@functools.partial(jax.jit, static_argnums=0)
def whole(model, params, tokens, targets, mask):
    return model.apply({"params": params}, tokens, targets, mask)


def test_hidden_states_and_logits(golden):
    file, (model, params, _) = golden
    tokens, mask, targets = given(file)
    hidden = encode(model, params, tokens, mask)
    real = file["mask"] != 0
    close(np.asarray(hidden)[real], file["hidden"][real])
    close(whole(model, params, tokens, targets, mask), file["logits"])


def test_cached(golden):
    """The source's keys and values are made once; what they were made of is then not needed."""
    file, (model, params, _) = golden
    tokens, mask, targets = given(file)
    hidden = encode(model, params, tokens, mask)
    cache = jax.jit(lambda: CrossedCache.init(model.config.decoder, *targets.shape))()
    step = jax.jit(
        lambda part, hidden, mask, cache: model.apply(
            {"params": params}, part, hidden, mask, cache, method="decode"
        )
    )
    got = []
    for start, stop in [(0, 4), *((i, i + 1) for i in range(4, targets.shape[1]))]:
        y, cache = step(targets[:, start:stop], hidden, mask, cache)
        got.append(y)
        hidden = None
    close(np.concatenate(got, 1), file["logits"])


@pytest.mark.parametrize("golden", slow_but(["t5"], ENCODER_DECODERS), indirect=True)
def test_greedy_tokens(golden):
    """Texts in and out; the golden's rows are padded on the right, `generate` pads on the left."""
    file, (model, params, tokenizer) = golden
    rows = [
        row[there != 0].tolist() for row, there in zip(file["tokens"], file["mask"], strict=True)
    ]
    assert all(row[-1] == tokenizer.eos_id for row in rows)
    texts = [tokenizer.decode(row[:-1]) for row in rows]
    got = jaxlm.generate(model, params, tokenizer, texts, max_new_tokens=file["greedy"].shape[1])
    for text, want in zip(got, file["greedy"].tolist(), strict=True):
        end = want.index(tokenizer.eos_id) if tokenizer.eos_id in want else len(want)
        assert text == tokenizer.decode(want[:end])
    pieces = jaxlm.stream(model, params, tokenizer, texts[0], max_new_tokens=32)
    assert "".join(pieces) == got[0]


@pytest.mark.parametrize("case", ENCODER_DECODERS)
def test_every_key_of_a_config_is_understood(case):
    _, values, _ = read_golden(case)
    config, family = (
        HubConfig(values | {"some_new_key": 1}, case),
        find(values["architectures"][0], case),
    )
    read_fields(family.fields, config, family.config)
    assert config.unread == {"some_new_key"}


def test_a_head_of_its_own_is_known_by_its_matrix(tmp_path):
    """Transformers 5 says of every T5 that its head is tied, and goes by what the file holds."""
    _, config, shapes = read_golden("mt5")
    one = write_folder(tmp_path / "said", config, shapes)
    other = write_folder(tmp_path / "unsaid", config | {"tie_word_embeddings": True}, shapes)
    (model, params, _), (again, same, _) = jaxlm.load(one), jaxlm.load(other)
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, same, params)


def test_what_old_files_hold_beside(tmp_path):
    """Copies of the embedding, and a bias that was never used."""
    _, config, shapes = read_golden("t5")
    folder = write_folder(tmp_path / "hub", config, shapes)
    model, want, _ = jaxlm.load(folder)
    tensors = load_file(folder / "model.safetensors")
    copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    tensors |= dict.fromkeys(copies, tensors["shared.weight"])
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    save_file(tensors | {unused: np.zeros((8, 5), np.float32)}, folder / "model.safetensors")
    old = {"tie_word_embeddings": None, "scale_decoder_outputs": None, "n_positions": 512}
    (folder / "config.json").write_text(json.dumps(config | old))
    again, got, _ = jaxlm.load(folder)
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, got, want)
