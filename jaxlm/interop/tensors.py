"""Tensors of a checkpoint into a model's parameters, one at a time."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlm.interop.rows import Row
from jaxlm.model.config import ModelConfig
from jaxlm.model.parameters import abstract_params
from jaxlm.model.transformer import Transformer


@runtime_checkable
class Tensors(Protocol):
    """Named arrays on a disk.

    Attributes:
        name: where they are, for errors.
        shapes: of each tensor, known before any is read.
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]]

    def read(self, name: str) -> np.ndarray:
        """One tensor, in a floating-point dtype."""
        ...


def block_of(config: ModelConfig, layer: int) -> tuple[str, int | None]:
    """Where a layer's parameters are: the block's path, and its index on the scanned axis."""
    period = len(config.attention.layer_pattern)
    scanned = config.num_layers // period * period if config.numerics.scan_layers else 0
    if layer < scanned:
        return f"layers/block_{layer % period}", layer // period
    return f"last_layers/block_{layer - scanned}", None


class Place(NamedTuple):
    """One tensor: its row, its name there, the parameter's path, and where on the scanned axis."""

    row: Row
    name: str
    path: str
    at: int | None


def places(config: ModelConfig, rows: list[Row]) -> list[Place]:
    """Where every tensor of a model belongs."""
    found = []
    for row in rows:
        if not row.per_layer:
            found.append(Place(row, row.theirs, row.ours, None))
            continue
        for layer in range(config.num_layers):
            block, index = block_of(config, layer)
            found.append(Place(row, row.theirs.format(layer=layer), f"{block}/{row.ours}", index))
    return found


def read_params(tensors: Tensors, model: Transformer, rows: list[Row]) -> dict[str, Any]:
    """The model's parameters.

    Shapes are checked before anything is read; then each tensor is read, laid out and put into its
    parameter, so that the host holds one tensor at a time.

    Raises:
        ValueError: a tensor is missing, has another shape, or is none of the model's.
    """
    shapes = {
        "/".join(k.key for k in path): s
        for path, s in jax.tree_util.tree_leaves_with_path(abstract_params(model))
    }
    found = places(model.config, rows)
    _check(tensors, shapes, found)
    params: dict[str, Array] = {}
    for row, name, path, index in found:
        shape, dtype = shapes[path].shape, shapes[path].dtype
        if index is None:
            params[path] = jnp.asarray(row.to_ours(tensors.read(name), shape), dtype)
            continue
        if path not in params:
            params[path] = jnp.zeros(shape, dtype)
        part = row.to_ours(tensors.read(name), shape[1:])
        params[path] = _put(params[path], np.asarray(part, dtype), index)
    return _nested(params)


@functools.partial(jax.jit, donate_argnums=0)
def _put(whole: Float[Array, "L *S"], part: Float[Array, "*S"], index: Int[Array, ""]) -> Array:
    """The layer's parameter into those of all."""
    return jax.lax.dynamic_update_index_in_dim(whole, part, index, 0)


def _check(tensors: Tensors, shapes: Mapping[str, Any], found: list[Place]) -> None:
    wanted = {}
    for row, name, path, index in found:
        shape = shapes[path].shape
        wanted[name] = row.their_shape(shape if index is None else shape[1:])
    missing = [n for n in wanted if n not in tensors.shapes]
    if missing:
        raise ValueError(f"{tensors.name}: no tensor {missing[0]} ({len(missing)} are missing)")
    for name, shape in wanted.items():
        if tensors.shapes[name] != shape:
            raise ValueError(
                f"{tensors.name}: {name} has shape {list(tensors.shapes[name])}; "
                f"allowed: {list(shape)}, by its config"
            )
    unknown = sorted(tensors.shapes.keys() - wanted.keys())
    if unknown:
        raise ValueError(
            f"{tensors.name}: {len(unknown)} tensors that the model has no place for, "
            f"such as {unknown[0]}"
        )


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *folders, last = path.split("/")
        here = tree
        for folder in folders:
            here = here.setdefault(folder, {})
        here[last] = value
    return tree
