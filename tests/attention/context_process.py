"""To be run on two devices: attention to parts of rows, in TPU interpret mode, with all gradients,
is that of whole rows by the reference. Prints nothing.
"""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from jaxlm.attention import flash
from jaxlm.attention import mask as masks
from jaxlm.attention.flash import attend_flash
from jaxlm.attention.inputs import AttentionInputs, AttentionSpec
from jaxlm.attention.reference import attend_reference
from jaxlm.sharding.mesh import MeshConfig, make_mesh

B, T, N, K, H = 2, 256, 2, 1, 64


def slope(parameter, scores, distance, q_positions):
    return scores - parameter * distance.astype(jnp.float32) / 64


# Two documents or padding in a row: Λ with a learned bias and other keys for sinks, and learned
# sink logits.
SPECS = {
    "lambda": AttentionSpec(
        masks.lambda_shaped(128, 3),
        0.125,
        score=slope,
        score_form="bias",
        ceiling=128,
        aligned=True,
    ),
    "causal": AttentionSpec(masks.causal(), 0.125, softcap=3.0, aligned=True),
}


def inputs(spec):
    ids, at = np.ones((B, T), np.int32), np.tile(np.arange(T, dtype=np.int32), (B, 1))
    ids[0, 40:], ids[1, T - 10 :] = 2, 0
    at[0, 40:] -= 40
    x = drawn(spec, ids, at, N, K, H)
    return x if spec.score is None else dataclasses.replace(x, sink_logits=None)


def drawn(spec, ids, at, num_heads, num_kv_heads, head_dim):
    """Inputs of tokens with these segments and positions [B, T]; sink logits, and what the spec's
    score asks for.
    """
    keys = jax.random.split(jax.random.key(0), 7)
    queries, cached = (*ids.shape, num_heads, head_dim), (*ids.shape, num_kv_heads, head_dim)
    q, q_far = (jax.random.normal(key, queries) for key in keys[:2])
    k, k_far, v = (jax.random.normal(key, cached) for key in keys[2:5])
    sinks = jax.random.normal(keys[5], (num_heads,))
    x = AttentionInputs(q, k, v, *map(jnp.asarray, (at, at, ids, ids)), sink_logits=sinks)
    if spec.score is None:
        return x
    slopes = jax.random.normal(keys[6], (num_heads,))
    return dataclasses.replace(x, head_parameters=slopes, q_far=q_far, k_far=k_far)


TRAINED = ("q", "k", "v", "q_far", "k_far", "head_parameters", "sink_logits")


def values_and_gradients(attend, spec, x):
    def loss(given):
        out, lse = attend(spec, dataclasses.replace(x, **given))
        real = (x.q_segment_ids != 0)[..., None]
        return (out * jnp.cos(out)).sum() + jnp.where(real, lse, 0.0).sum(), (out, lse)

    given = {name: a for name in TRAINED if (a := getattr(x, name)) is not None}
    return jax.value_and_grad(loss, has_aux=True)(given)


def main(name: str) -> None:
    assert jax.device_count() == 2
    flash.target_chip = lambda: "v5e"
    mesh, spec = make_mesh(MeshConfig(context=2)), SPECS[name]
    x = inputs(spec)
    wanted = values_and_gradients(attend_reference, spec, x)
    interpret = pltpu.InterpretParams(uninitialized_memory="nan")
    with jax.set_mesh(mesh), pltpu.force_tpu_interpret_mode(interpret):
        program = jax.jit(lambda x: values_and_gradients(attend_flash, spec, x))
        assert f"f32[{B},{N},{T // 2},{H}]" in str(jax.make_jaxpr(program)(x))
        found = program(x)
    for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        # float32 sums of 256 terms, of the slopes' gradient of 256² terms, in another order.
        tolerance = 2e-5 * max(1.0, np.abs(b).max())
        np.testing.assert_allclose(a, b, atol=tolerance)


if __name__ == "__main__":
    main(sys.argv[1])
