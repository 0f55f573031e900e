"""What is written reads back bit for bit, says the same in config.json, and keeps its dtype."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import jaxlm
from jaxlm.interop.families import FAMILIES, find
from jaxlm.interop.fields import read_fields, write_fields
from jaxlm.interop.hub_config import HubConfig
from jaxlm.interop.write import write_hub_folder
from tests.interop.folders import ALL, read_golden, stored, write_folder
from tests.marks import slow_but


def folder_of(case, tmp_path, **changes):
    _, config, shapes = read_golden(case)
    return write_folder(tmp_path / "hub", config | changes, shapes)


def plain(config):
    """All fields, with the numbers that None stands for; an encoder–decoder has two of each."""
    if hasattr(config, "encoder"):
        halves = plain(config.encoder), plain(config.decoder)
        return {name: (halves[0][name], halves[1][name]) for name in halves[0]}
    values = dataclasses.asdict(config)
    values["feed_forward"]["d_ff"] = config.d_ff
    values["attention"]["num_kv_heads"] = config.num_kv_heads
    values["attention"]["head_dim"] = config.head_dim
    return values | {"position_encoding": config.encoding}


# Slow to load, and like another in how they are written.
LIKE_ANOTHER = {"mixtral", "qwen3_moe", "mpt"}


@pytest.mark.parametrize("case", slow_but(set(ALL) - LIKE_ANOTHER, ALL))
def test_round_trip(case, tmp_path):
    folder, out = folder_of(case, tmp_path), tmp_path / "out"
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, params, tokenizer = jaxlm.load(folder)
    assert write_hub_folder(out, model, params, tokenizer, architecture) == architecture
    assert stored(out) == stored(folder)
    again, same, tokenizer_again = jaxlm.load(out)
    assert plain(again.config)["position_encoding"] == plain(model.config)["position_encoding"]
    jax.tree.map(np.testing.assert_array_equal, params, same)
    if plain(again.config) != plain(model.config):  # the hub has no word for a loss's weight
        # The very same program, which need not be compiled.
        tokens = np.zeros((2, 20), np.int32)
        one, other = (jax.jit(m.apply).lower({"params": params}, tokens) for m in (model, again))
        assert one.as_text() == other.as_text()
    assert tokenizer_again.fingerprint == tokenizer.fingerprint
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    assert json.loads((out / "config.json").read_text())["model_type"] == model_type


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.architectures[0])
def test_every_key_that_is_written_is_read(family):
    cases = [c for c in ALL if read_golden(c)[1]["architectures"][0] in family.architectures]
    values = HubConfig(read_golden(cases[0])[1], cases[0])
    config = read_fields(family.fields, values, family.config)
    keys = HubConfig(write_fields(family.fields, config), "written")
    read_fields(family.fields, keys, family.config)
    assert not keys.unread


@pytest.mark.parametrize("case", ["gemma2", "gemma3"])
def test_a_whole_number_is_written_as_one(case):
    """transformers checks the types of its configs' fields."""
    fields = find(read_golden(case)[1]["architectures"][0], case).fields
    keys = write_fields(fields, read_fields(fields, HubConfig(read_golden(case)[1], case)))
    assert keys["query_pre_attn_scalar"] == 20 and type(keys["query_pre_attn_scalar"]) is int


def test_the_first_architecture_that_can_say_it(tmp_path):
    names = {}
    for case in ("llama", "qwen2", "qwen3", "gemma2", "gpt2"):
        folder = tmp_path / case
        folder.mkdir()
        model, params, tokenizer = jaxlm.load(folder_of(case, folder))
        names[case] = write_hub_folder(folder / "out", model, params, tokenizer)
    want = {c: read_golden(c)[1]["architectures"][0] for c in names}
    assert names == want


def test_shards(tmp_path):
    folder, out = folder_of("llama", tmp_path), tmp_path / "out"
    model, params, tokenizer = jaxlm.load(folder)
    write_hub_folder(out, model, params, tokenizer, max_shard_bytes=40_000)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2
    for path in files:
        with safe_open(path, "numpy") as file:
            several = len(file.keys()) > 1
        assert path.stat().st_size < 42_000 or not several
    assert stored(out) == stored(folder)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {p.name for p in files}
    again, same, _ = jaxlm.load(out)
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, params, same)


@pytest.mark.parametrize("dtype", slow_but(["bfloat16"], ["bfloat16", "float16"]))
def test_dtype_is_kept(dtype, tmp_path):
    folder, out = folder_of("qwen3_moe", tmp_path), tmp_path / "out"
    path = folder / "model.safetensors"
    save_file({n: x.astype(jnp.dtype(dtype)) for n, x in load_file(path).items()}, path)
    model, params, tokenizer = jaxlm.load(folder)
    assert model.config.numerics.param_dtype == model.config.numerics.dtype == dtype
    assert {str(x.dtype) for x in jax.tree.leaves(params)} == {dtype}
    write_hub_folder(out, model, params, tokenizer, "Qwen3MoeForCausalLM")
    assert stored(out) == stored(folder)
    wide, params, _ = jaxlm.load(folder, dtype="float32", param_dtype="float32")
    assert wide.config.numerics.param_dtype == wide.config.numerics.dtype == "float32"
    assert {str(x.dtype) for x in jax.tree.leaves(params)} == {"float32"}


@pytest.mark.parametrize(
    ("case", "encoding", "architecture", "message"),
    [
        (
            "llama",
            "lm_infinite",
            None,
            r"no architecture.*LlamaForCausalLM, .*: position_encoding=lm_inf",
        ),
        ("llama", "rope(scaling=ntk(factor=2))", "LlamaForCausalLM", r"allowed: scaling is linear"),
        ("qwen3", None, "LlamaForCausalLM", r"attention.qk_norm='head'; allowed: 'none'"),
        ("t5", None, "LlamaForCausalLM", r"like this: EncoderDecoderConfig; allowed: ModelConfig"),
        ("gpt2", None, "LlamaForCausalLM", r"position_encoding=learned; allowed: rope"),
        ("llama", None, "NoSuch", r"architecture='NoSuch'; allowed: .*LlamaForCausalLM"),
    ],
)
def test_what_cannot_be_said(case, encoding, architecture, message, tmp_path):
    model, params, tokenizer = jaxlm.load(folder_of(case, tmp_path))
    if encoding is not None:
        model = model.with_position_encoding(encoding)
    with pytest.raises(ValueError, match=message):
        write_hub_folder(tmp_path / "out", model, params, tokenizer, architecture)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Gemma2ForCausalLM"])
def test_a_decoder_has_no_layers_that_see_ahead(architecture):
    fields = find(architecture, "").fields
    case = "llama" if architecture.startswith("Llama") else "gemma2"
    config = read_fields(fields, HubConfig(read_golden(case)[1], case))
    a = dataclasses.replace(config.attention, layer_pattern=("bidirectional",), sliding_window=None)
    with pytest.raises(ValueError, match=r"layer_pattern=.*'bidirectional'.*; allowed: "):
        write_fields(fields, config.replace(attention=a))


def test_a_folder_with_files_is_left_alone(tmp_path):
    folder = folder_of("llama", tmp_path)
    with pytest.raises(FileExistsError, match="holds files; allowed: a folder that is absent"):
        write_hub_folder(folder, *jaxlm.load(folder))


def test_what_a_config_says_survives_a_change_of_layout(tmp_path):
    """Layers that slide in another rhythm are told one by one."""
    fields = find("Gemma2ForCausalLM", "").fields
    config = read_fields(fields, HubConfig(read_golden("gemma2")[1], "gemma2"))
    a = jaxlm.AttentionConfig(
        **vars(config.attention) | {"layer_pattern": ("sliding", "sliding", "global")}
    )
    keys = write_fields(fields, config.replace(attention=a))
    assert keys["layer_types"] == ["sliding_attention"] * 2 + ["full_attention"]
