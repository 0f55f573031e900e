"""Parts of a cache, each of one precision: tokens come to them and leave them in whole groups.

A zone is a ring of `blocks` groups: the group that comes takes the place of the one that leaves.
Its slots are a multiple of 128, as kernels want them; those behind the ring stay empty.

Letters: B batch, K kv heads, S slots, H head dim, n tokens.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Bool, Float, Int

from jaxlm.attention.inputs import CachedLayer
from jaxlm.attention.quantized_layer import QuantizedLayer
from jaxlm.caches.rows import round_up
from jaxlm.caches.stacks import empty_stacks, of_stack, place_of
from jaxlm.model.config import ModelConfig
from kernels.kv_quantize.layout import BLOCK, Quantized, pack, rows_of_codes
from kernels.kv_quantize.reference import (
    dequantize_keys,
    dequantize_values,
    quantize_keys,
    quantize_values,
)

TIME = 3  # the axis of tokens in [layers, B, K, S, H]


class Group(NamedTuple):
    """Consecutive tokens of one row, as numbers.

    Attributes:
        keys, values: of each stack of layers.
        positions: of the tokens.
        segment_ids: 0 where there is none.
    """

    keys: tuple[Float[Array, "_ 1 K n H"], ...]
    values: tuple[Float[Array, "_ 1 K n H"], ...]
    positions: Int[Array, "1 n"]
    segment_ids: Int[Array, "1 n"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FullZone:
    """Numbers as they are; behind the ring there is room for sinks.

    Attributes:
        keys, values: of each stack of layers, as in `DenseCache`.
        positions: of the token in each slot.
        segment_ids: 0 where a slot is empty.
        blocks: groups of the ring. Static.
    """

    keys: tuple[Float[Array, "_ B K S H"], ...]
    values: tuple[Float[Array, "_ B K S H"], ...]
    positions: Int[Array, "B S"]
    segment_ids: Int[Array, "B S"]
    blocks: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, blocks: int, slots: int) -> FullZone:
        """With at least so many slots."""
        slots = round_up(slots, BLOCK)
        shape = (batch, config.num_kv_heads, slots, config.head_dim)
        keys, values = (empty_stacks(config, shape) for _ in range(2))
        none = jnp.zeros((batch, slots), jnp.int32)
        return cls(keys, values, none, none.copy(), blocks)

    def layer(self, index: int | Int[Array, ""]) -> CachedLayer:
        """What a layer attends to."""
        stack = of_stack(self.keys, self.values, index)
        return CachedLayer(*stack, self.positions, self.segment_ids)

    def take(self, row: Array, start: Array, group: int) -> Group:
        """What lies in slots start … start + group of a row."""

        def numbers(buffers: tuple[Array, ...]) -> tuple[Array, ...]:
            return tuple(_cut(x, row, start, group) for x in buffers)

        return Group(
            numbers(self.keys),
            numbers(self.values),
            _cut(self.positions, row, start, group, 1),
            _cut(self.segment_ids, row, start, group, 1),
        )

    def write(self, row: Array, start: Array, new: Group, there: Bool[Array, "n"]) -> FullZone:
        """With new tokens from slot `start` on, where they are there."""

        def written(x: Array, part: Array, axis: int) -> Array:
            old = _cut(x, row, start, len(there), axis)
            mask = jnp.expand_dims(there, [i for i in range(x.ndim) if i != axis])
            return _paste(x, jnp.where(mask, part.astype(x.dtype), old), row, start, axis)

        def numbers(buffers: tuple[Array, ...], parts: tuple[Array, ...]) -> tuple[Array, ...]:
            return tuple(written(*pair, TIME) for pair in zip(buffers, parts, strict=True))

        return dataclasses.replace(
            self,
            keys=numbers(self.keys, new.keys),
            values=numbers(self.values, new.values),
            positions=written(self.positions, new.positions, 1),
            segment_ids=written(self.segment_ids, new.segment_ids, 1),
        )

    def forget(self, row: Array, start: Array, group: int, when: Bool[Array, ""]) -> FullZone:
        """Without what lies in slots start … start + group of a row."""
        old = _cut(self.segment_ids, row, start, group, 1)
        left = _paste(self.segment_ids, jnp.where(when, 0, old), row, start, 1)
        return dataclasses.replace(self, segment_ids=left)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedZone:
    """Numbers of few bits, see `kernels.kv_quantize.layout`: keys with a scale per channel of a
    group of tokens, values with one per token of as many channels, or of fewer that divide the
    head dim.

    Attributes:
        keys, values: of each stack of layers; arrays [layers, B, K, …].
        positions: of the token in each slot.
        segment_ids: 0 where a slot is empty.
        blocks: groups of the ring. Static.
    """

    keys: tuple[Quantized, ...]
    values: tuple[Quantized, ...]
    positions: Int[Array, "B S"]
    segment_ids: Int[Array, "B S"]
    blocks: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def empty(
        cls, config: ModelConfig, batch: int, blocks: int, bits: int, group: int
    ) -> QuantizedZone:
        """With room for so many groups."""
        S, H = slots_of(blocks, group), config.head_dim
        lead = (batch, config.num_kv_heads)
        channels = math.gcd(group, H)

        def stacks(size: int, scales: tuple[int, int]) -> tuple[Quantized, ...]:
            dtype = jnp.int8 if bits == 8 else jnp.int32
            codes = empty_stacks(config, (*lead, rows_of_codes(S, bits), H), dtype)
            affine = empty_stacks(config, (*lead, *scales), jnp.int32)
            return tuple(Quantized(c, a, bits, size) for c, a in zip(codes, affine, strict=True))

        keys = stacks(group, (S // group, H))
        values = stacks(channels, (H // channels, S))
        none = jnp.zeros((batch, S), jnp.int32)
        return cls(keys, values, none, none.copy(), blocks)

    @property
    def bits(self) -> int:
        """Of a code."""
        return self.keys[0].bits

    @property
    def group(self) -> int:
        """Tokens."""
        return self.keys[0].group

    @property
    def run(self) -> int:
        """Tokens that share words, or one group where that is more."""
        return max(self.group, 1 if self.bits == 8 else 256 // self.bits)

    def layer(self, index: int | Int[Array, ""]) -> QuantizedLayer:
        """What a layer attends to."""
        stack, layer = place_of(tuple(x.codes for x in self.keys), index)
        there = self.positions, self.segment_ids
        return QuantizedLayer(self.keys[stack], self.values[stack], layer, *there)

    def take(self, row: Array, block: Array) -> Group:
        """A group as numbers, float32."""
        g, run, start = self.group, self.run, block * self.group
        first = start // run * run  # of the run that the group is in

        def own(x: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(x, start - first, g, TIME)

        def keys(x: Quantized) -> Array:
            affine = _cut(x.affine, row, first // g, run // g)
            return own(dequantize_keys(dataclasses.replace(x, codes=codes(x), affine=affine)))

        def values(x: Quantized) -> Array:
            affine = _cut(x.affine, row, first, run, TIME + 1)
            return own(dequantize_values(dataclasses.replace(x, codes=codes(x), affine=affine)))

        def codes(x: Quantized) -> Array:
            rows = rows_of_codes(run, x.bits)
            return _cut(x.codes, row, first // run * rows, rows)

        return Group(
            tuple(map(keys, self.keys)),
            tuple(map(values, self.values)),
            _cut(self.positions, row, start, g, 1),
            _cut(self.segment_ids, row, start, g, 1),
        )

    def put(self, row: Array, block: Array, new: Group, when: Bool[Array, ""]) -> QuantizedZone:
        """With a group in the place of another, or as it is.

        A run is quantized that is full of copies of the group; of its words go in what fields are
        the group's own.
        """
        g, run, start = self.group, self.run, block * self.group
        rows = rows_of_codes(run, self.bits)
        own = jnp.arange(run) // g == block % (run // g)
        fields = None
        if run > g:
            fields = pack(jnp.where(own, (1 << self.bits) - 1, 0)[:, None], self.bits)

        def written(x: Array, part: Array, at: Array, axis: int = TIME) -> Array:
            old = _cut(x, row, at, part.shape[axis], axis)
            return _paste(x, jnp.where(when, part, old), row, at, axis)

        def codes(x: Array, new: Array) -> Array:
            at = start // run * rows
            if fields is not None:
                mask = fields[None, None, None]
                new = (_cut(x, row, at, rows) & ~mask) | (new & mask)
            return written(x, new, at)

        def keys(x: Quantized, new: Array) -> Quantized:
            y = quantize_keys(_copies(new, run), x.bits, g)
            affine = written(x.affine, y.affine[..., :1, :], block)
            return dataclasses.replace(x, codes=codes(x.codes, y.codes), affine=affine)

        def values(x: Quantized, new: Array) -> Quantized:
            y = quantize_values(_copies(new, run), x.bits, x.group)
            affine = written(x.affine, y.affine[..., :g], start, TIME + 1)
            return dataclasses.replace(x, codes=codes(x.codes, y.codes), affine=affine)

        return dataclasses.replace(
            self,
            keys=tuple(map(keys, self.keys, new.keys)),
            values=tuple(map(values, self.values, new.values)),
            positions=written(self.positions, new.positions, start, 1),
            segment_ids=written(self.segment_ids, new.segment_ids, start, 1),
        )


def slots_of(blocks: int, group: int) -> int:
    """Of a zone: up to 1024 a multiple of 128, beyond that of 8 groups and of a sixteenth or less.

    A kernel takes a zone in equal blocks, whose scales of keys are whole registers: 8 groups. What
    has no such divisor would be one block, too large for a chip's memory.
    """
    tokens = blocks * group
    if tokens <= 8 * BLOCK:
        return round_up(tokens, BLOCK)
    sixteenth = (1 << (tokens.bit_length() - 1)) // 16
    return round_up(tokens, max(8 * group, BLOCK, sixteenth))


def _copies(x: Array, tokens: int) -> Array:
    """Enough of a group, one after the other, to be as many tokens."""
    return jnp.concatenate([x] * (tokens // x.shape[TIME]), TIME)


def _at(x: Array, row: Array, start: Array, axis: int) -> list[Any]:
    """Rows are axis 1 of arrays by layer, and axis 0 of the others."""
    at: list[Any] = [0] * x.ndim
    at[0 if x.ndim == 2 else 1], at[axis] = row, start
    return at


def _cut(x: Array, row: Array, start: Array, length: int, axis: int = TIME) -> Array:
    """One row, from `start` on."""
    size = list(x.shape)
    size[0 if x.ndim == 2 else 1], size[axis] = 1, length
    return jax.lax.dynamic_slice(x, _at(x, row, start, axis), size)


def _paste(x: Array, part: Array, row: Array, start: Array, axis: int) -> Array:
    """The reverse of `_cut`.

    In the order in which kernels read: XLA's for TPUs likes another for what it updates, and would
    copy all of it at each step.
    """
    y = jax.lax.dynamic_update_slice(x, part, _at(x, row, start, axis))
    return with_layout_constraint(y, Layout(tuple(range(x.ndim))))
