"""A GGUF file of the same weights gives the same logits, and its tokenizer the same ids."""

import struct

import gguf
import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from hypothesis import strategies as st

import jaxlm
from jaxlm.load import open_foreign
from tests.interop.folders import read_golden
from tests.interop.weights import draw

# Two merges over the byte alphabet: "ab", "abc", and a control token.
TOKENS = ["<|end|>", *(chr(c) for c in range(33, 127)), "ab", "abc"]


def interleave(x, heads):
    """llama.cpp's order of a head's rows: dims i and i + R of a head become 2i and 2i + 1."""
    return x.reshape(heads, 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def as_stored(x, kind):
    """Its blocks; of kinds that the package only unpacks, blocks of small numbers drawn anew."""
    try:
        return gguf.quantize(x, kind)
    except NotImplementedError:
        rows, size = x.shape[0], x.shape[1] // gguf.GGML_QUANT_SIZES[kind][0]
        width = gguf.GGML_QUANT_SIZES[kind][1]
        return np.random.default_rng(x.size).integers(0, 44, (rows, size * width), np.uint8)


def write_gguf(path, config, shapes, kind=Kind.F32):
    w = gguf.GGUFWriter(path, config["model_type"])
    w.add_block_count(config["num_hidden_layers"])
    w.add_context_length(config["max_position_embeddings"])
    w.add_embedding_length(config["hidden_size"])
    w.add_feed_forward_length(config["intermediate_size"])
    w.add_head_count(config["num_attention_heads"])
    w.add_head_count_kv(config["num_key_value_heads"])
    w.add_key_length(config.get("head_dim", config["hidden_size"] // config["num_attention_heads"]))
    w.add_layer_norm_rms_eps(config["rms_norm_eps"])
    w.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list(TOKENS)
    w.add_token_types([3] + [1] * (len(TOKENS) - 1))
    w.add_token_merges(["a b", "ab c"])
    w.add_eos_token_id(0)
    arch = gguf.MODEL_ARCH[config["model_type"].upper()]
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    for name, shape in shapes.items():
        x = draw(name, shape)
        if config["model_type"] == "llama" and (".q_proj." in name or ".k_proj." in name):
            kv = ".k_proj." in name
            x = interleave(x, config["num_key_value_heads" if kv else "num_attention_heads"])
        short = names.get_name(name, try_suffixes=(".weight", ".bias"))
        stored = kind if x.ndim == 2 else Kind.F32
        w.add_tensor(short, as_stored(x, stored), raw_dtype=stored)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


@pytest.fixture
def golden():
    return read_golden("llama")


@pytest.mark.parametrize("case", ["llama", "qwen2", "qwen3"])
def test_logits(case, tmp_path):
    file, config, shapes = read_golden(case)
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


# Rows of 256 numbers: a block of the K-quants.
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
WIDE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 97}


def wide_shapes():
    layer, block = "model.layers.0.", {"q_proj": 256, "k_proj": 128, "v_proj": 128, "o_proj": 256}
    shapes = {f"{layer}self_attn.{n}.weight": (rows, 256) for n, rows in block.items()}
    shapes |= {f"{layer}mlp.{n}_proj.weight": (256, 256) for n in ("gate", "up", "down")}
    shapes |= {f"{layer}{n}_layernorm.weight": (256,) for n in ("input", "post_attention")}
    shapes |= dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (97, 256))
    return shapes | {"model.norm.weight": (256,)}


KEPT = {Kind.F16: "float16", Kind.BF16: "bfloat16"}
BLOCKS = (Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1)
K_QUANTS = (Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K)


@pytest.mark.parametrize("kind", [*KEPT, *BLOCKS, *K_QUANTS], ids=lambda k: k.name)
def test_quantizations(kind, golden, tmp_path):
    _, config, _ = golden
    path = write_gguf(tmp_path / "m.gguf", config | WIDE, wide_shapes(), kind)
    model, params, _ = jaxlm.load(path)
    dtype = KEPT.get(kind, "float32")
    assert model.config.numerics.param_dtype == dtype
    name = "model.layers.0.mlp.up_proj.weight"
    want = gguf.dequantize(as_stored(draw(name, (256, 256)), kind), kind).T
    got = params["layers"]["block_0"]["feed_forward"]["up"]["kernel"][0]
    assert got.dtype == dtype and np.isfinite(want).all() and want.std() > 0
    np.testing.assert_array_equal(np.asarray(got, np.float32), want)


def test_a_quantization_that_nothing_unpacks(golden, tmp_path):
    _, config, _ = golden
    path = write_gguf(tmp_path / "m.gguf", config | WIDE, wide_shapes(), Kind.Q8_K)
    with pytest.raises(ValueError, match=r"m.gguf: quantization Q8_K; allowed: F32, F16, BF16 and"):
        jaxlm.load(path)


def test_tensors_that_overlap(golden, tmp_path):
    _, config, shapes = golden
    path = write_gguf(tmp_path / "m.gguf", config, shapes)
    data = path.read_bytes()
    second = sorted(t.data_offset for t in gguf.GGUFReader(path).tensors)[1]
    first = min(t.data_offset for t in gguf.GGUFReader(path).tensors)
    offset = struct.pack("<Q", second - first)
    assert data[:first].count(offset) == 1
    path.write_bytes(data.replace(offset, struct.pack("<Q", 0), 1))
    with pytest.raises(ValueError, match=r"m.gguf: .* overlaps "):
        jaxlm.load(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A good file, its bytes, and where its header ends."""
    _, config, shapes = read_golden("llama")
    path = write_gguf(tmp_path_factory.mktemp("fuzz") / "m.gguf", config, shapes)
    end = min(int(t.data_offset) for t in gguf.GGUFReader(path).tensors)
    return path, path.read_bytes(), end


@hypothesis.settings(max_examples=60)
@hypothesis.given(data=st.data())
def test_headers_that_lie(whole, data):
    """A few bytes changed or the end cut off: it opens, or is refused by a ValueError."""
    path, good, end = whole
    changed = bytearray(good)
    byte = st.one_of(st.sampled_from([0, 1, 255]), st.integers(0, 255))
    for at in data.draw(st.lists(st.integers(0, end - 1), min_size=1, max_size=4)):
        changed[at] = data.draw(byte)
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(good))))
    path.with_name("changed.gguf").write_bytes(changed[:cut])
    try:
        open_foreign(path.with_name("changed.gguf"))
    except ValueError as error:
        assert str(path.parent) in str(error) or "allowed: " in str(error)
