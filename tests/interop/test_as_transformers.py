"""Keys that are absent, ignored or said twice mean what they mean to transformers' classes."""

import dataclasses
import json
import math

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxlm
from jaxlm.interop.families import find
from jaxlm.interop.fields import value_of, write_fields
from jaxlm.interop.read import _config
from jaxlm.interop.safetensors_folder import SafetensorsFolder
from jaxlm.interop.tensors import read_params
from jaxlm.interop.write import write_hub_folder
from tests.interop.folders import GOLDENS, read_golden, write_folder

ROPE = ("rope_parameters", "rope_scaling", "rope_theta")
OSS_YARN = "rope(base=150000.0, scaling=yarn(factor=32.0, original_length=4096, truncate=False))"


def read(case, absent=(), **changes):
    values = {k: v for k, v in read_golden(case)[1].items() if k not in absent} | changes
    return _config(values, "config.json", hub=True)[1]


@pytest.mark.parametrize(
    ("case", "absent", "changes", "path", "want"),
    [
        ("mixtral", ROPE, {}, "position_encoding", "rope(base=1000000.0)"),
        ("gpt_oss", ROPE, {}, "position_encoding", OSS_YARN),
        ("gpt_oss", ROPE, {"rope_scaling": {"type": "default"}}, "position_encoding", None),
        ("gpt_oss", ["sliding_window"], {}, "attention.sliding_window", 128),
        ("gemma2", ["attn_logit_softcapping"], {}, "attention.softcap", 50.0),
        ("gemma2", (), {"attn_logit_softcapping": None}, "attention.softcap", None),
        ("gemma2", ["final_logit_softcapping"], {}, "embedding.logit_softcap", 30.0),
        (
            "gemma2",
            ["hidden_activation"],
            {"hidden_act": "silu"},
            "feed_forward.kind",
            "geglu_tanh",
        ),
        ("mistral", ["sliding_window"], {}, "attention.sliding_window", 4096),
        ("mistral", (), {"sliding_window": None}, "attention.sliding_window", None),
        ("gemma3", (), {"attn_logit_softcapping": 3.0}, "attention.softcap", None),
        ("qwen3", ["head_dim"], {}, "attention.head_dim", 128),
        ("llama", (), {"partial_rotary_factor": 0.5}, "encoding.fraction", 1.0),
        ("qwen3", (), {"partial_rotary_factor": 0.5}, "encoding.fraction", 1.0),
        ("phi3", (), {"attention_bias": True, "mlp_bias": True}, "attention.qkv_bias", False),
        ("mixtral", (), {"mlp_bias": True}, "feed_forward.bias", False),
    ],
)
def test_a_key(case, absent, changes, path, want):
    got = value_of(read(case, absent, **changes), path)
    want = "rope(base=150000.0)" if path == "position_encoding" and want is None else want
    assert (str(got) if path == "position_encoding" else got) == want


@pytest.mark.parametrize("case", [*GOLDENS, "bert"])
def test_without_an_architecture_it_goes_by_the_type(case):
    values = read_golden(case)[1]
    family, config = _config(values | {"architectures": None}, "config.json", hub=True)
    assert family is find(values["architectures"][0], case)
    assert config == read(case)


SLIDE = {"use_sliding_window": True, "sliding_window": 5, "num_hidden_layers": 6}


@pytest.mark.parametrize(
    ("case", "changes", "pattern"),
    [
        ("qwen2", {}, "gggggg"),
        ("qwen2", {"max_window_layers": 2}, "ggssss"),
        ("qwen2", {"max_window_layers": 2**31 - 1}, "gggggg"),
        ("qwen2", {"max_window_layers": 0, "sliding_window": None}, "gggggg"),
        ("qwen2_moe", {}, "sgsgsg"),
        ("qwen2_moe", {"max_window_layers": 3}, "sgsggg"),
        ("qwen3_moe", {"max_window_layers": 4}, "ssssss"),
        ("qwen3_moe", {"use_sliding_window": False}, "gggggg"),
        ("gemma3", {"sliding_window_pattern": 2**31 - 1}, "ssssss"),
    ],
)
def test_which_layers_slide(case, changes, pattern):
    model = read(case, ["layer_types", "max_window_layers"], **SLIDE | changes)
    assert "".join(model.layer_kind(i)[0] for i in range(6)) == pattern


LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


def scaled(kind, **more):
    return {"rope_type": kind, "rope_theta": 100.0, "factor": 4.0} | more


INNER, OUTER = ({"original_max_position_embeddings": n} for n in (16, 32))
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
# (0.1 · 2 · ln 4 + 1) / (0.1 · ln 4 + 1)
MSCALE = (0.2 * math.log(4) + 1) / (0.1 * math.log(4) + 1)


@pytest.mark.parametrize(
    ("changes", "attribute", "want"),
    [
        ({"rope_scaling": scaled("dynamic", **INNER)} | OUTER, "original_length", 64),
        ({"rope_scaling": scaled("yarn", **INNER)}, "original_length", 16),
        ({"rope_scaling": scaled("yarn", **INNER)} | OUTER, "original_length", 32),
        ({"rope_scaling": scaled("llama3", **INNER, **LLAMA3)} | OUTER, "original_length", 32),
        (
            {"rope_scaling": scaled("yarn", mscale=2.0, mscale_all_dim=1.0)},
            "attention_factor",
            MSCALE,
        ),
        ({"rope_scaling": scaled("yarn", mscale=2.0)}, "attention_factor", None),
        ({"rope_scaling": scaled("yarn"), "rope_parameters": scaled("linear")}, "name", "yarn"),
        ({"rope_scaling": LONG | INNER | {"factor": 4.0}}, "attention_factor", None),
        ({"rope_scaling": LONG | INNER | {"factor": 16.0}}, "attention_factor", math.sqrt(2)),
        ({"rope_scaling": LONG | INNER | {"factor": 1.0}}, "attention_factor", 1.0),
    ],
)
def test_rope_scaling(changes, attribute, want):
    changes = {"rope_parameters": None, "max_position_embeddings": 64, "head_dim": 8} | changes
    assert getattr(read("llama", **changes).encoding.scaling, attribute) == want


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        (
            "llama",
            {"rope_scaling": {"rope_type": "linear", "factor": 2, "twist": 1}},
            "twist is no",
        ),
        (
            "llama",
            {"partial_rotary_factor": 0.5, "rope_scaling": {"rope_type": "linear", "factor": 2}},
            "partial_rotary_factor=0.5; allowed: 1 in this family",
        ),
        ("bert", {"is_decoder": True}, "is_decoder=True; allowed: False"),
        ("roberta", {"is_decoder": True}, "is_decoder=True; allowed: False"),
        ("gemma3", {"layer_types": None, "sliding_window_pattern": 0}, "pattern=0; allowed: at l"),
        (
            "gemma3",
            {"layer_types": None, "sliding_window_pattern": 3 * 10**9},
            "pattern=3000000000",
        ),
        ("qwen2", {"max_window_layers": 3 * 10**9}, "max_window_layers=3000000000; allowed: int"),
        ("gptj", {"rotary_dim": [1]}, r"rotary_dim=\[1\]; allowed: int"),
        ("gptj", {"rotary_dim": "ab"}, "rotary_dim='ab'; allowed: int"),
        ("llama", {"rms_norm_eps": math.inf}, "rms_norm_eps=inf; allowed: a finite number"),
        ("llama", {"rms_norm_eps": 10**400}, "rms_norm_eps=1000.*; allowed: a finite number"),
        ("gemma2", {"final_logit_softcapping": math.inf}, "final_logit_softcapping=inf; allowed"),
        ("mistral", {"sliding_window": 10**30}, "sliding_window=10+; allowed: int"),
        ("gpt2", {"n_positions": 10**13}, "n_positions=10+; allowed: a finite number"),
    ],
)
def test_it_is_refused(case, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        read(case, **changes)
    assert len(str(error.value)) < 400


def with_encoding(text):
    return lambda config: config.replace(position_encoding=text)


def without_caps(config):
    return config.replace(
        attention=dataclasses.replace(config.attention, softcap=None),
        embedding=dataclasses.replace(config.embedding, logit_softcap=None),
    )


def without_window(config):
    a = dataclasses.replace(config.attention, sliding_window=None, layer_pattern=("global",))
    return config.replace(attention=a)


NO_CAPS = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("case", "change", "want"),
    [
        ("gemma2", without_caps, NO_CAPS),
        ("mistral", without_window, {"sliding_window": None}),
        ("gpt_oss", with_encoding("rope"), {"rope_scaling": {"rope_type": "default"}}),
        ("phi3", with_encoding("rope(fraction=0.5)"), {"partial_rotary_factor": 0.5}),
        (
            "llama",
            with_encoding("rope(base=1000, scaling=linear(factor=2))"),
            {"rope_theta": 1000.0, "rope_scaling": LINEAR},
        ),
    ],
)
def test_it_is_written(case, change, want):
    family = find(read_golden(case)[1]["architectures"][0], case)
    keys = write_fields(family.fields, change(read(case)), family.absent)
    assert json.dumps({k: keys[k] for k in want}) == json.dumps(want)


@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        ("rope(fraction=0.5)", r"position_encoding=rope\(fraction=0.5\); allowed: fraction=1"),
        ("rope(scaling=dynamic_ntk(factor=2, original_length=16))", "allowed: .*original_length="),
    ],
)
def test_what_a_family_cannot_say(encoding, message):
    family = find("LlamaForCausalLM", "")
    config = read("llama", head_dim=8).replace(position_encoding=encoding)
    with pytest.raises(ValueError, match=message):
        write_fields(family.fields, config, family.absent)


def test_rotated_dims_that_are_no_round_share():
    model = read("gptj", n_embd=132, n_head=3, rotary_dim=30)
    assert model.encoding.width(model.head_dim) == 30


def hub_folder(case, tmp_path, tensors, **changes):
    """A golden's folder with more tensors, each made of those that are there."""
    _, config, shapes = read_golden(case)
    folder = write_folder(tmp_path / "hub", config | changes, shapes)
    file = folder / "model.safetensors"
    stored = load_file(file)
    save_file(stored | {name: make(stored) for name, make in tensors.items()}, file)
    return folder


@pytest.mark.parametrize("case", ["llama", "gemma"])
def test_a_head_that_is_no_copy_is_kept(case, tmp_path):
    _, config, shapes = read_golden(case)
    shapes = {n: s for n, s in shapes.items() if n != "lm_head.weight"}
    config = {k: v for k, v in config.items() if k != "tie_word_embeddings"}
    config |= {"tie_word_embeddings": True} if case == "llama" else {}
    folder = write_folder(tmp_path / "hub", config, shapes)
    stored = load_file(folder / "model.safetensors")
    head = stored["model.embed_tokens.weight"]
    save_file(stored | {"lm_head.weight": head}, folder / "model.safetensors")
    assert jaxlm.load(folder)[0].config.embedding.tied
    save_file(stored | {"lm_head.weight": head + 1}, folder / "model.safetensors")
    model, params, tokenizer = jaxlm.load(folder)
    assert not model.config.embedding.tied
    np.testing.assert_array_equal(params["head"], (head + 1).T)
    write_hub_folder(tmp_path / "out", model, params, tokenizer)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["tie_word_embeddings"] is False


BERT = "bert_masked_lm"


@pytest.mark.parametrize(
    ("case", "name", "original"),
    [
        (BERT, "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
        (BERT, "cls.predictions.decoder.bias", "cls.predictions.bias"),
        ("t5", "decoder.embed_tokens.weight", "shared.weight"),
    ],
)
def test_a_head_of_its_own_where_there_can_be_none(case, name, original, tmp_path):
    folder = hub_folder(case, tmp_path, {name: lambda stored: stored[original] + 1})
    with pytest.raises(ValueError, match=rf"{name} is not {original}; allowed: a copy of it"):
        jaxlm.load(folder)


def test_ends_of_the_model_where_there_is_no_generation_config(tmp_path):
    folder = hub_folder("llama", tmp_path, {}, eos_token_id=[1, 53, 50256])
    assert jaxlm.load(folder)[2].stop_ids == (1, 53, 96)
    (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert jaxlm.load(folder)[2].stop_ids == (7, 96)


def test_a_parameter_that_no_tensor_fills(tmp_path):
    model, _, _ = jaxlm.load(folder := hub_folder("phi3", tmp_path, {}))
    rows = [row for row in find("Phi3ForCausalLM", "").rows(model.config) if "up" not in row.ours]
    with pytest.raises(ValueError, match=r"hub: no tensor is .*feed_forward/gate.*; allowed: "):
        read_params(SafetensorsFolder(folder), model, rows)
