"""Parameters of a model as a plain pytree: made, counted, and named for sharding."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec, Sharding, SingleDeviceSharding

from jaxlm.model.config import ModelConfig
from jaxlm.model.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from jaxlm.model.low_rank import LORA
from jaxlm.model.transformer import Transformer
from jaxlm.sharding.mesh import parameter_sharding

Model = Transformer | EncoderDecoder

# The length of the dummy input is of no consequence: no parameter's shape depends on it.
_TOKENS = jax.ShapeDtypeStruct((1, 1), jnp.int32)


def model_of(config: ModelConfig | EncoderDecoderConfig) -> Model:
    """The model of a config of either class."""
    pair = isinstance(config, EncoderDecoderConfig)
    return EncoderDecoder(config) if pair else Transformer(config)


def _quickly_traced(config: Any) -> Any:
    """A config of the same parameters, whose attention takes the least time to trace."""
    if isinstance(config, EncoderDecoderConfig):
        halves = _quickly_traced(config.encoder), _quickly_traced(config.decoder)
        return config.replace(encoder=halves[0], decoder=halves[1])
    attention = dataclasses.replace(config.attention, implementation="reference")
    return config.replace(attention=attention)


def _boxed(model: Model, key: jax.Array) -> Any:
    model = model_of(_quickly_traced(model.config))
    tokens = jnp.zeros(_TOKENS.shape, _TOKENS.dtype)
    given = (tokens, tokens) if isinstance(model, EncoderDecoder) else (tokens,)
    return model.init(key, *given)["params"]


def init_params(model: Model, seed: int = 0) -> dict[str, Any]:
    """Fresh parameters, a nested dict of arrays; a pure function of (config, seed).

    Each array's randomness comes from its own name, so a model with another position encoding has
    bit-identical values in every parameter the two share.
    """
    return nn.meta.unbox(jax.jit(lambda key: _boxed(model, key))(jax.random.key(seed)))


@functools.cache
def _abstract_boxed(model: Model) -> Any:
    """Shapes, dtypes and axes; cached, since a trace of the whole model finds them."""
    return jax.eval_shape(lambda key: _boxed(model, key), jax.random.key(0))


def abstract_params(model: Model) -> dict[str, Any]:
    """The parameters' shapes and dtypes, without computing any."""
    return nn.meta.unbox(_abstract_boxed(model))


def logical_axes(model: Model) -> dict[str, Any]:
    """A PartitionSpec of logical axis names for each parameter: ("layers", "embed", "mlp")."""
    return nn.get_partition_spec(_abstract_boxed(model))


def parameter_shardings(model: Model, mesh: Mesh | None) -> dict[str, Any]:
    """Where each parameter lies on a mesh; without one, on the default device.

    Raises:
        ValueError: a parameter that the mesh cannot cut.
    """
    one = SingleDeviceSharding(jax.local_devices()[0])

    def place(path: Any, x: jax.ShapeDtypeStruct, axes: PartitionSpec) -> Sharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return one if mesh is None else parameter_sharding(mesh, name, axes, x.shape)

    return jax.tree_util.tree_map_with_path(place, abstract_params(model), logical_axes(model))


def kernel_inputs(path: tuple[str, ...], ndim: int) -> int:
    """How many of a projection's kernel's axes are inputs.

    Args:
        path: of the kernel or its projection.
        ndim: of the kernel, without an axis of layers.
    """
    return ndim - 1 if "out" in path else 1


def placed_params(model: Model, mesh: Mesh | None) -> dict[str, Any]:
    """Shapes, dtypes and shardings of the parameters, without computing any.

    Raises:
        ValueError: a parameter that the mesh cannot cut.
    """
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        abstract_params(model),
        parameter_shardings(model, mesh),
    )


def count_params(params: Any) -> int:
    """How many numbers a pytree of arrays holds."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(params))


def size_by_part(params: Any) -> dict[str, tuple[int, int]]:
    """(how many numbers, how many bytes) each part of a model has: embedding, attention,
    feed_forward, norms, …, and an adapter of any of them.

    All layers' together; what normalises queries and keys counts as attention.

    Args:
        params: nested dict of arrays, or of their shapes and dtypes.
    """
    sizes: dict[str, tuple[int, int]] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        names = [k.key for k in path if not k.key.startswith(("layers", "last_layers", "block_"))]
        part = "norms" if names[0].endswith("norm") else names[0]
        part = "adapter" if LORA in names else part
        numbers, num_bytes = sizes.get(part, (0, 0))
        size = math.prod(x.shape)
        more = size * jax.dtypes.itemsize_bits(x.dtype) // 8
        sizes[part] = numbers + size, num_bytes + more
    return sizes
