"""What a checkpoint holds: every leaf of a pytree under one name, as bytes on the host."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# fmt: off
DTYPES = frozenset(
    {
        "bool", "int4", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32",
        "uint64", "float8_e4m3fn", "float8_e5m2", "bfloat16", "float16", "float32", "float64",
        "complex64", "complex128",
    }
)
# fmt: on


@dataclasses.dataclass(frozen=True)
class LeafSpec:
    """What is stored of one leaf.

    Attributes:
        shape, dtype: of the stored array; of the key data where the leaf is a typed PRNG key.
        prng: the key's implementation ("threefry2x32"), None for an ordinary array.
    """

    shape: tuple[int, ...]
    dtype: str
    prng: str | None = None

    @property
    def nbytes(self) -> int:
        """Size of the stored array in bytes."""
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize

    def abstract(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of the leaf as the program sees it (a key, not its key data)."""
        data = jax.ShapeDtypeStruct(self.shape, jnp.dtype(self.dtype))
        return data if self.prng is None else jax.eval_shape(self.wrap, data)

    def wrap(self, data: Any) -> Any:
        """The stored array as the leaf it was: key data become a typed key again."""
        return data if self.prng is None else jax.random.wrap_key_data(data, impl=self.prng)


def in_parts(specs: Mapping[str, LeafSpec], nbytes: int) -> Iterator[dict[str, LeafSpec]]:
    """All leaves, so many at a time as fit `nbytes`, or one that is larger."""
    part: dict[str, LeafSpec] = {}
    total = 0
    for name, spec in specs.items():
        if part and total + spec.nbytes > nbytes:
            yield part
            part, total = {}, 0
        part[name] = spec
        total += spec.nbytes
    if part:
        yield part


@dataclasses.dataclass(frozen=True)
class HostLeaf:
    """One leaf on the host: what it is, and the array that is stored."""

    spec: LeafSpec
    array: np.ndarray


def named_leaves(tree: Any) -> dict[str, Any]:
    """Every leaf under its path: {"params": {"w": x}} gives {"params/w": x}.

    List positions, dataclass fields and the like count as names too. None is no leaf.

    Raises:
        ValueError: a bare leaf, a name that can't be a path, or two leaves of one name.
    """
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    named: dict[str, Any] = {}
    for path, leaf in flat:
        parts = [jax.tree_util.keystr((key,), simple=True) for key in path]
        name = "/".join(parts)
        if any("/" in part for part in parts):
            raise ValueError(f"state leaf {name!r}: a key with '/'; allowed: keys without it")
        leaf_folder(name)
        named[name] = leaf
    if len({leaf_folder(name) for name in named}) < len(flat):
        raise ValueError("state: two leaves have one path (keys 0 and '0', or 'a.b' and a/b)")
    return named


def leaf_folder(name: str) -> str:
    """The folder of one leaf's array, as Orbax names it: params/w is in params.w.

    Raises:
        ValueError: a name which is no plain path.
    """
    parts = name.split("/")
    folder = ".".join(parts)
    if not all(parts) or "\0" in name or folder in (".", "..") or folder.startswith("_METADATA"):
        raise ValueError(f"state leaf {name!r}; allowed: non-empty names joined by '/'")
    return folder


def to_host(name: str, leaf: Any) -> HostLeaf:
    """A copy on the host that stays as it is when the leaf's buffer is donated.

    Python numbers count as JAX arrays of their default dtype.

    Raises:
        TypeError: neither an array nor a number, or a dtype that can't be stored.
        ValueError: an array of which this process holds only a part.
    """
    if isinstance(leaf, bool | int | float | complex):
        leaf = jnp.asarray(leaf)
    if isinstance(leaf, np.generic):
        leaf = np.asarray(leaf)
    if not isinstance(leaf, jax.Array | np.ndarray):
        raise TypeError(f"state leaf {name!r} is a {type(leaf).__name__}; allowed: arrays, numbers")
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        raise ValueError(f"state leaf {name!r} lies on several processes; allowed: on this one")
    spec, stored = spec_and_array(name, leaf)
    # order="C" and the copy: the bytes are written and hashed as they lie.
    array = np.array(stored, order="C", copy=True)
    array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return HostLeaf(spec, array)


def spec_and_array(
    name: str, leaf: jax.Array | np.ndarray
) -> tuple[LeafSpec, jax.Array | np.ndarray]:
    """What is stored of a leaf, and the array to store: of a typed key, its data.

    Raises:
        TypeError: a dtype that can't be stored.
    """
    prng = None
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        prng = str(jax.random.key_impl(leaf))
        leaf = jax.random.key_data(leaf)
    if leaf.dtype.name not in DTYPES:
        raise TypeError(
            f"state leaf {name!r} has dtype {leaf.dtype}; allowed: {', '.join(sorted(DTYPES))}"
        )
    return LeafSpec(leaf.shape, leaf.dtype.name, prng), leaf


def start_transfers(leaves: Iterable[Any]) -> None:
    """Ask for all device-to-host copies at once, so that they overlap."""
    for leaf in leaves:
        if isinstance(leaf, jax.Array) and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf.copy_to_host_async()


def nest(named: Mapping[str, Any]) -> dict[str, Any]:
    """{"params/w": x} as {"params": {"w": x}}.

    Raises:
        ValueError: a name which is both a leaf and a folder of others.
    """
    root: dict[str, Any] = {}
    for name in sorted(named):
        *folders, last = name.split("/")
        node = root
        for folder in folders:
            node = node.setdefault(folder, {})
            if not isinstance(node, dict):
                raise ValueError(f"{name!r} lies below {folder!r}, which is a leaf")
        node[last] = named[name]
    return root
