"""Tensors of a checkpoint into a model's parameters, one at a time."""

from __future__ import annotations

import functools
import itertools
import re
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

# Masks and tables of angles that older files hold beside the parameters; a tied head's copy.
BUFFERS = re.compile(r"\.(attn|attention)\.(masked_)?bias$|rotary_emb\.inv_freq$")
TIED_HEAD = re.compile(r"^(\w+\.)?(lm_head|embed_out)\.weight$")


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
    """One tensor: its row, its name there, the parameters' paths, and where on their axes of
    layers and experts.
    """

    row: Row
    name: str
    paths: tuple[str, ...]
    at: tuple[int, ...]


def places(config: ModelConfig, rows: list[Row]) -> list[Place]:
    """Where every tensor of a model belongs."""
    found = []
    experts = 0 if config.moe is None else config.moe.num_experts
    for row in rows:
        numbers: dict[str, range] = {}
        if "{layer}" in row.theirs:
            numbers["layer"] = range(config.num_layers)
        if "{expert}" in row.theirs:
            numbers["expert"] = range(experts)
        for values in itertools.product(*numbers.values()):
            at = dict(zip(numbers, values, strict=True))
            name, folder = row.theirs.format(**at), ""
            index: list[int] = []
            if "layer" in at:
                block, scanned = block_of(config, at["layer"])
                folder, index = f"{block}/", [] if scanned is None else [scanned]
            index += [at["expert"]] if "expert" in at else []
            paths = tuple(folder + path for path in row.paths)
            found.append(Place(row, name, paths, tuple(index)))
    return found


def read_params(tensors: Tensors, model: Transformer, rows: list[Row]) -> dict[str, Any]:
    """The model's parameters.

    Shapes are checked before anything is read; then each tensor is read, laid out and put into its
    parameter, so that the host holds one tensor at a time.

    Raises:
        ValueError: a tensor is missing, has another shape, or is none of the model's.
    """
    like = {
        "/".join(k.key for k in path): s
        for path, s in jax.tree_util.tree_leaves_with_path(abstract_params(model))
    }
    found = places(model.config, rows)
    _check(tensors, like, found)
    params: dict[str, Array] = {}
    for row, name, paths, at in found:
        shapes = [like[p].shape[len(at) :] for p in paths]
        for path, part in zip(paths, row.to_ours(tensors.read(name), shapes), strict=True):
            shape, dtype = like[path].shape, like[path].dtype
            if not at:
                params[path] = jnp.asarray(part, dtype)
                continue
            if path not in params:
                params[path] = jnp.zeros(shape, dtype)
            params[path] = _put(params[path], np.asarray(part, dtype), np.asarray(at, np.int32))
    return _nested(params)


@functools.partial(jax.jit, donate_argnums=0)
def _put(whole: Float[Array, "*W"], part: Float[Array, "*P"], at: Int[Array, "A"]) -> Array:
    """A layer's parameter, or an expert's of a layer, into those of all."""
    start = [*at, *(0 for _ in range(part.ndim))]
    return jax.lax.dynamic_update_slice(whole, part[(None,) * at.size], start)


def _check(tensors: Tensors, like: Mapping[str, Any], found: list[Place]) -> None:
    wanted = {
        name: row.their_shape([like[p].shape[len(at) :] for p in paths])
        for row, name, paths, at in found
    }
    missing = [n for n in wanted if n not in tensors.shapes]
    if missing:
        raise ValueError(f"{tensors.name}: no tensor {missing[0]} ({len(missing)} are missing)")
    for name, shape in wanted.items():
        if tensors.shapes[name] != shape:
            raise ValueError(
                f"{tensors.name}: {name} has shape {list(tensors.shapes[name])}; "
                f"allowed: {list(shape)}, by its config"
            )
    unknown = [n for n in sorted(tensors.shapes.keys() - wanted.keys()) if not BUFFERS.search(n)]
    if "head" not in like:
        unknown = [n for n in unknown if not TIED_HEAD.search(n)]
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
