"""A kernel or a loop on a mesh: each device runs it for its rows and its heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array

from jaxlm.attention.inputs import AttentionInputs
from jaxlm.sharding.mesh import dividing_spec, mesh_of_several

Axes = tuple[str | None, ...]  # logical names of an array's first axes


def on_mesh(
    kernel: Callable[..., Any],
    sizes: Mapping[str, int],
    inputs: Sequence[Axes],
    outputs: Sequence[Axes],
) -> Callable[..., Any]:
    """The kernel for each device of the mesh that `jax.set_mesh` has set: XLA can't cut a kernel by
    itself, nor a loop along what it loops over. What does not divide evenly, as the one row of a
    prompt, is the work of each device.

    Args:
        kernel: of positional arrays, or None in the place of one, to a tuple of arrays.
        sizes: of the logical axes that occur, see `jaxlm.sharding.mesh.RULES`; or by what a part is
            a multiple of.
        inputs, outputs: of each array.
    """
    mesh = mesh_of_several()
    if mesh is None:
        return kernel

    def specs(arrays: Sequence[Axes]) -> tuple[PartitionSpec, ...]:
        return tuple(
            dividing_spec(mesh, axes, [1 if n is None else sizes[n] for n in axes])
            for axes in arrays
        )

    return jax.shard_map(
        kernel,
        in_specs=specs(inputs),
        out_specs=specs(outputs),
        check_vma=False,  # pallas_call does not say along which axes its results vary
    )


def attend_on_mesh(
    attend: Callable[[AttentionInputs], tuple[Array, Array]],
    x: AttentionInputs,
    axes: Mapping[str, Axes],
) -> tuple[Array, Array]:
    """Attention of each device's part of `x`, see `on_mesh`; outputs are cut as queries are.

    Args:
        attend: of a part to output and log-sum-exp.
        x: the whole.
        axes: of its fields; what is not there is a head's, along "kv_heads".
    """
    arrays, structure = jax.tree.flatten(x)
    fields = (path[0].name for path, _ in jax.tree_util.tree_leaves_with_path(x))

    def here(*parts: Array) -> tuple[Array, Array]:
        return attend(jax.tree.unflatten(structure, parts))

    sizes = {"batch": x.q.shape[0], "kv_heads": x.k.shape[2], "length": x.q.shape[1]}
    cut = [axes.get(field, ("kv_heads",)) for field in fields]
    return on_mesh(here, sizes, cut, [axes["q"]] * 2)(*arrays)
