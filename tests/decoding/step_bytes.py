"""To be run where libtpu imagines a TPU: HBM bytes of a step with each of the caches named."""

import json
import sys

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

import jaxlm
from jaxlm import caches
from jaxlm.decoding.engine import decode
from jaxlm.decoding.history import History
from jaxlm.decoding.sampling import Sampling
from jaxlm.decoding.state import DecodeState
from jaxlm.model.parameters import abstract_params
from launch.aot import hlo_text, traffic
from launch.aot.topology import one_device_mesh

BATCH, CAPACITY, NEW = 8, 32768, 64
MODEL = jaxlm.Transformer(
    jaxlm.ModelConfig(
        vocab_size=512,
        num_layers=2,
        d_model=256,
        context_length=CAPACITY,
        position_encoding="rope",
        attention=jaxlm.AttentionConfig(num_heads=8, head_dim=128),
        numerics=jaxlm.NumericsConfig(dtype="bfloat16", param_dtype="bfloat16"),
    )
)


def state(kind: str) -> DecodeState:
    return DecodeState(
        tokens=jnp.zeros((BATCH, NEW), jnp.int32),
        drawn=jnp.ones(BATCH, jnp.int32),
        lengths=jnp.ones(BATCH, jnp.int32),
        done=jnp.zeros(BATCH, bool),
        cache=caches.parse(kind).init(MODEL.config, BATCH, CAPACITY),
        steps=jnp.zeros((), jnp.int32),
        history=History(None, None, None),
        logprobs=None,
        limit=NEW - 1,
    )


def main(topology: str, kinds: list[str]) -> None:
    mesh = one_device_mesh(topology)
    place = NamedSharding(mesh, PartitionSpec())

    def placed(x: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    # Nothing may run: there is no such device.
    params, sampling = abstract_params(MODEL), jax.eval_shape(lambda: Sampling.make(BATCH))
    rest = (jnp.zeros((), jnp.int32), sampling, jnp.zeros(1, jnp.int32))
    found = {}
    for kind in kinds:
        given = (params, jax.eval_shape(lambda kind=kind: state(kind)), *rest)
        with jax.set_mesh(mesh):
            compiled = decode.lower(MODEL, *jax.tree.map(placed, given)).compile()
        moved = traffic.hbm_bytes(hlo_text.parse(compiled.as_text()))
        found[kind] = (caches.parse(kind).nbytes_of(MODEL.config, BATCH, CAPACITY), moved)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
