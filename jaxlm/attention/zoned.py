"""A few new tokens attending to a cache that keeps older ones in fewer bits, and to each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.attention.averaged import AveragedLayer
from jaxlm.attention.cached import Part, attend_parts, met, part_of_slots
from jaxlm.attention.decode_zones import attend_zones, unsupported
from jaxlm.attention.inputs import AttentionInputs, AttentionSpec, CachedLayer
from jaxlm.attention.layer_view import FarKeys, NearKeys
from jaxlm.attention.mask import AttentionMask
from jaxlm.attention.quantized_layer import QuantizedLayer
from jaxlm.attention.reference import scores, visible
from jaxlm.attention.weighted_codes import weighted_codes

# Of a zone, that are numbers at one time; a multiple of the kernels' 128.
TOKENS = 256


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ZonedLayer:
    """A layer of a cache of several precisions: see `jaxlm.attention.layer_view`.

    Attributes:
        full: tokens as they are.
        zones: the others.
        mask: what the cache keeps for each query, whatever still lies there; None: all. Static.
    """

    full: CachedLayer
    zones: tuple[QuantizedLayer | AveragedLayer, ...]
    mask: AttentionMask | None = dataclasses.field(default=None, metadata={"static": True})

    def attend(
        self,
        spec: AttentionSpec,
        new: AttentionInputs,
        near_keys: NearKeys | None = None,
        far_keys: FarKeys | None = None,
    ) -> Float[Array, "B T N H"]:
        """Attention of T new queries to [zones ‖ new tokens], in O(T·(S + T)) memory.

        On a TPU by the kernel for what it does, see `jaxlm.attention.decode_zones.unsupported`.
        """
        if self.mask is not None:
            spec = dataclasses.replace(spec, mask=spec.mask & self.mask)
        averaged = tuple(zone for zone in self.zones if isinstance(zone, AveragedLayer))
        quantized = tuple(zone for zone in self.zones if isinstance(zone, QuantizedLayer))
        if near_keys is None and unsupported(spec, new, self.full, quantized) is None:
            return attend_zones(spec, new, self.full, quantized, averaged)
        full = part_of_slots(spec, new, self.full, near_keys, far_keys)
        rest = [_part(spec, new, zone, near_keys, far_keys) for zone in quantized]
        rest += [zone.part(spec, new, near_keys, far_keys) for zone in averaged]
        return attend_parts(spec, new, [full, *rest])


def _part(
    spec: AttentionSpec,
    new: AttentionInputs,
    zone: QuantizedLayer,
    near_keys: NearKeys | None,
    far_keys: FarKeys | None,
) -> Part:
    """Codes, which become numbers a block at a time: all of them would be a cache in full."""
    there = zone.positions, zone.segment_ids
    S = zone.positions.shape[1]

    def scored(start: Array, length: int) -> Array:
        at = [jax.lax.dynamic_slice_in_dim(x, start, length, 1) for x in there]
        k = zone.block_of_keys(start, length, new.k.dtype)
        v = jnp.zeros_like(k)  # no score needs them
        return scores(spec, met(new, k, v, at[0], at[1], near_keys, far_keys))

    def weighted(p: Array) -> Array:
        if p.shape[2] == 1:
            row = p[:, :, 0].astype(jnp.float32)
            return weighted_codes(row, zone.cut_out()[1])[:, :, None].astype(p.dtype)

        def added(start: Array, length: int, total: Array) -> Array:
            v = zone.block_of_values(start, length, new.v.dtype)
            part = jax.lax.dynamic_slice_in_dim(p, start, length, 3)
            dims = (((3,), (2,)), ((0, 1), (0, 1)))
            dots = jax.lax.dot_general(part, v, dims, preferred_element_type=jnp.float32)
            return total + dots

        zeros = jnp.zeros((*p.shape[:3], new.v.shape[3]), jnp.float32)
        return _over_blocks(added, S, zeros).astype(p.dtype)

    def placed(start: Array, length: int, all_scores: Array) -> Array:
        part = scored(start, length)
        return jax.lax.dynamic_update_slice_in_dim(all_scores, part, start, 3)

    B, T, N = new.q.shape[:3]
    where = {"k_positions": zone.positions, "k_segment_ids": zone.segment_ids}
    seen = visible(spec, dataclasses.replace(new, tree=None, **where))
    return Part(seen, _over_blocks(placed, S, jnp.zeros((B, N, T, S), jnp.float32)), weighted)


def _over_blocks(step: Callable[[Array, int, Array], Array], tokens: int, x: Array) -> Array:
    """step(first token, tokens of a block, what came of the blocks before) over all blocks."""
    whole, rest = divmod(tokens, TOKENS)
    if whole:
        x = jax.lax.fori_loop(0, whole, lambda i, x: step(i * TOKENS, TOKENS, x), x)
    return step(jnp.asarray(whole * TOKENS), rest, x) if rest else x
