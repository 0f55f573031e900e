"""A family that is added by one file: its checkpoints load, run, and are written back."""

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxlm
from jaxlm.interop import families
from jaxlm.interop.write import write_hub_folder
from tests.interop.example_family import FAMILY
from tests.interop.test_families import write_folder
from tests.interop.weights import draw

CONFIG = {
    "architectures": ["ExampleForCausalLM"],
    "vocab_size": 97,
    "vocab": 97,
    "depth": 2,
    "width": 24,
    "block_size": 64,
    "heads": 3,
    "hidden": 40,
    "act": "silu",
}
SHAPES = {"wte": (97, 24), "norm": (24,)}
for i in range(2):
    SHAPES |= {f"blocks.{i}.norm1": (24,), f"blocks.{i}.norm2": (24,)}
    SHAPES |= {f"blocks.{i}.qkv": (72, 24), f"blocks.{i}.proj": (24, 24)}
    SHAPES |= {f"blocks.{i}.gate": (40, 24), f"blocks.{i}.up": (40, 24)}
    SHAPES[f"blocks.{i}.down"] = (24, 40)


def by_hand(tokens):
    """The logits, in NumPy, from the file's tensors."""
    w = {name: draw(name, shape) for name, shape in SHAPES.items()}

    def norm(x, scale):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale

    x, T = w["wte"][tokens], len(tokens)
    distance = np.arange(T)[:, None] - np.arange(T)
    slopes = 2.0 ** (-8 * np.arange(1, 3) / 2), 2.0 ** (-8 * np.arange(1, 5) / 4)
    slopes = np.concatenate([slopes[0], slopes[1][::2]])[:3]  # of three heads (Press et al.)
    for i in range(2):
        y = norm(x, w[f"blocks.{i}.norm1"])
        q, k, v = (w[f"blocks.{i}.qkv"] @ y.T).reshape(3, 3, 8, T)
        scores = np.einsum("nht,nhs->nts", q, k) / np.sqrt(8) - slopes[:, None, None] * distance
        p = np.exp(np.where(distance >= 0, scores, -np.inf))
        heads = np.einsum("nts,nhs->tnh", p / p.sum(-1, keepdims=True), v)
        x = x + heads.reshape(T, 24) @ w[f"blocks.{i}.proj"].T
        y = norm(x, w[f"blocks.{i}.norm2"])
        gate, up = y @ w[f"blocks.{i}.gate"].T, y @ w[f"blocks.{i}.up"].T
        x = x + gate / (1 + np.exp(-gate)) * up @ w[f"blocks.{i}.down"].T
    return norm(x, w["norm"]) @ w["wte"].T


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, FAMILY))
    return write_folder(tmp_path / "hub", CONFIG, SHAPES)


def test_it_loads_and_is_written_back(folder, tmp_path):
    model, params, tokenizer = jaxlm.load(folder)
    tokens = np.arange(2, 14)
    logits, _ = model.apply({"params": params}, jnp.asarray(tokens, jnp.int32)[None])
    # float32 here, float64 there, over two layers.
    np.testing.assert_allclose(logits[0], by_hand(tokens), atol=1e-4)
    out = tmp_path / "out"
    assert write_hub_folder(out, model, params, tokenizer) == "ExampleForCausalLM"
    written = load_file(out / "model.safetensors")
    assert written.keys() == SHAPES.keys()
    for name, x in written.items():
        np.testing.assert_array_equal(x, draw(name, SHAPES[name]))
