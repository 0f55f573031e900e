"""To be run on eight devices: logits and gradients of packed rows that a mesh's context axis cuts,
in a form that is the first argument, are those of one device; position encodings (names of
`test_shared.CASES`) are the others. Prints nothing.
"""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.model.transformer import Transformer
from jaxlm.sharding.mesh import MeshConfig, batch_sharding, make_mesh
from tests.positions.test_shared import CASES, LENGTH, make, tokens


def value_and_gradients(model, params, ids, at, segments):
    def loss(params):
        logits, _ = model.apply({"params": params}, ids, at, segments)
        return (jnp.sin(logits) * (segments != 0)[..., None]).sum(), logits

    return jax.value_and_grad(loss, has_aux=True)(params)


def main(form: str, names: list[str]) -> None:
    mesh = make_mesh(MeshConfig(data=2, context=4))
    ids, at = tokens(), np.tile(np.arange(LENGTH, dtype=np.int32), (2, 1))
    segments = np.ones((2, LENGTH), np.int32)
    segments[0, 5:], segments[1, 14:] = 2, 0
    at[0, 5:] -= 5
    rows = batch_sharding(mesh, *ids.shape)
    batch = [jax.device_put(a, rows) for a in (ids, at, segments)]
    for name in names:
        model, params = make(CASES[name])
        wanted = jax.jit(value_and_gradients, static_argnums=0)(model, params, ids, at, segments)
        attention = dataclasses.replace(model.config.attention, implementation=form)
        cut = Transformer(model.config.replace(attention=attention))
        with jax.set_mesh(mesh):
            found = jax.jit(value_and_gradients, static_argnums=0)(cut, params, *batch)
        for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
            # Float32 sums over a row in another order, through two layers and back.
            tolerance = 5e-5 * max(1.0, np.abs(b).max())
            np.testing.assert_allclose(a, b, atol=tolerance, err_msg=f"{form} {name}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
