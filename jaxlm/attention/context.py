"""Rows cut over the mesh's context axis: how a device's queries meet the keys of the others.

    (attend)     keys and values of all tokens come to each device
    ring         they go round from device to device: `jaxlm.attention.ring`; under a mask that does
                 not reach far only from the devices before: `jaxlm.attention.halo`
    all_to_all   each device takes all tokens of some heads: `jaxlm.attention.all_to_all`

Of T tokens, N query and K key/value heads on P devices, each sends in a forward pass about
2·K·T·(P-1)/P numbers where they are gathered, as many in a ring, and 2·(N + K)·T/P all to all. In a
ring it holds two parts of the keys at a time, not P, and all have equal shares of a causal mask.
"""

from __future__ import annotations

import dataclasses

import jax
from jaxtyping import Array, Float

from jaxlm.attention.all_to_all import attend_all_to_all
from jaxlm.attention.attend import attend
from jaxlm.attention.halo import attend_halo, parts_before, reach_of
from jaxlm.attention.inputs import AttentionInputs, AttentionSpec, with_sink_logits
from jaxlm.attention.on_mesh import Axes, attend_on_mesh
from jaxlm.attention.ring import attend_ring
from jaxlm.sharding.mesh import CONTEXT

FORMS = ("ring", "all_to_all")
TOKENS: Axes = ("batch", "length", "kv_heads")
# Of `AttentionInputs`; the rest is a head's.
AXES = dict.fromkeys(("q", "k", "v", "q_far", "k_far"), TOKENS)
AXES |= dict.fromkeys(("q_positions", "k_positions"), TOKENS[:2])
AXES |= dict.fromkeys(("q_segment_ids", "k_segment_ids"), TOKENS[:2])


def attend_over_context(
    form: str, spec: AttentionSpec, x: AttentionInputs
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """`attend` of tokens to one another, in one of `FORMS`; on a mesh without a context axis, and
    where its devices cannot have equal and even numbers of tokens, `attend` itself.

    Raises:
        ValueError: heads that cannot be shared out all to all.
    """
    parts = jax.sharding.get_abstract_mesh().shape.get(CONTEXT, 1)
    length = x.q.shape[1]
    if parts == 1 or length % (2 * parts):
        return attend(spec, x)

    def here(part: AttentionInputs) -> tuple[Array, Array]:
        return attend_all_to_all(spec, part) if form == "all_to_all" else _round(spec, part)

    return attend_on_mesh(here, x, AXES)


def _round(spec: AttentionSpec, x: AttentionInputs) -> tuple[Array, Array]:
    """From the devices before, if that is fewer than all."""
    reach = reach_of(spec.mask) if spec.aligned else None
    if reach and parts_before(reach, x.q.shape[1]) < jax.lax.axis_size(CONTEXT) - 1:
        return attend_halo(spec, x, reach)
    out, lse = attend_ring(spec, dataclasses.replace(x, sink_logits=None))
    return (out, lse) if x.sink_logits is None else with_sink_logits(out, lse, x.sink_logits)
