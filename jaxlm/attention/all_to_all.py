"""Rows of which each device has a part: each takes all tokens of some heads instead, and gives the
parts of the outputs back.

DeepSpeed Ulysses (Jacobs et al. 2023, arXiv 2309.14509). Rows are whole then, so every kernel does
its work as on one device; there are at most as many devices as heads.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.attention.inputs import AttentionInputs, AttentionSpec
from jaxlm.attention.local import attend_local
from jaxlm.sharding.mesh import CONTEXT


def check_heads(num_heads: int, num_kv_heads: int, parts: int) -> None:
    """Raises ValueError where the heads of a device cannot be shared out over `parts` devices."""
    if num_heads % math.lcm(num_kv_heads, parts):
        fits = [n for n in range(1, num_heads + 1) if not num_heads % math.lcm(num_kv_heads, n)]
        raise ValueError(
            f"attention.implementation='all_to_all' with mesh.context={parts} and {num_heads} "
            f"query and {num_kv_heads} key/value heads a device of mesh.tensor; allowed: context = "
            f"{', '.join(map(str, fits))}"
        )


def attend_all_to_all(spec: AttentionSpec, x: AttentionInputs) -> tuple[Any, Any]:
    """Softmax attention to all parts of the rows; on each device of the context axis, as
    `jax.shard_map` runs it.

    Args:
        spec: the static description.
        x: this device's part of rows cut in order, with all heads; where key/value heads are fewer
            than devices, several devices take the same one.

    Returns:
        As `jaxlm.attention.attend.attend`, of this part.

    Raises:
        ValueError: heads that cannot be shared out, see `check_heads`.
    """
    parts, num_heads, num_kv_heads = jax.lax.axis_size(CONTEXT), x.q.shape[2], x.k.shape[2]
    check_heads(num_heads, num_kv_heads, parts)
    copies = math.lcm(num_kv_heads, parts) // num_kv_heads

    def queries(a: Any) -> Any:
        """[B, T / P, N, H] → [B, T, N / P, H]."""
        return None if a is None else jax.lax.all_to_all(a, CONTEXT, 2, 1, tiled=True)

    def keys(a: Any) -> Any:
        return None if a is None else queries(jnp.repeat(a, copies, axis=2))

    def heads(a: Any) -> Any:
        """[N, …] → [N / P, …]."""
        each = num_heads // parts
        return jax.lax.dynamic_slice_in_dim(a, jax.lax.axis_index(CONTEXT) * each, each)

    def back(a: Any) -> Any:
        return jax.lax.all_to_all(a, CONTEXT, 1, 2, tiled=True)

    tokens = ("q_positions", "k_positions", "q_segment_ids", "k_segment_ids")
    whole = {n: jax.lax.all_gather(getattr(x, n), CONTEXT, axis=1, tiled=True) for n in tokens}
    out, lse = attend_local(
        spec,
        dataclasses.replace(
            x,
            q=queries(x.q),
            k=keys(x.k),
            v=keys(x.v),
            q_far=queries(x.q_far),
            k_far=keys(x.k_far),
            head_parameters=jax.tree.map(heads, x.head_parameters),
            sink_logits=None if x.sink_logits is None else heads(x.sink_logits),
            **whole,
        ),
    )
    return back(out), back(lse)
