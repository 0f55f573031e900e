"""gpt-oss's experts in MXFP4 are the numbers that the format's definition gives."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxlm
from jaxlm.interop.mxfp4 import dequantize
from jaxlm.load import open_foreign
from tests.interop.folders import parameters, read_golden, write_folder

LAYER = "model.layers.1.mlp.experts."
QUANTIZED = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}


def by_definition(byte, scale):
    """Both numbers of a byte: (-1)^s · 2^(e-1) · (1 + m/2), with e = 0 m/2, times 2^(scale-127)."""
    found = []
    for bits in (byte & 15, byte >> 4):
        sign, e, m = bits >> 3, (bits >> 1) & 3, bits & 1
        size = 2.0 ** (e - 1) * (1 + m / 2) if e else m / 2
        found.append((-1) ** sign * size * 2.0 ** (scale - 127))
    return found


def packed(rng, *shape):
    """Random blocks for that many numbers, and scales of which small numbers come."""
    *rows, columns = shape
    blocks = rng.integers(0, 256, (*rows, columns // 32, 16), np.uint8)
    return blocks, rng.integers(116, 122, (*rows, columns // 32), np.uint8)


def test_every_byte():
    exponents = [0, 1, 7, 126, 127, 128, 252, 253, 254]
    shape = (len(exponents), 16, 16)
    blocks = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(16, 16), shape)
    scales = np.broadcast_to(np.array(exponents, np.uint8)[:, None], shape[:2])
    got = dequantize(blocks, scales)
    want = np.reshape([[by_definition(b, s) for b in range(256)] for s in exponents], got.shape)
    assert got.dtype == jnp.bfloat16
    with np.errstate(over="ignore"):  # beyond the last finite number bfloat16 has infinity
        np.testing.assert_array_equal(got, want.astype(jnp.bfloat16))
    assert np.isnan(dequantize(blocks[0], scales[0] * 0 + 255)).all()


@pytest.fixture
def folder(tmp_path):
    """gpt-oss as on the hub: bfloat16, but for its experts."""
    _, config, shapes = read_golden("gpt_oss")
    config |= {"hidden_size": 64, "intermediate_size": 32, "quantization_config": QUANTIZED}
    sizes = {42: 64, 56: 32, 112: 64}
    shapes = {n: [sizes.get(s, s) for s in shape] for n, shape in shapes.items()}
    path = write_folder(tmp_path / "hub", config, shapes) / "model.safetensors"
    rng, tensors = np.random.default_rng(0), {}
    for name, x in load_file(path).items():
        tensors[name] = x.astype(jnp.bfloat16)
        if name.endswith(("gate_up_proj", "down_proj")) and ".experts." in name:
            experts, inputs, outputs = x.shape
            blocks, scales = packed(rng, experts, outputs, inputs)
            del tensors[name]
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(tensors, path)
    return path.parent


def test_gpt_oss(folder):
    """Rows are outputs; gate and up take turns."""
    stored = load_file(folder / "model.safetensors")
    checkpoint = open_foreign(folder)
    assert checkpoint.config.numerics.param_dtype == "bfloat16"
    # Layer 1 is the first of the second block, which is scanned.
    found = parameters(checkpoint)
    experts = {n: found[f"layers/block_1/experts/{n}"][0] for n in ("up", "down")}
    blocks, scales = (stored[f"{LAYER}gate_up_proj_{n}"] for n in ("blocks", "scales"))
    expert, output, column = 2, 2 * 7 + 1, 40
    got = float(experts["up"][expert, column, 7])
    byte = blocks[expert, output, column // 32, column % 32 // 2]
    assert got == by_definition(int(byte), int(scales[expert, output, 1]))[0]
    blocks, scales = (stored[f"{LAYER}down_proj_{n}"] for n in ("blocks", "scales"))
    got = float(experts["down"][3, 11, 50])
    assert got == by_definition(int(blocks[3, 50, 0, 5]), int(scales[3, 50, 0]))[1]


@pytest.mark.parametrize("part", ["blocks", "scales"])
def test_a_part_that_does_not_fit(folder, part):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[f"{LAYER}down_proj_{part}"] = tensors[f"{LAYER}down_proj_{part}"][1:]
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"hub: model.layers.1.*down_proj_blocks has shape .*all"):
        jaxlm.load(folder)


def test_another_quantization(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"quantized by gptq; allowed: mxfp4, float weights, or GG"
    ):
        jaxlm.load(folder)


@pytest.mark.torch
def test_as_transformers_unpacks_it():
    torch = pytest.importorskip("torch")
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = packed(np.random.default_rng(1), 3, 64, 96)
    theirs = convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales))
    np.testing.assert_array_equal(
        dequantize(blocks, scales).astype(np.float32).swapaxes(1, 2), theirs.float().numpy()
    )
