"""Which position encodings decode by the kernel, and that they do it right."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import positions
from jaxlm.caches.dense import DenseCache
from jaxlm.model.layouts import unroll_layers
from jaxlm.model.parameters import abstract_params
from jaxlm.model.transformer import Transformer
from tests.marks import slow_but
from tests.positions.test_shared import CASES as SHARED
from tests.positions.test_shared import LENGTH, bare, make, tokens

LAMBDA = "window=6, num_sinks=2"
CASES = SHARED | {
    "lm_infinite_ceiling": f"lm_infinite(rope, {LAMBDA}, ceiling_distance=9)",
    "lm_infinite_yarn": f"lm_infinite(rope(scaling=yarn(factor=2, original_length=8)), {LAMBDA})",
    "lm_infinite_t5": f"lm_infinite(t5, {LAMBDA})",
    "lm_infinite_rope_alibi": f"lm_infinite(rope_alibi, {LAMBDA}, ceiling_distance=9)",
    "lm_infinite_without_sinks": "lm_infinite(rope, window=6, num_sinks=0)",
    "lm_infinite_without_mask": f"lm_infinite(rope, {LAMBDA}, mask=False)",
}
# Keys that turn with the context's length, scores that are multiplied, far keys without number.
OTHER_FORM = {
    "xpos",
    "lm_infinite_xpos",
    "rope_dynamic_ntk",
    "rope_longrope",
    "rope_alibi_multiplicative",
    "lm_infinite_without_mask",
}
IN_EVERY_RUN = ["fire", "lm_infinite_rope_alibi"]
NEW = 2


@functools.cache
def rows():
    """Ids, positions and segments; the second row begins with padding."""
    pad = jnp.array([[0], [3]])
    slots = jnp.arange(LENGTH)[None]
    return jnp.asarray(tokens()), jnp.maximum(slots - pad, 0), (slots >= pad).astype(jnp.int32)


def unrolled(model):
    """Without a loop over layers: Flax takes the interpreter's side effects for a dependence."""
    numerics = dataclasses.replace(model.config.numerics, scan_layers=False)
    return Transformer(model.config.replace(numerics=numerics))


@pytest.mark.parametrize("case", slow_but(positions.available(), CASES))
def test_which_of_them_use_the_kernel(on_tpu, case):
    model = unrolled(bare(CASES[case]))
    cache = DenseCache.init(model.config, 2, LENGTH + 3)
    new = [a[:, -NEW:] for a in rows()]

    def step(params):
        return model.apply({"params": params}, *new, cache)[0]

    jaxpr = jax.make_jaxpr(step)(abstract_params(model))
    assert ("pallas_call" in str(jaxpr)) == (case not in OTHER_FORM)


@pytest.mark.parametrize(
    "case",
    slow_but(IN_EVERY_RUN, [case for case in CASES if case not in OTHER_FORM]),
)
def test_the_kernel_agrees_with_a_full_forward(on_tpu, case):
    scanned, params = make(CASES[case])
    model, params = unrolled(scanned), unroll_layers(scanned.config, params)
    ids, at, segments = rows()
    cache = DenseCache.init(model.config, 2, LENGTH + 3)

    run = jax.jit(lambda params, *arrays: model.apply({"params": params}, *arrays))
    step = functools.partial(run, params)

    seen, new = slice(None, -NEW), slice(-NEW, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxlm.attention.decode.target_chip", lambda: None)
        _, cache = step(ids[:, seen], at[:, seen], segments[:, seen], cache)
    found, _ = step(ids[:, new], at[:, new], segments[:, new], cache)
    wanted, _ = step(ids, at, segments)
    # float32 sums in another order.
    np.testing.assert_allclose(found, wanted[:, new], rtol=2e-5, atol=2e-5)
