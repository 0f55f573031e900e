"""Devices as a named grid, and which axis of an array lies along which axis of the grid.

Every parameter names its axes by what they mean ("embed", "mlp", "heads", …); one table maps those
names to mesh axes. A mesh axis of size 1 costs nothing, so one table serves a laptop and a pod:

    data     each device reads other rows; parameters are copied
    fsdp     the same for rows, and parameters are cut along "embed", gathered layer by layer
    context  each device has a part of every row's tokens; attention gathers keys and values, or as
             `jaxlm.attention.context` says; parameters are copied, so long rows of large models
             take fsdp too
    tensor   heads, MLP columns and vocabulary are cut; activations are exchanged

Each device of fsdp gets its own part of the sum of a gradient, by a reduce-scatter, where they lie
along one axis of the chips' grid, as data=16, fsdp=16 on v5e:16x16. Over more axes (fsdp=256 there)
libtpu 0.0.42 sums by all-reduces and slices, even a sum that is written as `psum_scatter`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxlm.config import at_least, check, check_types

CONTEXT = "context"
AXES = ("data", "fsdp", CONTEXT, "tensor")
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "length": CONTEXT,
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "vocab": "tensor",
    "expert": None,
    "layers": None,
    "head_dim": None,
    "norm": None,
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; data=0 takes all devices that the others leave."""

    data: int = 0
    fsdp: int = 1
    context: int = 1
    tensor: int = 1

    def __post_init__(self):
        check_types(type(self), vars(self), "mesh")
        check(
            "mesh",
            data=at_least(self.data, 0),
            fsdp=at_least(self.fsdp, 1),
            context=at_least(self.context, 1),
            tensor=at_least(self.tensor, 1),
        )


def make_mesh(config: MeshConfig) -> Mesh:
    """The mesh over all devices.

    Raises:
        ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.device_count()
    inner = config.fsdp * config.context * config.tensor
    data = config.data or max(devices // inner, 1)
    if data * inner != devices:
        raise ValueError(
            f"mesh: data={data} × fsdp={config.fsdp} × context={config.context} × "
            f"tensor={config.tensor} = {data * inner}; allowed: sizes whose product is the number "
            f"of devices, {devices}"
        )
    sizes = data, config.fsdp, config.context, config.tensor
    return mesh_over(dict(zip(AXES, sizes, strict=True)), jax.devices())


def mesh_over(axes: Mapping[str, int], devices: Sequence[Any]) -> Mesh:
    """Devices as a grid of named axes, of which neighbours are near one another.

    Args:
        axes: sizes, whose product is the number of devices.
    """
    names, sizes = tuple(axes), tuple(axes.values())
    types = (jax.sharding.AxisType.Auto,) * len(axes)
    try:
        return jax.make_mesh(sizes, names, types, devices=devices)
    except NotImplementedError:
        # Two of our axes share one of the chips' grid, as 2 and 8 do on 4x4: JAX wants to be asked.
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return Mesh(grid, names, axis_types=types)


def batch_sharding(mesh: Mesh | AbstractMesh, batch_size: int, length: int) -> NamedSharding:
    """Rows over data and fsdp, their tokens over context.

    Raises:
        ValueError: the rows, or their tokens, cannot be shared out evenly.
    """
    shards = math.prod(mesh.shape[a] for a in ("data", "fsdp"))
    if batch_size % shards:
        raise ValueError(f"batch_size={batch_size}; allowed: a multiple of data × fsdp = {shards}")
    parts = mesh.shape[CONTEXT]
    if length % parts:
        raise ValueError(f"sequence_length={length}; allowed: a multiple of context = {parts}")
    return NamedSharding(mesh, PartitionSpec(RULES["batch"], CONTEXT))


def local_rows(sharding: NamedSharding, batch_size: int, length: int) -> tuple[int, ...]:
    """The rows of a batch that this process's devices hold, ascending."""
    places: Any = sharding.addressable_devices_indices_map((batch_size, length)).values()
    return tuple(sorted({row for rows, _ in places for row in range(batch_size)[rows]}))


def place_rows(
    local: np.ndarray, rows: Sequence[int], batch_size: int, sharding: NamedSharding
) -> jax.Array:
    """A batch on the devices of all processes.

    Args:
        local: [rows, length], of which this process has read `rows`, see `local_rows`.
        batch_size: of all processes.
        sharding: see `batch_sharding`.
    """

    shape = (batch_size, local.shape[1])

    def part(index: Any) -> np.ndarray:
        first, last, _ = index[0].indices(batch_size)
        at = rows.index(first)
        return local[at : at + last - first, index[1]]

    places = sharding.addressable_devices_indices_map(shape)
    parts = [jax.device_put(part(index), device) for device, index in places.items()]
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def dividing_axes(mesh: Mesh | AbstractMesh, logical: str, size: int) -> tuple[str, ...]:
    """The axes of the mesh along which `RULES` cut a dimension of this size; none where it does not
    divide evenly, as the one row of a prompt: then each device holds it whole.
    """
    rule = RULES[logical] or ()
    names = (rule,) if isinstance(rule, str) else rule
    present = tuple(name for name in names if name in mesh.shape)
    return present if size % math.prod(mesh.shape[name] for name in present) == 0 else ()


def dividing_spec(
    mesh: Mesh | AbstractMesh, logical: Sequence[str | None], sizes: Sequence[int]
) -> PartitionSpec:
    """How an array is cut along its first axes, each named as in `RULES`, see `dividing_axes`."""
    axes = zip(logical, sizes, strict=False)
    return PartitionSpec(*(None if n is None else dividing_axes(mesh, n, size) for n, size in axes))


def mesh_of_several() -> AbstractMesh | None:
    """The mesh that `jax.set_mesh` has set, where it is of more than one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def parameter_sharding(
    mesh: Mesh | AbstractMesh, name: str, axes: PartitionSpec, shape: tuple[int, ...]
) -> NamedSharding:
    """The sharding of one parameter by `RULES`.

    Args:
        mesh: the mesh.
        name: for the error.
        axes: logical names, see `jaxlm.model.parameters.logical_axes`.
        shape: of the parameter.

    Raises:
        ValueError: an axis that its mesh axis does not divide, with both numbers.
    """
    placed = [RULES[axis] if axis is not None else None for axis in axes]
    for logical, axis, size in zip(axes, placed, shape, strict=True):
        count = mesh.shape[axis] if isinstance(axis, str) else 1
        if size % count:
            raise ValueError(
                f"parameter {name}: {logical}={size} over mesh axis {axis}={count}; "
                f"allowed: a divisor of {size}"
            )
    return NamedSharding(mesh, PartitionSpec(*placed))
