"""Public kernels and plain jnp of the same jobs, as cases of launch.aot: what ours must beat.

Each takes a mesh of one device and sizes; it returns a function and the shapes of its arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import flash_attention as flash
from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as lists
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Program = tuple[Callable[..., Any], list[jax.ShapeDtypeStruct]]


def struct(mesh: Mesh, *shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    """An argument that lies whole on the device."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))


def with_gradients(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Forward, and backward with respect to all arguments. The output's gradient is the queries, of
    its shape: of a constant one XLA would make sums, which training has not.
    """

    def gradients(*x: jax.Array) -> Any:
        out, back = jax.vjp(function, *x)
        return back(x[0].astype(out.dtype))

    return gradients


def flash_attention(
    mesh: Mesh, length: int, heads: int, head_dim: int, block: int, backward: bool = False
) -> Program:
    """jax.experimental.pallas.ops.tpu.flash_attention: causal, one row, one size for all blocks."""
    sizes = flash.BlockSizes(
        block_b=1,
        **dict.fromkeys(("block_q", "block_k_major", "block_k"), block),
        **dict.fromkeys(("block_q_major_dkv", "block_k_major_dkv"), block),
        **dict.fromkeys(("block_k_dkv", "block_q_dkv"), block),
        **dict.fromkeys(("block_k_major_dq", "block_k_dq", "block_q_dq"), block),
    )

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        scale = head_dim**-0.5
        return flash.flash_attention(q, k, v, causal=True, sm_scale=scale, block_sizes=sizes)

    arguments = [struct(mesh, 1, heads, length, head_dim)] * 3
    return with_gradients(attend) if backward else attend, arguments


def splash_attention(
    mesh: Mesh,
    length: int,
    heads: int,
    head_dim: int,
    block: int,
    causal: bool = True,
    backward: bool = False,
) -> Program:
    """jax.experimental.pallas.ops.tpu.splash_attention: one row. Where all keys are seen there are
    no lists of blocks, and how long it runs is no data.
    """
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        use_fused_bwd_kernel=True,
    )
    if causal:
        mask = masks.MultiHeadMask([masks.CausalMask((length, length))] * heads)
        kernel = splash.make_splash_mha_single_device(mask, block_sizes=sizes)
    else:
        nothing = lists.MaskInfo(None, None, None, None, None)
        kernel = splash.SplashAttentionKernel(
            nothing,
            None,
            nothing,
            block_sizes=sizes,
            is_mqa=False,
            save_residuals=False,
            mask_value=splash.DEFAULT_MASK_VALUE,
            attn_logits_soft_cap=None,
            residual_checkpoint_name=None,
            mask_function=None,
            interpret=False,
        )

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return kernel(q * head_dim**-0.5, k, v)

    arguments = [struct(mesh, heads, length, head_dim)] * 3
    return with_gradients(attend) if backward else attend, arguments


def tokamax_splash_attention(
    mesh: Mesh,
    length: int,
    heads: int,
    head_dim: int,
    block: int,
    causal: bool = True,
    backward: bool = False,
) -> Program:
    """tokamax's form of splash attention, one row: pip install -e '.[peers]'."""
    from tokamax._src.ops.experimental.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    sizes = splash_attention_kernel.SplashConfig(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block
    )
    mask = splash_attention_mask.CausalMask if causal else splash_attention_mask.FullMask
    kernel = splash_attention_kernel.make_splash_mha_single_device(
        mask((length, length)), config=sizes
    )

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return kernel(q * head_dim**-0.5, k, v)

    arguments = [struct(mesh, heads, length, head_dim)] * 3
    return with_gradients(attend) if backward else attend, arguments


def plain_copy(mesh: Mesh, batch: int, tokens: int, heads: int, head_dim: int) -> Program:
    """New keys and values as they are, but for their sign: that XLA would leave out."""

    def negate(k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        return -k, -v

    return negate, [struct(mesh, batch, heads, tokens, head_dim)] * 2


def plain_decode(mesh: Mesh, batch: int, capacity: int, heads: int, head_dim: int) -> Program:
    """One query a row against a dense cache, as plain jnp."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array) -> jax.Array:
        scores = jnp.einsum("bnh,bnsh->bns", q, k, preferred_element_type=jnp.float32)
        seen = jnp.arange(capacity)[None, None] < lengths[:, None, None]
        weights = jax.nn.softmax(jnp.where(seen, scores * head_dim**-0.5, -1e30), -1)
        return jnp.einsum("bns,bnsh->bnh", weights.astype(q.dtype), v)

    cache = struct(mesh, batch, heads, capacity, head_dim)
    lengths = struct(mesh, batch, dtype=jnp.int32)
    return attend, [struct(mesh, batch, heads, head_dim), cache, cache, lengths]


def paged_decode(
    mesh: Mesh, batch: int, capacity: int, heads: int, head_dim: int, page: int, pages: int
) -> Program:
    """jax.experimental.pallas.ops.tpu.paged_attention: `pages` pages at a time."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, lengths: Any, table: Any) -> jax.Array:
        return paged_attention(q, k, v, lengths, table, pages_per_compute_block=pages)

    cache = struct(mesh, heads, batch * capacity // page, page, head_dim)
    lengths = struct(mesh, batch, dtype=jnp.int32)
    table = struct(mesh, batch, capacity // page, dtype=jnp.int32)
    return attend, [struct(mesh, batch, heads, head_dim), cache, cache, lengths, table]


def ragged_paged_decode(
    mesh: Mesh, batch: int, capacity: int, heads: int, head_dim: int, page: int, pages: int
) -> Program:
    """jax.experimental.pallas.ops.tpu.ragged_paged_attention: one query a row."""

    def attend(
        q: jax.Array, cache: jax.Array, lengths: Any, table: Any, starts: Any, rows: Any
    ) -> jax.Array:
        return ragged_paged_attention(
            *(q, cache, lengths, table, starts, rows),
            sm_scale=head_dim**-0.5,
            num_kv_pages_per_block=pages,
            num_queries_per_block=8,
            vmem_limit_bytes=64 << 20,
        )

    def integers(*shape: int) -> jax.ShapeDtypeStruct:
        return struct(mesh, *shape, dtype=jnp.int32)

    queries = struct(mesh, batch, heads, head_dim)
    cache = struct(mesh, batch * capacity // page, page, 2 * heads, head_dim)
    table = integers(batch, capacity // page)
    return attend, [queries, cache, integers(batch), table, integers(batch + 1), integers(1)]
