"""Quantized matrices: near the originals, and the same function wherever they are put together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.adapters.config import AdapterConfig
from jaxlm.adapters.lora import adapted_shardings, add_adapters, merge_adapters
from jaxlm.adapters.quantize import BLOCK, quantize_params
from jaxlm.model.parameters import init_params
from jaxlm.model.transformer import Transformer
from tests.model.configs import small

# A matrix with a whole number of blocks, one with none; a scanned round and one layer more.
MODEL = Transformer(
    small(
        num_layers=3,
        d_model=2 * BLOCK,
        attention={"head_dim": 12, "layer_pattern": ("global", "global")},
    )
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 29, (2, 9)))


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_each_number_is_within_half_a_step_of_its_own(kind):
    params = init_params(MODEL)
    made = quantize_params(params, kind)
    steps = {"int8": 127, "int4": 7}[kind]
    for block in ("layers", "last_layers"):
        for part, name, inputs in (("attention", "q", 1), ("attention", "out", 2)):
            kernel = np.asarray(params[block]["block_0"][part][name]["kernel"])
            whole = made[block]["block_0"][part][name]
            assert whole["kernel"].dtype == kind
            if block == "layers":
                kernel, whole = kernel[0], jax.tree.map(lambda x: x[0], whole)
            # Rows of inputs that share a scale: all, or blocks of the innermost ones.
            rows = int(np.prod(kernel.shape[:inputs]))
            size = rows if kind == "int8" else {"q": BLOCK, "out": 12}[name]
            blocks = kernel.reshape(rows // size, size, -1)
            largest = np.abs(blocks).max(1)
            ours = np.asarray(whole["kernel_scale"]).reshape(largest.shape)
            # qwix's own range ends half a step further out.
            np.testing.assert_allclose(ours, largest / (steps + 0.5), rtol=1e-6)
            back = merge_adapters(whole)["kernel"].reshape(blocks.shape)
            assert (np.abs(back - blocks) <= ours[:, None] * 0.5001).all()


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_the_model_computes_with_the_matrices_put_together(kind):
    quantized = quantize_params(init_params(MODEL), kind)
    whole = add_adapters(MODEL, quantized, AdapterConfig(rank=2, dora=True))
    places = adapted_shardings(MODEL, None, whole)
    assert jax.tree.structure(places) == jax.tree.structure(whole)
    run = jax.jit(lambda p: MODEL.apply({"params": p}, TOKENS)[0])
    # A fresh adapter changes nothing; DoRA divides a length by itself.
    np.testing.assert_allclose(run(whole), run(merge_adapters(whole)), atol=1e-4)
    assert jax.tree.structure(merge_adapters(whole)) == jax.tree.structure(init_params(MODEL))


def test_another_kind_is_refused():
    with pytest.raises(ValueError, match="quantize='int3'; allowed: int8, int4"):
        quantize_params({}, "int3")
