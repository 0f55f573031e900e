"""Our attention kernels, as cases of launch.aot."""

from __future__ import annotations

import jax
from jax.sharding import Mesh

from kernels import flash_attention as ours
from kernels.chip import target_chip
from launch.kernel_peers import Program, struct, with_gradients


def flash_attention(
    mesh: Mesh,
    length: int,
    heads: int,
    head_dim: int,
    kv_heads: int | None = None,
    dtype: str = "bfloat16",
    backward: bool = False,
) -> Program:
    """kernels.flash_attention: causal, one row, the chip's own block sizes."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        chip, scale = target_chip() or "v5e", head_dim**-0.5
        return ours.flash_attention(q, k, v, scale=scale, chip=chip)[0]

    q = struct(mesh, 1, heads, length, head_dim, dtype=dtype)
    k = struct(mesh, 1, kv_heads or heads, length, head_dim, dtype=dtype)
    return with_gradients(attend) if backward else attend, [q, k, k]
