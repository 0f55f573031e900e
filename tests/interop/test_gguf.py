"""A GGUF file of the same weights gives the same logits, and its tokenizer the same ids."""

import gguf
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from tests.interop.folders import read_golden
from tests.interop.weights import draw

# Two merges over the byte alphabet: "ab", "abc", and a control token.
TOKENS = ["<|end|>", *(chr(c) for c in range(33, 127)), "ab", "abc"]


def interleave(x, heads):
    """llama.cpp's order of a head's rows: dims i and i + R of a head become 2i and 2i + 1."""
    return x.reshape(heads, 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def write_gguf(path, config, shapes, kind=gguf.GGMLQuantizationType.F32):
    w = gguf.GGUFWriter(path, "llama")
    w.add_block_count(config["num_hidden_layers"])
    w.add_context_length(config["max_position_embeddings"])
    w.add_embedding_length(config["hidden_size"])
    w.add_feed_forward_length(config["intermediate_size"])
    w.add_head_count(config["num_attention_heads"])
    w.add_head_count_kv(config["num_key_value_heads"])
    w.add_key_length(config["head_dim"])
    w.add_layer_norm_rms_eps(config["rms_norm_eps"])
    w.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list(TOKENS)
    w.add_token_types([3] + [1] * (len(TOKENS) - 1))
    w.add_token_merges(["a b", "ab c"])
    w.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, shape in shapes.items():
        x = draw(name, shape)
        if ".q_proj." in name or ".k_proj." in name:
            kv = ".k_proj." in name
            x = interleave(x, config["num_key_value_heads" if kv else "num_attention_heads"])
        short = names.get_name(name, try_suffixes=(".weight",))
        stored = kind if x.ndim == 2 else gguf.GGMLQuantizationType.F32
        w.add_tensor(short, gguf.quantize(x, stored), raw_dtype=stored)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


@pytest.fixture
def golden():
    return read_golden("llama")


def test_logits(golden, tmp_path):
    file, config, shapes = golden
    model, params, _ = jaxlm.load(write_gguf(tmp_path / "m.gguf", config, shapes))
    logits, _ = model.apply({"params": params}, jnp.asarray(file["tokens"], jnp.int32))
    # float32 sums in another order, over three layers.
    np.testing.assert_allclose(logits, file["logits"], atol=1e-4 * np.abs(file["logits"]).max())


def test_tokenizer(golden, tmp_path):
    _, config, shapes = golden
    _, _, tokenizer = jaxlm.load(write_gguf(tmp_path / "m.gguf", config, shapes))
    ids = tokenizer.encode("abcab<|end|>")
    assert [TOKENS[i] for i in ids] == ["abc", "ab", *"<|end|>"]
    assert tokenizer.decode(ids) == "abcab<|end|>"
    assert (tokenizer.eos_id, tokenizer.bos_id) == (0, None)
    tokenizer.save(tmp_path / "saved")
    again = jaxlm.load_tokenizer(str(tmp_path / "saved"))
    assert again.fingerprint == tokenizer.fingerprint
