"""Tensors of a checkpoint into a model's parameters, one at a time."""

from __future__ import annotations

import collections
import functools
import itertools
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, Float, Int

from jaxlm.interop.rows import Row, Shape
from jaxlm.model.config import ModelConfig
from jaxlm.model.encoder_decoder import EncoderDecoderConfig
from jaxlm.model.layouts import num_scanned
from jaxlm.model.parameters import Model, abstract_params, parameter_shardings

# Masks, tables of angles and numbers of positions that older files hold beside the parameters; what
# only BERT's next-sentence prediction used; T5's copies of its embedding, and a bias that it left
# unused; a tied head's copy; GGUF's divisors of angles, which are in the config by then.
BUFFERS = re.compile(
    r"\.(attn|attention)\.(masked_)?bias$|rotary_emb\.inv_freq$|(^|\.)embeddings\.position_ids$"
    r"|^(\w+\.)?pooler\.dense\.|^cls\.seq_relationship\."
    r"|^(encoder|decoder)\.embed_tokens\.weight$|EncDecAttention\.relative_attention_bias\.weight$"
    r"|^rope_(freqs|factors_long|factors_short)\.weight$|\.attn_rot_embd\.weight$"
)
TIED_HEAD = re.compile(
    r"^(\w+\.)?(lm_head|embed_out)\.weight$|^(lm_head|cls\.predictions)\.decoder\.(weight|bias)$"
)

# What a parameter may be stored as; float64 is rounded.
DTYPES = ("float32", "bfloat16", "float16", "float64")


@runtime_checkable
class Tensors(Protocol):
    """Named arrays on a disk.

    Attributes:
        name: where they are, for errors.
        shapes, dtypes: of each tensor, known before any is read.
    """

    name: str
    shapes: Mapping[str, Shape]
    dtypes: Mapping[str, str]

    def read(self, name: str) -> np.ndarray:
        """One tensor, in a floating-point dtype."""
        ...


def block_of(config: ModelConfig, layer: int) -> tuple[str, int | None]:
    """Where a layer's parameters are: the block's path, and its index on the scanned axis."""
    period, scanned = len(config.attention.layer_pattern), num_scanned(config)
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


def half_of(config: ModelConfig | EncoderDecoderConfig, row: Row) -> tuple[ModelConfig, str]:
    """The half of an encoder–decoder that a row's paths begin with, with its slash."""
    if isinstance(config, ModelConfig):
        return config, ""
    name, _, _ = row.ours.partition("/")
    return getattr(config, name), f"{name}/"


def places(config: ModelConfig | EncoderDecoderConfig, rows: list[Row]) -> list[Place]:
    """Where every tensor of a model belongs."""
    found = []
    for row in rows:
        own, half = half_of(config, row)
        numbers: dict[str, range] = {}
        if "{layer}" in row.theirs:
            numbers["layer"] = range(own.num_layers)
        if "{expert}" in row.theirs:
            numbers["expert"] = range(0 if own.moe is None else own.moe.num_experts)
        for values in itertools.product(*numbers.values()):
            at = dict(zip(numbers, values, strict=True))
            name, folder = row.theirs.format(**at), half
            index: list[int] = []
            if "layer" in at:
                block, scanned = block_of(own, at["layer"])
                folder, index = f"{half}{block}/", [] if scanned is None else [scanned]
            index += [at["expert"]] if "expert" in at else []
            paths = tuple(folder + path.removeprefix(half) for path in row.paths)
            found.append(Place(row, name, paths, tuple(index)))
    return found


def flatten(tree: Any) -> dict[str, Any]:
    """A nested dict's leaves by their path, with slashes between."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(k.key for k in path): leaf for path, leaf in leaves}


def stored_dtype(tensors: Tensors) -> str:
    """The dtype of most of the numbers; float32 for what a model cannot be kept in."""
    counts = collections.Counter[str]()
    for name, shape in tensors.shapes.items():
        counts[tensors.dtypes[name]] += math.prod(shape)
    (dtype, _), *_ = [*counts.most_common(1), ("float32", 0)]
    return dtype if dtype in ("bfloat16", "float16") else "float32"


def read_params(
    tensors: Tensors, model: Model, rows: list[Row], mesh: Mesh | None = None
) -> dict[str, Any]:
    """The model's parameters, in its param_dtype.

    Shapes are checked before anything is read; then each tensor is read, laid out and put into its
    parameter, on the devices that hold it, so that the host holds one tensor at a time.

    Args:
        tensors: the file or files.
        model: whose parameters they are.
        rows: which tensor is which.
        mesh: over which the parameters are cut, as in training; None: the default device.

    Raises:
        ValueError: a tensor is missing, has another shape, or is none of the model's; a parameter
            has none.
    """
    _check_experts(tensors, model.config, rows)
    like = flatten(abstract_params(model))
    shardings = flatten(parameter_shardings(model, mesh))
    found = places(model.config, rows)
    _check(tensors, like, found)
    params: dict[str, Array] = {}
    for place in found:
        _read_one(tensors, place, like, shardings, params)
        # Copies go on beside the program: the host would hold the next tensor beside this one.
        jax.block_until_ready([params[path] for path in place.paths])
    return _nested(params)


def _read_one(
    tensors: Tensors,
    place: Place,
    like: Mapping[str, Any],
    shardings: Mapping[str, Sharding],
    params: dict[str, Array],
) -> None:
    """One tensor into its parameters; what the host held of it is gone with this call."""
    row, name, paths, at = place
    shapes = [like[p].shape[len(at) :] for p in paths]
    for path, part in zip(paths, row.to_ours(tensors.read(name), shapes), strict=True):
        whole, sharding = like[path], shardings[path]
        if not at:
            params[path] = _on_devices(part, whole.dtype, sharding)
            continue
        if path not in params:
            params[path] = _zeros(whole.shape, whole.dtype, sharding)
        piece = _on_devices(part, whole.dtype, _without(sharding, len(at)))
        params[path] = _put(params[path], piece, np.asarray(at, np.int32), sharding)


def _on_devices(part: np.ndarray, dtype: Any, sharding: Sharding) -> Array:
    """An array of which each device is given its own part."""
    return jax.make_array_from_callback(
        part.shape, sharding, lambda index: np.asarray(part[index], dtype)
    )


def _without(sharding: Sharding, axes: int) -> Sharding:
    """The sharding of an array that lacks the first axes, along which nothing is cut."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[axes:]))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros(shape: Shape, dtype: Any, sharding: Sharding) -> Array:
    return jax.lax.with_sharding_constraint(jnp.zeros(shape, dtype), sharding)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
def _put(
    whole: Float[Array, "*W"],
    part: Float[Array, "*P"],
    at: Int[Array, "A"],
    sharding: Sharding,
) -> Array:
    """A layer's parameter, or an expert's of a layer, into those of all."""
    start = [*at, *(0 for _ in range(part.ndim))]
    whole = jax.lax.dynamic_update_slice(whole, part[(None,) * at.size], start)
    return jax.lax.with_sharding_constraint(whole, sharding)


def _check_experts(
    tensors: Tensors, config: ModelConfig | EncoderDecoderConfig, rows: list[Row]
) -> None:
    """Before anything is made for every expert."""
    for row in rows:
        moe, most = half_of(config, row)[0].moe, len(tensors.shapes)
        if "{expert}" in row.theirs and moe is not None and moe.num_experts > most:
            raise ValueError(
                f"{tensors.name}: {moe.num_experts} experts; allowed: at most {most}, the number "
                "of tensors"
            )


def _check(tensors: Tensors, like: Mapping[str, Any], found: list[Place]) -> None:
    wanted = {
        name: row.their_shape([like[p].shape[len(at) :] for p in paths])
        for row, name, paths, at in found
    }
    given = {path for place in found for path in place.paths}
    if rest := sorted(like.keys() - given):
        raise ValueError(
            f"{tensors.name}: no tensor is the model's {rest[0]}; allowed: one for each parameter"
        )
    missing = [n for n in wanted if n not in tensors.shapes]
    if missing:
        raise ValueError(f"{tensors.name}: no tensor {missing[0]} ({len(missing)} are missing)")
    for name, shape in wanted.items():
        if tensors.shapes[name] != shape:
            raise ValueError(
                f"{tensors.name}: {name} has shape {list(tensors.shapes[name])}; "
                f"allowed: {list(shape)}, by its config"
            )
        if tensors.dtypes[name] not in DTYPES:
            raise ValueError(
                f"{tensors.name}: {name} has dtype {tensors.dtypes[name]}; "
                f"allowed: {', '.join(DTYPES)}"
            )
    unknown = [n for n in sorted(tensors.shapes.keys() - wanted.keys()) if not BUFFERS.search(n)]
    if not {"head", "decoder/head"} & like.keys():
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
