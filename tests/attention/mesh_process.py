"""To be run on eight devices: blockwise attention of rows, heads and queries that a mesh cuts, with
all gradients, is the reference's of the whole; and devices exchange no more than they must. Prints
each mesh's collectives as JSON.
"""

import json
import re

import jax
import numpy as np

from jaxlm.attention import mask as masks
from jaxlm.attention.blockwise import attend_blockwise
from jaxlm.attention.blockwise_tiles import Blocks
from jaxlm.attention.inputs import AttentionSpec
from jaxlm.attention.reference import attend_reference
from jaxlm.sharding.mesh import MeshConfig, batch_sharding, make_mesh
from tests.attention.context_process import drawn, slope, values_and_gradients

B, T, N, K, H = 8, 32, 4, 2, 8
SPECS = {
    "lambda": AttentionSpec(
        masks.lambda_shaped(12, 3),
        0.35,
        score=slope,
        score_form="bias",
        ceiling=12,
        aligned=True,
    ),
    "causal": AttentionSpec(masks.causal(), 0.35, softcap=3.0, aligned=True),
}
MESHES = {
    "data": MeshConfig(data=8),
    "tensor": MeshConfig(data=2, fsdp=2, tensor=2),
    "context": MeshConfig(data=2, context=4),
    "uneven": MeshConfig(data=1, tensor=8),  # two heads for eight devices: all of them do all
}


def inputs(spec):
    ids, at = np.ones((B, T), np.int32), np.tile(np.arange(T, dtype=np.int32), (B, 1))
    ids[::2, 10:], ids[1, T - 5 :] = 2, 0
    at[::2, 10:] -= 10
    return drawn(spec, ids, at, N, K, H)


def attend(spec, x):
    return attend_blockwise(spec, x, Blocks(8, 8))


def main() -> None:
    assert jax.device_count() == 8
    found = {}
    for name, config in MESHES.items():
        mesh = make_mesh(config)
        for kind, spec in SPECS.items():
            x = inputs(spec)
            wanted = values_and_gradients(attend_reference, spec, x)
            rows = batch_sharding(mesh, B, T)

            def placed(a, rows=rows):
                return jax.device_put(a, rows) if a.shape[:2] == (B, T) else a

            with jax.set_mesh(mesh):
                program = jax.jit(lambda x, spec=spec: values_and_gradients(attend, spec, x)).lower(
                    jax.tree.map(placed, x)
                )
                compiled = program.compile()
                given = compiled(jax.tree.map(placed, x))
            jax.tree.map(
                # Float32 sums over the keys of a row in another order.
                lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5),
                given,
                wanted,
            )
            text = compiled.as_text()
            found[f"{name} {kind}"] = sorted(set(re.findall(r" (all-\w+|reduce-scatter)\(", text)))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
