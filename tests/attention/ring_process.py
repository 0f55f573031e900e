"""To be run on eight devices: attention to rows that a mesh's context axis cuts, in a form that is
the argument, with all gradients, is the reference's of the whole. Prints what is exchanged and how
often, by mask, as JSON.
"""

import collections
import dataclasses
import functools
import json
import re
import sys

import jax
import numpy as np

from jaxlm.attention import mask as masks
from jaxlm.attention.blockwise import attend_blockwise
from jaxlm.attention.context import FORMS, attend_over_context
from jaxlm.attention.inputs import AttentionSpec
from jaxlm.attention.reference import attend_reference
from jaxlm.sharding.mesh import MeshConfig, batch_sharding, make_mesh
from tests.attention.context_process import drawn, slope, values_and_gradients

B, T, N, K, H = 2, 64, 8, 2, 8
EXCHANGES = r" (all-[\w-]+|reduce-scatter|collective-permute)(?:-start)?\("


def shaped(window, num_sinks):
    """Λ, with other keys and a clamped distance beyond the window."""
    mask = masks.lambda_shaped(window, num_sinks)
    return AttentionSpec(mask, 0.35, score=slope, score_form="bias", ceiling=window, aligned=True)


SPECS = {
    "causal": AttentionSpec(masks.causal(), 0.35, softcap=3.0, aligned=True),
    "in no order": AttentionSpec(masks.causal(), 0.35, score=slope, score_form="slope"),
    "prefix": AttentionSpec(masks.prefix(5), 0.35, aligned=True),
    "sliding": AttentionSpec(masks.sliding_window(9), 0.35, aligned=True),
    "lambda": shaped(9, 3),
    "lambda, two parts back": shaped(24, 3),
    "lambda, all parts": shaped(60, 3),
}

# Where a device has whole rows, how far a mask reaches changes nothing.
WHOLE_ROWS = ("causal", "in no order", "lambda")


def tokens(in_order):
    """A row of three documents, of which the second begins with a sink at the end of a part, and
    one that ends in padding.
    """
    ids, at = np.ones((B, T), np.int32), np.tile(np.arange(T, dtype=np.int32), (B, 1))
    for start, number in ((14, 2), (53, 3)):
        ids[0, start:] = number
        at[0, start:] = np.arange(T - start)
    ids[1, T - 5 :] = 0
    if not in_order:
        order = np.random.default_rng(0).permutation(T)
        ids, at = ids[:, order], at[:, order]
    return ids, at


def main(form: str) -> None:
    mesh = make_mesh(MeshConfig(data=2, context=4))
    rows, attend = batch_sharding(mesh, B, T), functools.partial(attend_over_context, form)

    def placed(a):
        return jax.device_put(a, rows) if a.shape[:2] == (B, T) else a

    found = {}
    for name in SPECS if form == "ring" else WHOLE_ROWS:
        spec = SPECS[name]
        x = drawn(spec, *tokens(spec.aligned), N, K, H)
        wanted = values_and_gradients(attend_reference, spec, x)
        program = jax.jit(functools.partial(values_and_gradients, attend, spec))
        with jax.set_mesh(mesh):
            compiled = program.lower(x := jax.tree.map(placed, x)).compile()
            given = compiled(x)
        for a, b in zip(*map(jax.tree.leaves, (given, wanted)), strict=True):
            # Float32 sums over the keys of a row, and over its pairs, in another order.
            tolerance = 2e-5 * max(1.0, np.abs(b).max())
            np.testing.assert_allclose(a, b, atol=tolerance, err_msg=f"{form} {name}")
        found[name] = collections.Counter(re.findall(EXCHANGES, compiled.as_text()))
    if form == "ring":
        found["bytes"] = {each: temporaries(each) for each in ("gathered", form)}
    print(json.dumps(found))


def temporaries(form):
    """On each device, of a long causal row and its gradients."""
    mesh, shape = make_mesh(MeshConfig(data=1, context=8)), (1, 64 * T)
    at = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    whole = dataclasses.replace(
        drawn(SPECS["causal"], np.ones_like(at), at, N, N, 64), sink_logits=None
    )
    rows = batch_sharding(mesh, *shape)
    attend = functools.partial(attend_over_context, form) if form in FORMS else attend_blockwise
    x = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=rows), whole)
    with jax.set_mesh(mesh):
        program = jax.jit(functools.partial(values_and_gradients, attend, SPECS["causal"]))
        return program.lower(x).compile().memory_analysis().temp_size_in_bytes


if __name__ == "__main__":
    main(sys.argv[1])
