"""Adapters as peft writes them: the same change of every matrix, under peft's names."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxlm
from jaxlm.adapters.config import AdapterConfig
from jaxlm.adapters.lora import add_adapters, merge_adapters
from jaxlm.interop.peft_folder import write_peft_folder
from jaxlm.interop.write import write_hub_folder
from tests.interop.folders import read_golden, write_folder

# One with its matrices [outputs, inputs], one the other way round.
CASES = {"llama": "attention/.*|feed_forward/.*", "gpt2": "attention/out|feed_forward/.*"}


def adapted(case, folder, dora, targets):
    _, config, shapes = read_golden(case)
    model, params, tokenizer = jaxlm.load(write_folder(folder, config, shapes))
    # A third of 16 is no float32: alpha can't be told from the parameters.
    adapter = AdapterConfig(rank=3, alpha=16.0, targets=targets, dora=dora)
    params = jax.jit(lambda p: add_adapters(model, p, adapter))(params)
    rng = np.random.default_rng(0)

    def drawn(path, x):
        wanted = path[-1].key in ("b", "magnitude")
        if not wanted:
            return x
        return jax.device_put(np.float32(np.asarray(x) + 0.03 * rng.normal(size=x.shape)))

    return model, jax.tree_util.tree_map_with_path(drawn, params), adapter, tokenizer


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_change_of_every_matrix(case, dora, tmp_path):
    """By peft's formulas, from what is written alone, against the merged hub folder."""
    model, params, adapter, tokenizer = adapted(case, tmp_path / "base", dora, CASES[case])
    modules = write_peft_folder(tmp_path / "adapter", model, params, adapter, "base")
    write_hub_folder(tmp_path / "merged", model, jax.jit(merge_adapters)(params), tokenizer)
    about = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert about["target_modules"] == modules and about["use_dora"] == dora
    assert (about["r"], about["lora_alpha"]) == (3, 16.0)
    lora = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    before = load_file(tmp_path / "base" / "model.safetensors")
    after = load_file(tmp_path / "merged" / "model.safetensors")
    changed = 0
    for name, base in before.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" not in lora:
            np.testing.assert_array_equal(after[name], base)
            continue
        turn = np.transpose if about["fan_in_fan_out"] else np.asarray
        whole = turn(base).astype(np.float64) + about["lora_alpha"] / about["r"] * (
            lora[f"{module}.lora_B.weight"] @ lora[f"{module}.lora_A.weight"]
        )
        if dora:
            length = np.linalg.norm(whole, axis=1, keepdims=True)
            whole = whole * lora[f"{module}.lora_magnitude_vector"][:, None] / length
        # float32 sums of a few terms
        np.testing.assert_allclose(turn(after[name]), whole, rtol=1e-5, atol=1e-6)
        assert name.rpartition(".weight")[0].endswith(tuple(modules))
        changed += 1
    assert changed == len([n for n in lora if n.endswith("lora_A.weight")])
    assert changed == model.config.num_layers * {"llama": 7, "gpt2": 3}[case]


def test_names_fit_no_other_module(tmp_path):
    model, params, adapter, _ = adapted("gpt2", tmp_path / "base", False, "attention/out")
    assert write_peft_folder(tmp_path / "a", model, params, adapter, "base") == ["attn.c_proj"]


def test_what_cannot_be_said_is_refused(tmp_path):
    model, params, adapter, _ = adapted("gpt2", tmp_path / "base", False, "attention/q")
    with pytest.raises(ValueError, match=r"c_attn.weight holds q, k, v in one matrix; allowed"):
        write_peft_folder(tmp_path / "a", model, params, adapter, "base")
    with pytest.raises(ValueError, match="params have no adapter; allowed"):
        write_peft_folder(tmp_path / "a", model, jax.jit(merge_adapters)(params), adapter, "base")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").touch()
    with pytest.raises(FileExistsError, match="holds files; allowed"):
        write_peft_folder(tmp_path / "a", model, params, adapter, "base")


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft on a newer transformers
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_peft_loads_it_and_computes_the_same(case, dora, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    model, params, adapter, _ = adapted(case, tmp_path / "base", dora, CASES[case])
    write_peft_folder(tmp_path / "adapter", model, params, adapter, str(tmp_path / "base"))
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="float32")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    tokens = np.random.default_rng(0).integers(0, 90, (2, 9))
    with torch.no_grad():
        want = theirs(torch.from_numpy(tokens)).logits.numpy()
    got, _ = model.apply({"params": params}, jnp.asarray(tokens, jnp.int32))
    # float32 sums in another order, over a few layers: 1e-4 of the largest logit.
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())
