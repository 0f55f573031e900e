"""LoRA and DoRA: adapters put beside a model's matrices, and made one with them.

params = add_adapters(model, params, AdapterConfig(rank=8), seed=0)   # the same function as before
learned, frozen = split(params, is_learned)                          # arrays to learn, and the rest
params = merge_adapters(combine(frozen, learned))                    # plain parameters again

An adapter is the subtree `lora` beside a projection's `kernel`; `jaxlm.model.low_rank` has the
formulas.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import Array

from jaxlm.adapters.config import AdapterConfig
from jaxlm.model.low_rank import LORA, adapted_kernel
from jaxlm.model.parameters import (
    Model,
    abstract_params,
    kernel_inputs,
    logical_axes,
    parameter_shardings,
)
from jaxlm.model.partition import combine
from jaxlm.model.quantized import scale_name, whole
from jaxlm.sharding.mesh import parameter_sharding

# Of an adapter, what is learned; its scale is not.
LEARNED = ("a", "b", "magnitude")


class Target(NamedTuple):
    """A projection: its path, its kernel's shape and axes, and where its inputs begin and end."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    first: int
    last: int

    @property
    def name(self) -> str:
        """Its path within its layer."""
        return "/".join(k for k in self.path if not k.startswith(("layers", "last_l", "block_")))


def every_projection(model: Model) -> list[Target]:
    """All projections of a model."""
    axes = logical_axes(model)
    found: list[Target] = []
    for path, x in jax.tree_util.tree_leaves_with_path(abstract_params(model)):
        names = tuple(k.key for k in path)
        if names[-1] != "kernel":
            continue
        own = axes
        for name in names:
            own = own[name]
        first = int("layers" in names)
        last = first + kernel_inputs(names, len(x.shape) - first)
        found.append(Target(names[:-1], x.shape, tuple(own), first, last))
    return found


def targets(model: Model, config: AdapterConfig) -> list[Target]:
    """The projections that get an adapter.

    Raises:
        ValueError: none has such a name; the names that there are, are told.
    """
    found = every_projection(model)
    chosen = [t for t in found if re.fullmatch(config.targets, t.name)]
    if not chosen:
        known = ", ".join(sorted({t.name for t in found}))
        raise ValueError(f"adapter: targets={config.targets!r}; allowed: some of {known}")
    return chosen


def add_adapters(model: Model, params: Any, config: AdapterConfig, seed: int = 0) -> dict[str, Any]:
    """The parameters with fresh adapters beside them, in float32; the model's function is the same.

    As in the paper, `a` is random (uniform in ±1/√inputs, as peft draws it) and `b` zero; DoRA's
    magnitudes are the lengths of the matrices' columns. Each adapter's randomness comes from its
    name.

    Args:
        model: of the parameters.
        params: nested dict of arrays.
        config: rank, targets; its rank is not None.
        seed: of `a`.

    Raises:
        ValueError: no projection has a name that the pattern fits.
    """
    adapters: dict[str, Any] = {}
    for target in targets(model, config):
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32("/".join(target.path).encode()))
        beside = params
        for name in target.path:
            beside = beside[name]
        kernel = whole(beside, "kernel")
        here = adapters
        for name in target.path:
            here = here.setdefault(name, {})
        here[LORA] = _fresh(target, kernel, config, key)
    return combine(params, adapters)


def _fresh(target: Target, kernel: Array, config: AdapterConfig, key: Array) -> dict[str, Array]:
    shapes = _parts(target, target.shape, config.rank)
    limit = 1 / math.sqrt(math.prod(target.shape[target.first : target.last]))
    lora = {
        "a": jax.random.uniform(key, shapes["a"], jnp.float32, -limit, limit),
        "b": jnp.zeros(shapes["b"]),
        "scale": jnp.full(shapes["scale"], config.scale, jnp.float32),
    }
    if config.dora:
        axes = tuple(range(target.first, target.last))
        lora["magnitude"] = jnp.sqrt(jnp.square(kernel.astype(jnp.float32)).sum(axes))
    return lora


def _parts(target: Target, axes: tuple, rank: Any) -> dict[str, tuple]:
    """What each array of an adapter takes of its kernel's shape, or of its axes' names."""
    layers, inputs = axes[: target.first], axes[target.first : target.last]
    outputs = axes[target.last :]
    return {
        "a": (*layers, *inputs, rank),
        "b": (*layers, rank, *outputs),
        "scale": layers,
        "magnitude": (*layers, *outputs),
    }


def adapted_shardings(model: Model, mesh: Mesh | None, like: Any) -> dict[str, Any]:
    """Where the arrays of `add_adapters` lie on a mesh: cut as their kernel is, the rank whole.

    Args:
        model: of the parameters.
        mesh: None: the default device.
        like: the parameters or their shapes, with adapters, quantized or not.

    Raises:
        ValueError: a parameter that the mesh cannot cut.
    """
    more: dict[str, Any] = {}
    for target in every_projection(model):
        beside, here = like, more
        for name in target.path:
            beside, here = beside[name], here.setdefault(name, {})
        axes = _parts(target, target.axes, None)
        if LORA in beside:
            here[LORA] = {
                n: _place(mesh, target, axes[n], x.shape) for n, x in beside[LORA].items()
            }
        if (scale := scale_name("kernel")) in beside:
            outputs = (None,) * (target.last - target.first)
            spread = (*target.axes[: target.first], *outputs, *target.axes[target.last :])
            here[scale] = _place(mesh, target, spread, beside[scale].shape)
    return combine(parameter_shardings(model, mesh), more)


def _place(mesh: Mesh | None, target: Target, axes: tuple, shape: tuple[int, ...]) -> Sharding:
    if mesh is None:
        return SingleDeviceSharding(jax.local_devices()[0])
    return parameter_sharding(mesh, "/".join(target.path), PartitionSpec(*axes), shape)


def is_learned(path: tuple[str, ...]) -> bool:
    """Whether a parameter is one that an adapter learns."""
    return len(path) > 1 and path[-2] == LORA and path[-1] in LEARNED


def merge_adapters(params: Any) -> dict[str, Any]:
    """Plain parameters of the same function: every adapter made one with its matrix.

    In a matrix of less than float32 the sum is rounded to it; a quantized one becomes float32.
    """

    def merged(tree: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
        plain: dict[str, Any] = {
            name: merged(value, (*path, name)) if isinstance(value, Mapping) else value
            for name, value in tree.items()
            if name != LORA and name not in map(scale_name, tree)
        }
        plain |= {name: whole(tree, name) for name in tree if scale_name(name) in tree}
        if LORA in tree:
            kernel = plain["kernel"]
            scanned = int("layers" in path)
            n = kernel_inputs(path, kernel.ndim - scanned)
            one = lambda k, lora: adapted_kernel(k, lora, n)  # noqa: E731
            made = (jax.vmap(one) if scanned else one)(kernel, tree[LORA])
            plain["kernel"] = made.astype(kernel.dtype)
        return plain

    return merged(params, ())
