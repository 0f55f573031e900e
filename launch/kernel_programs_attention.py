"""Our attention kernels as cases of launch.aot."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh

from kernels.flash_attention import flash_attention as kernel
from launch.kernel_peers import Program, struct, with_gradients


def flash_attention(
    mesh: Mesh,
    chip: str,
    length: int,
    heads: int,
    head_dim: int,
    kv_heads: int | None = None,
    window: int | None = None,
    backward: bool = False,
    **options: Any,
) -> Program:
    """Causal, one row."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        scale = head_dim**-0.5
        return kernel(q, k, v, scale=scale, window=window, chip=chip, **options)[0]

    q = struct(mesh, 1, heads, length, head_dim)
    k = struct(mesh, 1, kv_heads or heads, length, head_dim)
    return with_gradients(attend) if backward else attend, [q, k, k]
