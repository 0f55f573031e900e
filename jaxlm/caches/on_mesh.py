"""A cache on the mesh that `jax.set_mesh` has set: rows along data and fsdp, kv heads along tensor.

What belongs to a row and a head stays on one device: it is made there, written there, and attended
to there. What does not divide evenly, as the one row of a prompt, each device holds whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Int

from jaxlm.caches.kind import CacheKind
from jaxlm.model.config import ModelConfig
from jaxlm.sharding.mesh import dividing_spec, mesh_of_several


def init_cache(kind: CacheKind, config: ModelConfig, batch: int, capacity: int) -> Any:
    """An empty cache, see `CacheKind.init`: no device ever holds more than its part."""
    mesh = mesh_of_several()
    if mesh is None:
        return kind.init(config, batch, capacity)
    return _maker(mesh, kind, config, batch, capacity)()


@functools.cache  # else each request would compile
def _maker(
    mesh: AbstractMesh, kind: CacheKind, config: ModelConfig, batch: int, capacity: int
) -> Callable[[], Any]:
    make = functools.partial(kind.init, config, batch, capacity)
    return jax.jit(make, out_shardings=cache_specs(mesh, jax.eval_shape(make)))


def cache_specs(mesh: AbstractMesh, cache: Any) -> Any:
    """How each array is cut of a `KVCache`, or of a decoder's `CrossedCache`."""
    rows, heads = cache.axes

    def spec(x: Any) -> PartitionSpec:
        return dividing_spec(mesh, (None, rows, heads) if x.ndim > 2 else (rows,), x.shape)

    return jax.tree.map(spec, cache)


def place_prompt(tokens: Any, lengths: Any) -> tuple[Int[Array, "B T"], Int[Array, "B"]]:
    """Prompts where their rows' part of a cache lies."""
    mesh = mesh_of_several()
    if mesh is None:
        return jax.numpy.asarray(tokens), jax.numpy.asarray(lengths)
    rows = dividing_spec(mesh, ("batch",), tokens.shape)
    return jax.device_put((tokens, lengths), rows)


def commit(
    cache: Any,
    kv: tuple[Array, ...],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
) -> Any:
    """`cache.commit` on each device, of its rows and heads: XLA can't cut a loop over rows by
    itself, and would gather all of the cache.
    """
    mesh = mesh_of_several()
    if mesh is None:
        return cache.commit(kv, positions, segment_ids)
    rows, heads = cache.axes
    there = cache_specs(mesh, cache)
    of_kv = jax.tree.map(lambda x: dividing_spec(mesh, (None, rows, None, heads), x.shape), kv)
    of_tokens = dividing_spec(mesh, (rows,), positions.shape)
    write = jax.shard_map(
        lambda cache, *new: cache.commit(*new),
        in_specs=(there, of_kv, of_tokens, of_tokens),
        out_specs=there,
        check_vma=False,  # of loops that write, which do not say along which axes they vary
    )
    return write(cache, kv, positions, segment_ids)
