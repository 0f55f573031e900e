"""Quantized matrices: near the originals, and the same function wherever they are put together."""

import jax
import numpy as np
import pytest

from jaxlm.adapters.config import AdapterConfig
from jaxlm.adapters.lora import adapted_shardings, add_adapters, merge_adapters
from jaxlm.adapters.quantize import BLOCK, quantize_params
from jaxlm.evaluation.loss import evaluate
from jaxlm.model.config import EmbeddingConfig
from jaxlm.model.parameters import abstract_params, init_params
from jaxlm.model.quantized import MOST_ROWS, contract_quantized
from jaxlm.model.transformer import Transformer
from tests.marks import slow_but
from tests.model.configs import small

# A matrix with a whole number of blocks, one with none; a scanned round and one layer more.
MODEL = Transformer(
    small(
        num_layers=3,
        d_model=2 * BLOCK,
        attention={"head_dim": 12, "layer_pattern": ("global", "global")},
    )
)
TOKENS = jax.device_put(np.random.default_rng(0).integers(0, 29, (2, 9), np.int32))
quantize = jax.jit(quantize_params, static_argnums=(1, 2))
merge = jax.jit(merge_adapters)


@pytest.mark.parametrize("kind", slow_but(["int4"], ["int8", "int4"]))
def test_each_number_is_within_half_a_step_of_its_own(kind):
    params = init_params(MODEL)
    made = quantize(params, kind)
    steps = {"int8": 127, "int4": 7}[kind]
    merged = jax.tree.map(np.asarray, merge(made))
    for block in ("layers", "last_layers"):
        for part, name, inputs in (("attention", "q", 1), ("attention", "out", 2)):
            kernel = np.asarray(params[block]["block_0"][part][name]["kernel"])
            whole = jax.tree.map(np.asarray, made[block]["block_0"][part][name])
            back = merged[block]["block_0"][part][name]["kernel"]
            assert whole["kernel"].dtype == kind
            if block == "layers":
                kernel, back, whole = kernel[0], back[0], jax.tree.map(lambda x: x[0], whole)
            # Rows of inputs that share a scale: all, or blocks of the innermost ones.
            rows = int(np.prod(kernel.shape[:inputs]))
            size = rows if kind == "int8" else {"q": BLOCK, "out": 12}[name]
            blocks = kernel.reshape(rows // size, size, -1)
            largest = np.abs(blocks).max(1)
            ours = np.asarray(whole["kernel_scale"]).reshape(largest.shape)
            # qwix's own range ends half a step further out.
            np.testing.assert_allclose(ours, largest / (steps + 0.5), rtol=1e-6)
            back = back.reshape(blocks.shape)
            assert (np.abs(back - blocks) <= ours[:, None] * 0.5001).all()


# Few rows meet an int8 matrix to 1/64,000 of their largest entry, in each of a dozen products.
ATOL = {"int8": 1e-3, "int4": 1e-4}


@pytest.mark.parametrize("kind", ["int8", pytest.param("int4", marks=pytest.mark.slow)])
def test_the_model_computes_with_the_matrices_put_together(kind):
    config = AdapterConfig(rank=2, dora=True)
    whole = jax.jit(lambda p: add_adapters(MODEL, p, config))(quantize(init_params(MODEL), kind))
    places = adapted_shardings(MODEL, None, whole)
    assert jax.tree.structure(places) == jax.tree.structure(whole)
    run = jax.jit(lambda p: MODEL.apply({"params": p}, TOKENS)[0])
    # A fresh adapter changes nothing; DoRA divides a length by itself.
    merged = merge(whole)
    np.testing.assert_allclose(run(whole), run(merged), atol=ATOL[kind])
    assert jax.tree.structure(merged) == jax.tree.structure(abstract_params(MODEL))


@pytest.mark.parametrize("tied", slow_but([True], [True, False]))
@pytest.mark.parametrize("kind", slow_but(["int8"], ["int8", "int4"]))
def test_tables_are_read_where_they_are_quantized(kind, tied):
    config = MODEL.config.replace(num_layers=1, embedding=EmbeddingConfig(tied=tied))
    model = Transformer(config)
    made = quantize(init_params(model), kind, True)
    again = quantize_params(made, kind, tables=True)
    jax.tree.map(np.testing.assert_array_equal, made, again)
    assert made["embedding"].dtype == kind
    assert tied or made["head"].dtype == kind
    whole = merge(made)
    run = jax.jit(lambda p: model.apply({"params": p}, TOKENS)[0])
    np.testing.assert_allclose(run(made), run(whole), atol=ATOL[kind])
    tokens, ones = np.asarray(TOKENS), np.ones(TOKENS.shape, np.int32)
    batch = {"tokens": tokens, "targets": tokens, "positions": ones * np.arange(9, dtype=np.int32)}
    batch |= {"segment_ids": ones, "loss_weights": ones.astype(np.float32)}
    a, b = (evaluate(model, p, [batch]).loss for p in (made, whole))
    np.testing.assert_allclose(a, b, rtol=ATOL[kind])


@pytest.mark.parametrize("rows", [1, MOST_ROWS, MOST_ROWS + 1])
@pytest.mark.parametrize(
    ("shape", "axes"), [((24, 3, 5), (0,)), ((4, 6, 7), (0, 1)), ((9, 24), (1,))]
)
def test_products_with_an_int8_matrix(rows, shape, axes):
    """Inputs are rounded to 1/508 of 1/127 of the row's largest entry, whatever its size."""
    rng = np.random.default_rng(rows)
    matrix = rng.integers(-128, 128, shape).astype(np.int8)
    scale = rng.uniform(0.1, 2, [1 if i in axes else n for i, n in enumerate(shape)])
    x = rng.normal(size=(rows, *(shape[i] for i in axes)))
    x *= 10.0 ** rng.integers(-6, 7, (rows, *[1] * len(axes)))
    x[0] = 0
    whole = matrix * scale
    last = tuple(range(1, x.ndim))
    want = np.tensordot(x, whole, (last, axes))
    f32 = [a.astype(np.float32) for a in (x, scale)]

    @jax.jit
    def run(x, dy, matrix, scale):
        y, back = jax.vjp(lambda x: contract_quantized(x, matrix, scale, axes), x)
        return y, *back(dy)

    dy = rng.normal(size=want.shape)
    y, dx = run(f32[0], dy.astype(np.float32), matrix, f32[1])
    unit = np.abs(x).max(last) / 127
    most = np.abs(whole).sum(axes)[None] * unit.reshape(rows, *[1] * (want.ndim - 1))
    assert (np.abs(y - want) <= most * (1 / 508 + 1e-5)).all()
    outputs = [i for i in range(len(shape)) if i not in axes]
    dx_want = np.tensordot(dy, whole, (range(1, dy.ndim), outputs))
    np.testing.assert_allclose(dx, dx_want, rtol=1e-4, atol=1e-3)


def test_few_rows_make_no_float_copy_of_an_int8_matrix():
    matrix, scale = np.ones((512, 1024), np.int8), np.ones((1, 1024), np.float32)
    run = jax.jit(lambda x, *w: contract_quantized(x, *w, (0,)))
    few, many = (
        run.lower(np.ones((rows, 512), np.float32), matrix, scale)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        for rows in (2, MOST_ROWS + 1)
    )
    assert few < matrix.size / 8 and many >= 4 * matrix.size


def test_another_kind_is_refused():
    with pytest.raises(ValueError, match="quantize='int3'; allowed: int8, int4"):
        quantize_params({}, "int3")
