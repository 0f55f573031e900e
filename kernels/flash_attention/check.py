"""What the kernels take, and errors that say so."""

from __future__ import annotations

import math
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels.flash_attention.fire import Fire
from kernels.flash_attention.places import At, Mask

HEAD_DIMS = (64, 80, 96, 128, 192, 256)
DTYPES = (jnp.bfloat16, jnp.float32)
LARGEST = 2**31 - 1  # distance or position: they are int32
SHORTEST_WINDOW = 128  # beside sinks: no block is shorter


class Sinks(NamedTuple):
    """The first tokens of each segment, seen from any distance: Λ-attention (LM-Infinite, arXiv
    2308.16137, section 4) and streaming with attention sinks.

    Attributes:
        num: positions below it are sinks.
        q: [batch, heads, length, head_dim], queries as they meet a sink out of the window, that is
            at a distance of `window` or more; None: as ever.
        k: [batch, kv_heads, length, head_dim], keys as they are met there; None: as ever.
        bias: [heads], added to capped scores there; None: 0.
        factor: [heads], multiplies them before that, without a gradient; None: 1.
    """

    num: int
    q: jax.Array | None = None
    k: jax.Array | None = None
    bias: jax.Array | None = None
    factor: jax.Array | None = None


def check(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None = None,
    positions: jax.Array | None = None,
    first_query: jax.Array | None = None,
) -> None:
    """Of the arrays that every call has.

    Raises:
        ValueError: a shape or dtype that the kernels do not take.
    """
    _check_heads(q, k, v, first_query is None)
    T, S = q.shape[2], k.shape[2]
    if first_query is not None:
        _check_int32("first_query", first_query, ())
        if T % 128 or T > S:
            raise ValueError(
                f"first_query with {T} queries of {S} tokens; allowed: a multiple of 128, no more "
                "than the tokens"
            )
    for name, array in (("segment_ids", segment_ids), ("positions", positions)):
        if array is not None:
            _check_int32(name, array, (q.shape[0], S))


def check_places(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_at: At,
    k_at: At,
    mask: Mask,
    slopes: jax.Array | None,
    ceiling: int | None,
) -> None:
    """Of `flash_attention_at`.

    Raises:
        ValueError: a shape, dtype or mask that the kernels do not take.
    """
    _check_heads(q, k, v, same_length=False)
    B, N = q.shape[:2]
    for side, at, length in (("q_at", q_at, q.shape[2]), ("k_at", k_at, k.shape[2])):
        for name, array in zip(At._fields, at, strict=True):
            _check_int32(f"{side}.{name}", array, (B, length))
    verbs = "visible", "touches", "covers"
    if not all(callable(getattr(mask, verb, None)) for verb in verbs):
        raise ValueError(f"mask={mask!r}; allowed: what has visible, touches and covers")
    if slopes is not None:
        _check_floats("slopes", slopes, (N,))
    _check_integer("ceiling", ceiling, 0)


def check_scores(scale: float, softcap: float | None) -> None:
    """Of what changes every score.

    Raises:
        ValueError: a number that is none.
    """
    if not isinstance(scale, numbers.Real) or not math.isfinite(scale):
        raise ValueError(f"scale={scale!r}; allowed: a finite Python number")
    if softcap is not None and not (
        isinstance(softcap, numbers.Real) and 0 < softcap < float("inf")
    ):
        raise ValueError(f"softcap={softcap!r}; allowed: None or a finite Python number > 0")


def _check_heads(q: jax.Array, k: jax.Array, v: jax.Array, same_length: bool) -> None:
    shapes = q.shape, k.shape, v.shape
    if not (
        all(len(shape) == 4 and all(shape) for shape in shapes)
        and k.shape == v.shape
        and (q.shape[0], q.shape[3]) == (k.shape[0], k.shape[3])
        and q.shape[1] % k.shape[1] == 0
        and (q.shape[2] == k.shape[2] or not same_length)
    ):
        raise ValueError(
            f"q, k, v of shapes {', '.join(map(str, shapes))}; allowed: [batch, heads, length, "
            "head_dim] and twice [batch, kv_heads, length, head_dim], heads a multiple of "
            "kv_heads, none of them 0"
        )
    if q.shape[3] not in HEAD_DIMS:
        raise ValueError(f"head_dim={q.shape[3]}; allowed: {', '.join(map(str, HEAD_DIMS))}")
    if not (q.dtype == k.dtype == v.dtype and q.dtype in DTYPES):
        raise ValueError(
            f"dtypes {q.dtype}, {k.dtype}, {v.dtype}; allowed: all bfloat16 or all float32"
        )


def _check_int32(name: str, array: Any, shape: tuple[int, ...]) -> None:
    if jnp.shape(array) != shape or jnp.result_type(array) != jnp.int32:
        raise ValueError(f"{name}: {_kind(array)}; allowed: int32 of shape {shape}")


def _check_floats(name: str, array: Any, shape: tuple[int, ...]) -> None:
    if jnp.shape(array) != shape or not jnp.issubdtype(jnp.result_type(array), jnp.floating):
        raise ValueError(f"{name}: {_kind(array)}; allowed: floating point of shape {shape}")


def _kind(array: Any) -> str:
    return f"{jnp.result_type(array)} of shape {jnp.shape(array)}"


def _check_integer(name: str, value: Any, least: int) -> None:
    if value is not None and not _is_integer(value, least):
        allowed = f"None or an integer from {least} to {LARGEST}"
        raise ValueError(f"{name}={value!r}; allowed: {allowed}")


def _is_integer(value: Any, least: int) -> bool:
    return isinstance(value, numbers.Integral) and least <= int(value) <= LARGEST


def check_options(
    q: jax.Array,
    k: jax.Array,
    ahead: int | None,
    window: int | None,
    bias: jax.Array | None,
    factor: jax.Array | None,
    prefix: int | None,
    sinks: Sinks | None,
    fire: Fire | None,
) -> None:
    """Of a pattern, and of what changes scores by the distance.

    Raises:
        ValueError: patterns that do not go together, or a shape or dtype that is not theirs.
    """
    N, S = q.shape[1], k.shape[2]
    for name, number, least in (("ahead", ahead, 0), ("window", window, 1), ("prefix", prefix, 0)):
        _check_integer(name, number, least)
    for name, vectors in (("bias", bias), ("factor", factor)):
        if vectors is not None:
            _check_floats(name, vectors, (N, 2 * S - 1))
    if prefix is not None and (ahead != 0 or window is not None):
        raise ValueError(
            f"prefix={prefix} with ahead={ahead}, window={window}; allowed: ahead=0 and no window"
        )
    if fire is not None:
        _check_fire(q, k, fire, sinks)
    if sinks is not None:
        _check_sinks(q, k, ahead, window, sinks)


def _check_sinks(
    q: jax.Array, k: jax.Array, ahead: int | None, window: int | None, sinks: Sinks
) -> None:
    if window is None or window < SHORTEST_WINDOW or ahead is None:
        raise ValueError(
            f"sinks with window={window}, ahead={ahead}; allowed: a window of at least "
            f"{SHORTEST_WINDOW} and an integer"
        )
    if not _is_integer(sinks.num, 1) or sinks.num > window:
        raise ValueError(
            f"sinks.num={sinks.num!r}; allowed: an integer from 1 to the window's {window}"
        )
    N = q.shape[1]
    for name, shape in {"q": q.shape, "k": k.shape, "bias": (N,), "factor": (N,)}.items():
        array = getattr(sinks, name)
        if array is not None:
            _check_floats(f"sinks.{name}", array, shape)
            if name in ("q", "k") and array.dtype != q.dtype:
                raise ValueError(f"sinks.{name} of {array.dtype}; allowed: {q.dtype}, as q")


def _check_fire(q: jax.Array, k: jax.Array, fire: Fire, sinks: Sinks | None) -> None:
    if q.shape[2] != k.shape[2]:
        raise ValueError("fire with first_query; allowed: one of them")
    if sinks is not None:
        raise ValueError("fire with sinks; allowed: one of them, sinks need distances alone")
    B, N, T, _ = q.shape
    width = jnp.shape(fire.w_in)[-1:]
    shapes = ((2 * T - 1,), (B, T), width, width, (N, *width), (N,))
    for name, array, shape in zip(Fire._fields, fire, shapes, strict=True):
        _check_floats(f"fire.{name}", array, shape)
