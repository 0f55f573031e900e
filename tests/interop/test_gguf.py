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
from jaxlm.interop import gguf_file
from jaxlm.interop.gguf_config import architecture_of, config_json
from jaxlm.load import open_foreign
from tests.interop.folders import parameters, read_golden, write_folder
from tests.interop.gguf_files import TOKENS, as_stored, converted, write_gguf
from tests.interop.weights import draw


@pytest.fixture
def golden():
    return read_golden("llama")


# What GGUF cannot say of a golden, and where the hub has two ways to say the same.
CHANGES = {
    "gemma2": {"query_pre_attn_scalar": 12},
    "gemma3": {"query_pre_attn_scalar": 12},
    "mpt_clip": {"attn_config": {"clip_qkv": 0.9, "alibi_bias_max": 8}},
    "falcon_7b": {"num_kv_heads": 1},
    "gpt2": {"n_inner": 192},
}
CASES = (
    *("llama", "llama_bias_tied", "llama_linear", "llama_yarn", "llama_llama3", "mixtral"),
    *("qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "gemma", "gemma2", "gemma3", "phi3"),
    *("olmo", "olmo2", "stablelm", "stablelm_parallel", "starcoder2", "gpt2", "gpt_oss"),
    *("gpt_neox", "gpt_neox_serial", "falcon_7b", "falcon_40b", "falcon_11b", "bloom"),
    *("mpt", "mpt_clip"),
)


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_hubs_model(case, tmp_path, caplog):
    """The same config, and the same parameters bit for bit; no metadata is left unread."""
    _, config, shapes = read_golden(case)
    config |= CHANGES.get(case, {}) | {"router_aux_loss_coef": 0.0}
    hub = open_foreign(write_folder(tmp_path / "hub", config, shapes))
    ours = open_foreign(write_gguf(tmp_path / "m.gguf", config, shapes))
    assert ours.config == hub.config
    assert "m.gguf: not understood" not in caplog.text
    # One is added to Gemma's scales, near 1 here, and taken away: the last bit of a float32 near 2.
    atol = 2.0**-22 if case.startswith("gemma") else 0
    got, want = parameters(ours), parameters(hub)
    assert got.keys() == want.keys()
    for path, x in want.items():
        np.testing.assert_allclose(got[path], x, rtol=0, atol=atol, err_msg=path)


def header(kind, layers, **also):
    """Metadata of 8 heads, which share a width of 4096; heads of 256 numbers; tensors to count."""
    about = {"block_count": layers, "embedding_length": 4096, "attention.head_count": 8}
    about |= {"attention.key_length": 256} | also
    metadata = {f"{kind}.{key}": value for key, value in about.items()}
    metadata["general.architecture"] = kind
    file = object.__new__(gguf_file.GGUFFile)
    file.name, file.metadata = "m.gguf", metadata
    file.shapes = dict.fromkeys(map(str, range(99)), (1,))
    return file


@pytest.mark.parametrize(
    ("kind", "layers", "key", "value"),
    [
        ("gemma2", 26, "sliding_window", 4096),
        ("gemma2", 26, "attn_logit_softcapping", 50.0),
        ("gemma2", 26, "final_logit_softcapping", 30.0),
        ("gemma3", 26, "rope_local_base_freq", 10000.0),
        # Only 27B divides by the width of a head were the heads to share the model's.
        *(
            ("gemma2", layers, "query_pre_attn_scalar", d)
            for layers, d in ((45, 256), (46, 512), (47, 256))
        ),
        *(("gemma3", layers, "query_pre_attn_scalar", d) for layers, d in ((61, 256), (62, 512))),
    ],
)
def test_what_gemmas_files_leave_out(kind, layers, key, value):
    file = header(kind, layers)
    assert config_json(file, architecture_of(file))[key] == value


def test_a_head_of_a_shared_width():
    file = header("gptneox", 2, **{"attention.key_length": None, "rope.dimension_count": 128})
    del file.metadata["gptneox.attention.key_length"]
    assert config_json(file, architecture_of(file))["rotary_pct"] == 128 / 512


def test_logits(golden, tmp_path):
    file, config, shapes = golden
    model, params, _ = jaxlm.load(write_gguf(tmp_path / "m.gguf", config, shapes))
    logits, _ = model.apply({"params": params}, jnp.asarray(file["tokens"], jnp.int32))
    # float32 sums in another order, over three layers.
    np.testing.assert_allclose(logits, file["logits"], atol=1e-4 * np.abs(file["logits"]).max())


def test_mixtral_of_2023(tmp_path):
    """A tensor for each expert, as files had it before they were stacked."""
    _, config, shapes = read_golden("mixtral")
    stacked = open_foreign(write_gguf(tmp_path / "stacked.gguf", config, shapes))
    parts, short = {}, {"w1": "gate", "w2": "down", "w3": "up"}
    for name, x in converted(config, shapes):
        if ".experts." not in name:
            parts[name] = x
            continue
        _, layer, *_, matrix, _ = name.split(".")
        parts |= {f"blk.{layer}.ffn_{short[matrix]}.{i}.weight": y for i, y in enumerate(x)}
    path = write_gguf(tmp_path / "m.gguf", config, shapes, tensors=parts.items())
    got = parameters(open_foreign(path))
    for name, x in parameters(stacked).items():
        np.testing.assert_array_equal(got[name], x, err_msg=name)


def test_metadata_that_lies(golden, tmp_path):
    _, config, shapes = golden
    path = write_gguf(tmp_path / "m.gguf", config | {"num_hidden_layers": 10**9}, {})
    with pytest.raises(
        ValueError, match=r"m.gguf: llama.block_count=1000000000; allowed: an integ"
    ):
        jaxlm.load(path)
    tensors = [*converted(config, shapes), ("rope_freqs.weight", np.float32([1, 3, 2, 9, 4, 8]))]
    path = write_gguf(tmp_path / "m.gguf", config, shapes, tensors=tensors)
    with pytest.raises(ValueError, match=r"m.gguf: rope_freqs.weight; allowed: the divisors of Ll"):
        jaxlm.load(path)
    tokenizer = lambda writer: writer.add_uint16("split.count", 3)  # noqa: E731
    path = write_gguf(tmp_path / "m.gguf", config, {}, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"m.gguf: one of 3 parts; allowed: a whole file"):
        jaxlm.load(path)
    path = write_gguf(tmp_path / "m.gguf", config | {"model_type": "rwkv7"}, {})
    with pytest.raises(ValueError, match=r"m.gguf: architecture='rwkv7'; allowed: llama, qwen2,"):
        jaxlm.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"llama.rope.freq_base": [1.0]}, r"rope_theta=\[1.0\]; allowed: float"),
        ({"llama.rope.scaling.type": ["yarn"]}, r"rope_type=\['yarn'\]; allowed: str"),
        ({"llama.attention.key_length": 2 * 10**8}, r"num_heads \* head_dim=\d+; allowed: at most"),
        ({"tokenizer.ggml.eot_token_id": [1]}, r"eos_token_id=\[1\] .*allowed: integers from 0"),
        ({"tokenizer.chat_template": [1]}, r"chat_template: name is absent"),
    ],
)
def test_metadata_of_another_kind(golden, tmp_path, monkeypatch, change, message):
    _, config, shapes = golden
    path = write_gguf(tmp_path / "m.gguf", config, shapes)
    file = gguf_file.GGUFFile(path)
    file.metadata |= change
    monkeypatch.setattr("jaxlm.interop.read.GGUFFile", lambda path: file)
    with pytest.raises(ValueError, match=message):
        open_foreign(path.rename(tmp_path / "M.GGUF"))


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
BLOCKS = (Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.MXFP4)
K_QUANTS = (Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K)


@pytest.mark.parametrize("kind", [*KEPT, *BLOCKS, *K_QUANTS], ids=lambda k: k.name)
def test_quantizations(kind, golden, tmp_path, monkeypatch):
    _, config, _ = golden
    monkeypatch.setattr(
        gguf_file, "PART", 10_000
    )  # each tensor in several parts, one of them short
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
