"""Retrieval heads keep all tokens; the others the first few, the last ones and a mean of the rest.

RazorAttention (arXiv 2407.15891): a head that looks up earlier tokens needs them all, and any other
one loses little if what it hardly looks at is one key and one value, the mean of what was dropped,
that counts as often as there are tokens in it. `jaxlm.evaluation.retrieval_heads` finds such heads.

Ours: the window is of a fixed number of tokens, which leave it in groups, so that as many commits
of one token give the same bits; what keeps the retrieval heads' tokens may be any other cache.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlm.attention.mask import AttentionMask
from jaxlm.attention.split_heads import SplitLayer
from jaxlm.caches.dense import Dense
from jaxlm.caches.head_lists import HeadLists, check_heads, load_heads
from jaxlm.caches.kind import CACHES, CacheKind
from jaxlm.caches.stacks import check_sees_no_future
from jaxlm.caches.staircase import Staircase, check_full
from jaxlm.config import check
from jaxlm.model.config import ModelConfig
from jaxlm.model.layouts import num_scanned


@CACHES.register
@dataclasses.dataclass(frozen=True)
class Razor(CacheKind):
    """Heads that keep all, and heads that fade.

    Attributes:
        heads: for each layer the kv heads that keep all, or the path of a file of
            `jaxlm.caches.head_lists.save_heads`.
        window: the last tokens that the others keep, beside those of a group that is not yet
            complete.
        num_sinks: the first tokens that they keep.
        group: tokens that leave the window together.
        inner: what keeps the tokens of those that keep all, such as "quantized(bits=4)".
    """

    heads: str | HeadLists
    window: int
    num_sinks: int = 4
    group: int = 32
    inner: CacheKind = Dense()

    name: ClassVar[str] = "razor"

    def __post_init__(self):
        check_full(self.name, self.group, self.num_sinks, window=self.window)
        fine = not isinstance(self.inner, Razor)
        check(self.name, inner=(str(self.inner), fine, "a cache that is no razor itself"))

    @property
    def fading(self) -> Staircase:
        """How the other heads keep their tokens."""
        return Staircase(self.window, ((0, None),), self.group, self.num_sinks)

    def holds(self, lengths: Any) -> bool:
        """Whether `inner` does."""
        return self.inner.holds(lengths)

    def init(self, config: ModelConfig, batch: int, capacity: int) -> RazorCache:
        """Empty.

        Raises:
            ValueError: heads that the model has not, or not as many in each of the layers that a
                loop goes over.
        """
        check_sees_no_future(config, capacity)
        if isinstance(self.heads, str):
            heads = load_heads(self.heads, config)
        else:
            heads = check_heads("razor: heads", self.heads, config)
        scanned = num_scanned(config)
        counts = [len(layer) for layer in heads]
        if len(set(counts[:scanned])) > 1:
            raise ValueError(
                f"razor: {min(counts)} to {max(counts)} heads a layer; allowed: as many in each, "
                "or layers apart: numerics.scan_layers=False, jaxlm.load(…, unroll=True) or "
                "launch.generate --unroll"
            )
        K, parts = config.num_kv_heads, []
        for i, count in enumerate(dict.fromkeys(counts)):
            shape = counts.count(count), bool(scanned) and i == 0
            kinds = (self.inner, count), (self.fading, K - count)
            made = [k.init(_of_heads(config, n, *shape), batch, capacity) for k, n in kinds if n]
            parts.append(tuple(made))
        return RazorCache(tuple(parts), heads, K)


def _of_heads(config: ModelConfig, heads: int, layers: int, scanned: bool) -> ModelConfig:
    """A model of so many layers with so many kv heads, each of as many queries as before."""
    attention = dataclasses.replace(
        config.attention,
        num_heads=config.attention.num_heads // config.num_kv_heads * heads,
        num_kv_heads=heads,
        head_dim=config.head_dim,
    )
    numerics = dataclasses.replace(config.numerics, scan_layers=scanned)
    return config.replace(num_layers=layers, attention=attention, numerics=numerics)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RazorCache:
    """Layers in which as many heads keep all are together, in the order of the first of each.

    Attributes:
        parts: of each of these: the cache of heads that keep all and that of the others, or the one
            that there is.
        heads: for each layer those that keep all. Static.
        num_kv_heads: of a layer. Static.
    """

    parts: tuple[tuple[Any, ...], ...]
    heads: HeadLists = dataclasses.field(metadata={"static": True})
    num_kv_heads: int = dataclasses.field(metadata={"static": True})

    @property
    def caches(self) -> list[Any]:
        """All of them."""
        return [cache for part in self.parts for cache in part]

    @property
    def lengths(self) -> Int[Array, "B"]:
        """Tokens of each row so far."""
        return self.caches[0].lengths

    @property
    def axes(self) -> tuple[str | None, None]:
        """Rows: which heads keep all differs from layer to layer."""
        return (None if any(cache.axes[0] is None for cache in self.caches) else "batch"), None

    @property
    def mask(self) -> AttentionMask | None:
        """What a prompt's tokens see of each other: as much as `inner` keeps, in every head. A mean
        takes the place of others only for what comes after them.
        """
        return next((cache.mask for cache in self.caches if cache.mask is not None), None)

    @property
    def appendable(self) -> Int[Array, "B"] | None:
        """Tokens of each row before the one with which a group goes into the mean, or down inside
        of the cache that keeps all.
        """
        found = [n for n in (cache.appendable for cache in self.caches) if n is not None]
        return jnp.stack(found).min(0) if found else None

    @property
    def _layers(self) -> list[list[int]]:
        """Of each part."""
        counts = [len(layer) for layer in self.heads]
        return [[i for i, n in enumerate(counts) if n == c] for c in dict.fromkeys(counts)]

    def _counts(self, part: int) -> tuple[int, ...]:
        """Heads of each cache of a part."""
        kept = len(self.heads[self._layers[part][0]])
        return tuple(n for n in (kept, self.num_kv_heads - kept) if n)

    @property
    def _order(self) -> np.ndarray:
        """[layers, K]: the heads that keep all, then the others."""
        every = range(self.num_kv_heads)
        return np.array([[*own, *(h for h in every if h not in own)] for own in self.heads])

    def layer(self, index: int | Int[Array, ""]) -> SplitLayer:
        """What a layer attends to. Those that a loop goes over are the beginning of part 0."""
        part, place = 0, index
        if isinstance(index, int):
            part = next(i for i, layers in enumerate(self._layers) if index in layers)
            place = self._layers[part].index(index)
        views = tuple(cache.layer(place) for cache in self.parts[part])
        order, places = (jnp.asarray(x)[index] for x in (self._order, np.argsort(self._order, -1)))
        return SplitLayer(views, order, places, self._counts(part))

    def commit(
        self,
        kv: tuple[Float[Array, "L B T K H"], ...],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
    ) -> RazorCache:
        """Writes T tokens, of each head where it belongs."""
        parts = []
        for i, (layers, caches) in enumerate(zip(self._layers, self.parts, strict=True)):
            order = jnp.asarray(self._order[layers])[:, None, None, :, None]
            own = [jnp.take_along_axis(x[np.array(layers)], order, 3) for x in kv]
            ends = list(itertools.accumulate(self._counts(i)))[:-1]
            split = zip(*(jnp.split(x, ends, 3) for x in own), strict=True)
            there = positions, segment_ids
            parts.append(tuple(c.commit(x, *there) for c, x in zip(caches, split, strict=True)))
        return dataclasses.replace(self, parts=tuple(parts))

    def reorder(self, rows: Int[Array, "R"]) -> RazorCache:
        """Row i becomes what row `rows[i]` was, of any number of rows."""
        parts = tuple(tuple(cache.reorder(rows) for cache in part) for part in self.parts)
        return dataclasses.replace(self, parts=parts)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, and of sums of them."""
        return sum(cache.nbytes for cache in self.caches)
