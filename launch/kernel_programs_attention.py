"""Our attention kernels, as cases of launch.aot."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh

from jaxlm.attention import mask as masks
from kernels import block_sampled_attention as sampled
from kernels import flash_attention as ours
from kernels.flash_attention.blocks import Blocks
from launch.kernel_peers import Program, struct, with_gradients


def flash_attention(
    mesh: Mesh,
    length: int,
    heads: int,
    head_dim: int,
    kv_heads: int | None = None,
    dtype: str = "bfloat16",
    backward: bool = False,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sizes: dict[str, int] | None = None,
) -> Program:
    """kernels.flash_attention of one row; `sizes` are fields of Blocks, those of the chip's
    table where there are none.
    """
    blocks = None if sizes is None else (Blocks(**sizes),) * 2

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        options: dict[str, Any] = {"window": window, "softcap": softcap, "blocks": blocks}
        options |= {"scale": head_dim**-0.5, "ahead": 0 if causal else None}
        return ours.flash_attention(q, k, v, **options)[0]

    q = struct(mesh, 1, heads, length, head_dim, dtype=dtype)
    k = struct(mesh, 1, kv_heads or heads, length, head_dim, dtype=dtype)
    return with_gradients(attend) if backward else attend, [q, k, k]


def lambda_attention(
    mesh: Mesh,
    length: int,
    heads: int,
    head_dim: int,
    window: int,
    num_sinks: int,
    backward: bool = False,
) -> Program:
    """Λ-attention of one document: bfloat16, with queries and keys of their own for the sinks."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, q_far: Any, k_far: Any) -> jax.Array:
        sinks = ours.Sinks(num_sinks, q_far, k_far)
        options: dict[str, Any] = {"scale": head_dim**-0.5, "window": window, "sinks": sinks}
        return ours.flash_attention(q, k, v, **options)[0]

    x = struct(mesh, 1, heads, length, head_dim)
    return with_gradients(attend) if backward else attend, [x] * 5


def packed_lambda_attention(
    mesh: Mesh, rows: int, length: int, heads: int, head_dim: int, window: int, num_sinks: int
) -> Program:
    """Λ-attention of rows of packed documents, forward: bfloat16."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> jax.Array:
        sinks = ours.Sinks(num_sinks)
        options: dict[str, Any] = {"scale": head_dim**-0.5, "window": window, "sinks": sinks}
        return ours.flash_attention(q, k, v, ids, **options)[0]

    x = struct(mesh, rows, heads, length, head_dim)
    return attend, [x, x, x, struct(mesh, rows, length, dtype="int32")]


def biased_attention(
    mesh: Mesh, length: int, heads: int, head_dim: int, backward: bool = False
) -> Program:
    """Causal, bfloat16, with a trained bias of the distance."""
    return _by_distance("bias", mesh, length, heads, head_dim, backward)


def damped_attention(
    mesh: Mesh, length: int, heads: int, head_dim: int, backward: bool = False
) -> Program:
    """Causal, bfloat16, with a factor of the distance."""
    return _by_distance("factor", mesh, length, heads, head_dim, backward)


def _by_distance(
    name: str, mesh: Mesh, length: int, heads: int, head_dim: int, backward: bool
) -> Program:
    def attend(q: jax.Array, k: jax.Array, v: jax.Array, vector: jax.Array) -> jax.Array:
        options: dict[str, Any] = {"scale": head_dim**-0.5, name: vector}
        return ours.flash_attention(q, k, v, **options)[0]

    x = struct(mesh, 1, heads, length, head_dim)
    vector = struct(mesh, heads, 2 * length - 1, dtype="float32")
    return with_gradients(attend) if backward else attend, [x, x, x, vector]


def fire_attention(
    mesh: Mesh, length: int, heads: int, head_dim: int, width: int = 32, backward: bool = False
) -> Program:
    """Causal, bfloat16, with FIRE's network."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, *fire: jax.Array) -> jax.Array:
        return ours.flash_attention(q, k, v, scale=head_dim**-0.5, fire=ours.Fire(*fire))[0]

    x = struct(mesh, 1, heads, length, head_dim)
    shapes = [(2 * length - 1,), (1, length), (width,), (width,), (heads, width), (heads,)]
    fire = [struct(mesh, *shape, dtype="float32") for shape in shapes]
    return with_gradients(attend) if backward else attend, [x, x, x, *fire]


def packed_attention(
    mesh: Mesh, length: int, heads: int, head_dim: int, backward: bool = False
) -> Program:
    """Causal, bfloat16, a row of several documents, as training packs them."""

    def program(ids: jax.Array, *trained: jax.Array) -> Any:
        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return ours.flash_attention(q, k, v, ids, scale=head_dim**-0.5)[0]

        return (with_gradients(attend) if backward else attend)(*trained)

    x = struct(mesh, 1, heads, length, head_dim)
    return program, [struct(mesh, 1, length, dtype="int32"), x, x, x]


def attention_at(
    mesh: Mesh, length: int, heads: int, head_dim: int, backward: bool = False
) -> Program:
    """Λ-shaped, bfloat16, of tokens in any order, with slopes of the distance."""
    mask = masks.lambda_shaped(length // 2, 16)

    def program(at: jax.Array, ids: jax.Array, slopes: jax.Array, *trained: jax.Array) -> Any:
        tokens = ours.At(at, ids)

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            options: dict[str, Any] = {"mask": mask, "scale": head_dim**-0.5, "slopes": slopes}
            return ours.flash_attention_at(q, k, v, tokens, tokens, **options)[0]

        return (with_gradients(attend) if backward else attend)(*trained)

    tokens = [struct(mesh, 1, length, dtype="int32")] * 2
    x = struct(mesh, 1, heads, length, head_dim)
    return program, [*tokens, struct(mesh, heads, dtype="float32"), x, x, x]


def attention_of_a_part(
    mesh: Mesh,
    length: int,
    parts: int,
    heads: int,
    head_dim: int,
    window: int,
    num_sinks: int,
    backward: bool = False,
) -> Program:
    """Λ-attention of one of several parts of a packed row, bfloat16, with a trained bias."""

    def program(ids: jax.Array, first: jax.Array, *trained: jax.Array) -> Any:
        def attend(q: Any, k: Any, v: Any, k_far: Any, bias: Any) -> jax.Array:
            sinks = ours.Sinks(num_sinks, q, k_far)
            options = {"scale": head_dim**-0.5, "window": window, "first_query": first}
            return ours.flash_attention(q, k, v, ids, bias=bias, sinks=sinks, **options)[0]

        return (with_gradients(attend) if backward else attend)(*trained)

    q = struct(mesh, 1, heads, length // parts, head_dim)
    k = struct(mesh, 1, heads, length, head_dim)
    bias = struct(mesh, heads, 2 * length - 1, dtype="float32")
    tokens = [struct(mesh, 1, length, dtype="int32"), struct(mesh, dtype="int32")]
    return program, [*tokens, q, k, k, k, bias]


def block_sampled_attention(
    mesh: Mesh,
    length: int,
    heads: int,
    head_dim: int,
    kv_heads: int | None = None,
    dtype: str = "bfloat16",
    block: int = 512,
    backward: bool = False,
) -> Program:
    """kernels.block_sampled_attention as training calls it: a row of several documents, one sink
    block, the drawing in the program.
    """
    probabilities = sampled.decaying_probabilities(-(-length // block))

    def program(ids: jax.Array, *trained: jax.Array) -> Any:
        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            sample = sampled.sample_distances(jax.random.key(0), probabilities)
            sizes = {"scale": head_dim**-0.5, "block": block, "sink_blocks": 1}
            return sampled.block_sampled_attention(q, k, v, sample, ids, **sizes)[0]

        return (with_gradients(attend) if backward else attend)(*trained)

    q = struct(mesh, 1, heads, length, head_dim, dtype=dtype)
    k = struct(mesh, 1, kv_heads or heads, length, head_dim, dtype=dtype)
    return program, [struct(mesh, 1, length, dtype="int32"), q, k, k]
