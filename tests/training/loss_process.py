"""To be run on four devices: the loss's kernels on meshes that cut rows, their tokens and the head
give the value and the gradients of one device. The kernels' reference stands in for them. Prints
the largest sum that each mesh's devices all get, in numbers, and how many sums they share out.
"""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.sharding.mesh import MeshConfig, batch_sharding, make_mesh
from jaxlm.training.objectives import next_token_on_tpu
from jaxlm.training.objectives.next_token import LossSpec, next_token_loss
from jaxlm.training.objectives.next_token_on_tpu import next_token_loss_on_tpu
from kernels.cross_entropy import TokenLosses, reference
from launch.aot.hlo_text import parse

B, T, D, V = 4, 6, 16, 50
SPEC = LossSpec(chunk=T, softcap=3.0, z_weight=0.1)
MESHES = {
    "data": MeshConfig(data=4),
    "fsdp": MeshConfig(data=1, fsdp=4),
    "both": MeshConfig(data=2, fsdp=2),
    "context": MeshConfig(data=1, fsdp=2, context=2),
}


def kernels(*given, chip, **options):
    del chip
    return TokenLosses(*reference.cross_entropy(*given, **options))


def program(loss, tied):
    """(hidden, matrix, bias, targets, weights) -> value and three gradients."""

    def total(hidden, matrix, bias, targets, weights):
        options = {"tied": True} if tied else {}
        return 3 * loss(SPEC, hidden, matrix, bias, targets, weights, **options)[0]

    return jax.jit(jax.value_and_grad(total, (0, 1, 2)))


def sums(text):
    """(numbers in the largest that all devices get, how many of which each gets a part)."""
    ops = [i for _, i in parse(text).instructions()]
    whole = [x.dims for i in ops if i.opcode == "all-reduce" for x in i.results]
    return max(map(math.prod, whole)), sum(i.opcode == "reduce-scatter" for i in ops)


def main() -> None:
    assert jax.device_count() == 4
    next_token_on_tpu.cross_entropy = kernels
    keys = jax.random.split(jax.random.key(0), 4)
    hidden, matrix = jax.random.normal(keys[0], (B, T, D)), jax.random.normal(keys[1], (D, V))
    bias, targets = jax.random.normal(keys[2], (V,)), jax.random.randint(keys[3], (B, T), 0, V)
    weights = jnp.arange(B * T, dtype=jnp.float32).reshape(B, T) % 3
    rest = bias, targets, weights
    value, (dh, dm, db) = program(next_token_loss, tied=False)(hidden, matrix, *rest)
    found = {}
    for name, config in MESHES.items():
        mesh = make_mesh(config)
        rows = batch_sharding(mesh, B, T)
        for tied in (False, True):
            turn = np.transpose if tied else np.asarray
            cut = NamedSharding(mesh, PartitionSpec(*[None] * tied, "fsdp"))
            places = (rows, cut, NamedSharding(mesh, PartitionSpec()), rows, rows)
            given = jax.device_put((hidden, turn(matrix), *rest), places)
            with jax.set_mesh(mesh):
                compiled = program(next_token_loss_on_tpu, tied).lower(*given).compile()
                results = compiled(*given)
            for a, b in zip(jax.tree.leaves(results), (value, dh, turn(dm), db), strict=True):
                # float32 sums over tokens in another order.
                np.testing.assert_allclose(a, b, rtol=0, atol=5e-6 * np.abs(b).max())
            found[f"{name} {tied}"] = sums(compiled.as_text())
    print(json.dumps(found))


if __name__ == "__main__":
    main()
