"""Precision that falls in steps with a token's age: the last tokens in full, older ones in 8, then
4, then 2 bits, and the first few in full for ever. A last step of 0 bits keeps their mean alone.

KIVI's quantization (arXiv 2402.02750, section 3: keys per channel over groups of tokens, values per
token over groups of channels, the last tokens in full), in the steps that staircase adaptive
quantization names (arXiv 2410.18441); inspired by both, the same as neither.

Behind the sinks a row's tokens are counted in groups. When a group is complete, the group `full`
tokens before it goes from the first zone to the second, and so on downwards: so at each complete
group every zone gives one to the next, and what lies where is a function of how many tokens there
are. On its way down a number is rounded once a step: |x̂ − x| ≤ Σ scale/2 over the zones that it has
been in, see `kernels.kv_quantize.layout`.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlm.attention import mask as masks
from jaxlm.attention.mask import AttentionMask
from jaxlm.attention.zoned import ZonedLayer
from jaxlm.caches.averaged import AveragedZone
from jaxlm.caches.kind import CACHES, ROWS_AND_HEADS, CacheKind
from jaxlm.caches.rows import round_up
from jaxlm.caches.stacks import check_sees_no_future, reorder_rows, split_stacks
from jaxlm.caches.zones import TIME, FullZone, Group, QuantizedZone
from jaxlm.config import check, integer_at_least, one_of
from jaxlm.model.config import ModelConfig
from kernels.kv_quantize.layout import BITS, GROUPS


def check_full(owner: str, group: int, num_sinks: int, **tokens: int) -> None:
    """Raises ValueError for a setting of what is kept in full that is not allowed.

    Args:
        owner: whose settings they are.
        tokens: how many of the last, under the name that the owner has for it.
    """
    check(owner, group=one_of(group, *GROUPS))
    whole = {
        name: (n, integer_at_least(n, group)[1] and n % group == 0, f"a multiple of group={group}")
        for name, n in tokens.items()
    }
    check(owner, num_sinks=integer_at_least(num_sinks, 0), **whole)


@CACHES.register
@dataclasses.dataclass(frozen=True)
class Staircase(CacheKind):
    """Zones of fewer and fewer bits.

    Attributes:
        full: the last tokens kept in full, beside those of a group that is not yet complete.
        steps: (bits, tokens) of each zone after that; the last has no end: None. Of 0 bits only the
            mean is kept, see `jaxlm.caches.averaged`.
        group: tokens that go down together, whose keys share a scale per channel.
        num_sinks: the first tokens, kept in full.
        window: the last tokens kept at all, the query's own included; None: every one.
    """

    full: int = 128
    steps: tuple[tuple[int, int | None], ...] = ((8, 512), (4, 4096), (2, None))
    group: int = 32
    num_sinks: int = 4
    window: int | None = None

    name: ClassVar[str] = "staircase"

    def __post_init__(self):
        check_full(self.name, self.group, self.num_sinks, full=self.full)
        bits = [step[0] for step in self.steps]
        lengths = [n for _, n in self.steps[:-1]]
        last = self.steps[-1][1] if self.steps else 0
        falling = set(bits) <= {*BITS, 0} and bits == sorted(set(bits), reverse=True)
        whole = all(n is not None and n > 0 and n % self.group == 0 for n in lengths)
        told = (
            "bits of 8, 4, 2, 0 that fall from step to step, each for a multiple of "
            f"group={self.group} tokens, the last for None"
        )
        check(self.name, steps=(self.steps, falling and whole and last is None, told))
        if self.window is not None:
            told = "None with a step of 0 bits, whose mean is of all tokens"
            check(self.name, window=(self.window, 0 not in bits, told))
            check(
                self.name,
                window=integer_at_least(self.window, self.full + sum(n or 0 for n in lengths) + 2),
            )

    @property
    def mask(self) -> AttentionMask | None:
        """A Λ, where there is a window."""
        if self.window is None:
            return None
        return masks.lambda_shaped(self.window, self.num_sinks)

    def blocks(self, capacity: int) -> tuple[list[int], int | None]:
        """Groups of each zone that `capacity` tokens need, and how many tokens they are for at
        most; None: any number.
        """
        g, ahead = self.group, self.full // self.group
        needed = max(0, capacity - self.num_sinks)
        blocks, down = [max(1, min(ahead + 1, -(-needed // g)))], needed // g - ahead
        endless = self.window is not None or self.steps[-1][0] == 0
        limit = None if endless else capacity
        for bits, length in self.steps:
            room = down if length is None else length // g
            if bits == 0:
                room = 1
            if length is None and self.window is not None:
                room = -(-(self.window - 1) // g) - ahead
            if down < room:
                limit = capacity
            blocks.append(max(0, min(room, down)))
            down, ahead = down - room, ahead + room
        return blocks, limit

    def init(self, config: ModelConfig, batch: int, capacity: int) -> StaircaseCache:
        """Empty; zones that `capacity` tokens never come to are spared."""
        check_sees_no_future(config, capacity)
        g = self.group
        (first, *rest), limit = self.blocks(capacity)
        slots = first * g + round_up(self.num_sinks, g)
        full = FullZone.empty(config, batch, first, slots)
        zones: tuple[QuantizedZone | AveragedZone, ...] = tuple(
            QuantizedZone.empty(config, batch, blocks, bits, g)
            if bits
            else AveragedZone.empty(config, batch)
            for blocks, (bits, _) in zip(rest, self.steps, strict=True)
            if blocks
        )
        return StaircaseCache(full, zones, jnp.zeros(batch, jnp.int32), self, limit)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StaircaseCache:
    """Tokens in zones by age, see above.

    Attributes:
        full: the first zone: a ring of `full` tokens and of one group more, then the sinks.
        zones: the others, from the most bits to the fewest.
        lengths: tokens of each row so far.
        kind: the settings. Static.
        capacity: most tokens; None: any number. Static.
    """

    full: FullZone
    zones: tuple[QuantizedZone | AveragedZone, ...]
    lengths: Int[Array, "B"]
    kind: Staircase = dataclasses.field(metadata={"static": True})
    capacity: int | None = dataclasses.field(metadata={"static": True})

    axes: ClassVar = ROWS_AND_HEADS

    @property
    def mask(self) -> AttentionMask | None:
        """What it keeps for each query; None: all."""
        return self.kind.mask

    def layer(self, index: int | Int[Array, ""]) -> ZonedLayer:
        """What a layer attends to."""
        zones = tuple(zone.layer(index) for zone in self.zones)
        return ZonedLayer(self.full.layer(index), zones, self.mask)

    @property
    def appendable(self) -> Int[Array, "B"] | None:
        """Tokens of each row before the one with which a group goes down."""
        if not self.zones:
            return None
        g, counted = self.kind.group, self.lengths - self.kind.num_sinks
        complete = jnp.maximum(counted // g, self.kind.full // g)
        return (complete + 1) * g - counted - 1

    def commit(
        self,
        kv: tuple[Float[Array, "L B T K H"], ...],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
    ) -> StaircaseCache:
        """Writes T tokens, a group at a time; as many commits of one token give the same bits.

        More than `capacity` tokens are an error where `lengths` is known, and NaN under `jit`.
        """
        count = (segment_ids != 0).sum(1, dtype=jnp.int32)
        kv = self._checked(kv, count)
        keys, values = (split_stacks(self.full.keys, x.swapaxes(2, 3)) for x in kv)
        new = Group(tuple(keys), tuple(values), positions, segment_ids)
        if positions.shape[1] == 1:
            return self._turn(new, jnp.zeros_like(count), count)[0]
        new = _padded(new, self.kind.group)

        def more(state: tuple) -> Array:
            return (state[1] < count).any()

        def turn(state: tuple) -> tuple:
            return state[0]._turn(new, state[1], count)

        return jax.lax.while_loop(more, turn, (self, jnp.zeros_like(count)))[0]

    def _checked(self, kv: tuple[Array, ...], count: Int[Array, "B"]) -> tuple[Array, ...]:
        """What is to be written, NaN where there is no room for it."""
        if self.capacity is None:
            return kv
        over = self.lengths + count > self.capacity
        if not isinstance(over, jax.core.Tracer) and over.any():
            most = int((self.lengths + count).max())
            raise ValueError(f"{most} tokens; allowed: at most capacity={self.capacity}")
        mask = over[None, :, None, None, None]
        return tuple(jnp.where(mask, jnp.asarray(jnp.nan, x.dtype), x) for x in kv)

    def _turn(
        self, new: Group, done: Int[Array, "B"], count: Int[Array, "B"]
    ) -> tuple[StaircaseCache, Int[Array, "B"]]:
        """Writes what comes after the first `done` of `count` new tokens, up to the end of each
        row's group, and hands groups down where one is complete.

        Args:
            new: one token a row, or several with a group's padding on both sides.
        """
        g, sinks, first = self.kind.group, self.kind.num_sinks, self.full.blocks
        early = self.lengths < sinks
        at = jnp.where(early, self.lengths, self.lengths - sinks)
        block = jnp.where(early, first + at // g, at // g % first)
        left = jnp.where(early, jnp.minimum(g - at % g, sinks - at), g - at % g)
        now = jnp.minimum(count - done, left)
        one = new.positions.shape[1] == 1
        lead = jnp.zeros_like(at) if one else at % g  # slots in front of the new tokens
        start = block * g + at % g - lead
        width = 1 if one else g

        def write(row: Array, full: FullZone) -> FullZone:
            tokens = jnp.arange(width) - lead[row]
            source = 0 if one else g + done[row] - lead[row]
            part = _cut_tokens(new, row, source, width)
            return full.write(row, start[row], part, (tokens >= 0) & (tokens < now[row]))

        lengths = self.lengths + now
        full = jax.lax.fori_loop(0, len(now), write, self.full)
        cache = dataclasses.replace(self, full=full, lengths=lengths)
        complete = (now > 0) & (lengths > sinks) & ((lengths - sinks) % g == 0)
        return cache._handed_down(complete), done + now

    def _handed_down(self, complete: Bool[Array, "B"]) -> StaircaseCache:
        """With a group of each of these rows one zone further down, in each zone.

        A loop over those rows alone: at most steps of decoding it takes no turn.
        """
        if not self.zones:
            return self
        g = self.kind.group
        rows = jnp.argsort(~complete, stable=True)
        groups = (self.lengths - self.kind.num_sinks) // g

        def down(i: Array, state: tuple) -> tuple:
            full, zones = state
            row, zones = rows[i], list(zones)
            age = self.kind.full // g + 1
            ages = [age + sum(zone.blocks for zone in zones[:z]) for z in range(len(zones))]
            for z in reversed(range(len(zones))):
                group = groups[row] - ages[z]
                there, known = group >= 0, jnp.maximum(group, 0)
                if z:
                    moved = zones[z - 1].take(row, known % zones[z - 1].blocks)
                else:
                    start = known % full.blocks * g
                    moved = full.take(row, start, g)
                    full = full.forget(row, start, g, there)
                zones[z] = zones[z].put(row, known % zones[z].blocks, moved, there)
            return full, tuple(zones)

        full, zones = jax.lax.fori_loop(0, complete.sum(), down, (self.full, self.zones))
        return dataclasses.replace(self, full=full, zones=zones)

    def reorder(self, rows: Int[Array, "B"]) -> StaircaseCache:
        """Row i becomes what row `rows[i]` was."""
        return reorder_rows(self, rows)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, whose codes have scales beside them, and of their sums."""
        full = self.full.keys, self.full.values
        parts = full, [(zone.keys, zone.values) for zone in self.zones]
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(parts))


def _padded(new: Group, group: int) -> Group:
    """With so many tokens more on both sides, which are never written."""

    def wider(x: Array, axis: int) -> Array:
        widths = [(0, 0)] * x.ndim
        widths[axis] = (group, group)
        return jnp.pad(x, widths)

    keys, values = jax.tree.map(lambda x: wider(x, TIME), (new.keys, new.values))
    return Group(keys, values, wider(new.positions, 1), wider(new.segment_ids, 1))


def _cut_tokens(new: Group, row: Array, start: Array | int, length: int) -> Group:
    """Some of one row's."""

    def cut(x: Array) -> Array:
        x = jax.lax.dynamic_slice_in_dim(x, row, 1, 0 if x.ndim == 2 else 1)
        return jax.lax.dynamic_slice_in_dim(x, start, length, 1 if x.ndim == 2 else TIME)

    return jax.tree.map(cut, new)
