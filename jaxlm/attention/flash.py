"""Flash attention's TPU kernels behind the one door."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.attention.blockwise_tiles import FARTHEST
from jaxlm.attention.inputs import AttentionInputs, AttentionSpec, with_sink_logits
from jaxlm.attention.mask import AttentionMask, Interval
from jaxlm.attention.on_mesh import Axes, on_mesh
from jaxlm.sharding.mesh import CONTEXT
from kernels.chip import target_chip
from kernels.flash_attention import (
    DTYPES,
    HEAD_DIMS,
    SHORTEST_WINDOW,
    At,
    Fire,
    Sinks,
    flash_attention,
    flash_attention_at,
)

# Of what is not keys or values [batch, heads, length, …], of which a device has all tokens of its
# rows and heads: queries are cut along the length too, what is a head's with its heads.
TOKENS_OF_HEADS = ("batch", "kv_heads", "length")
AXES: dict[str, Axes] = {
    "q": TOKENS_OF_HEADS,
    "q_far": TOKENS_OF_HEADS,
    "segment_ids": ("batch",),
    "positions": ("batch",),
    "bias": ("kv_heads",),
    "far_bias": ("kv_heads",),
    "factor": ("kv_heads",),
    "far_factor": ("kv_heads",),
    "numerator": (),
    "reciprocal": ("batch",),
    "w_in": (),
    "b_in": (),
    "w_out": ("kv_heads",),
    "b_out": ("kv_heads",),
    "q_positions": ("batch", "length"),
    "q_segment_ids": ("batch", "length"),
    "k_positions": ("batch",),
    "k_segment_ids": ("batch",),
    "slopes": ("kv_heads",),
}
PART = 128  # queries; a part of a row is a multiple of it
# A function of these arrays, by position.
Kernel = tuple[Callable[..., tuple[Array, Array]], dict[str, Any]]


class Pattern(NamedTuple):
    """A mask as the kernels take it: a band, and keys that are seen from out of it.

    Attributes:
        ahead, window: see `Interval`.
        num_sinks: positions below it are seen from any distance.
        prefix: positions below it are seen by all.
    """

    ahead: int | None
    window: int | None
    num_sinks: int = 0
    prefix: int | None = None


def pattern_of(mask: AttentionMask, length: int) -> Pattern | None:
    """The mask of `length` tokens that attend to one another; None: the kernels have none such."""
    band, *others = mask.intervals
    if band.below is not None or band.chunk is not None or len(others) > 1:
        return None
    if not others:
        return Pattern(band.ahead, band.window)
    (other,) = others
    if band == Interval() and other == Interval(ahead=None, below=other.below):
        return Pattern(0, None, prefix=other.below)
    if band.ahead != 0 or other.ahead != 0 or other.chunk is not None or other.below is None:
        return None
    if band.window is None or min(other.window or length, length) <= band.window:
        return Pattern(0, band.window)  # no sink is out of the window
    return Pattern(0, band.window, num_sinks=other.below) if other.window is None else None


def unsupported(spec: AttentionSpec, x: AttentionInputs) -> str | None:
    """What of a call the kernels do not do; None: they do it all."""
    if target_chip() is None:
        return "a device that is no TPU"
    if x.q.shape[-1] not in HEAD_DIMS:
        return f"head_dim={x.q.shape[-1]}"
    if x.q.dtype not in DTYPES:
        return f"dtype={x.q.dtype}"
    if not spec.aligned:
        return _unsupported_places(spec, x)
    if spec.score is not None and spec.score_form is None:
        return "a position encoding whose change to a score is no bias, factor or network"
    pattern = pattern_of(spec.mask, x.q.shape[1])
    if pattern is None:
        return f"mask={spec.mask}"
    if pattern.num_sinks and (pattern.window or 0) < max(SHORTEST_WINDOW, pattern.num_sinks):
        return f"{pattern.num_sinks} sinks and a window of {pattern.window}"
    if pattern.num_sinks and spec.score_form == "network":
        return f"{pattern.num_sinks} sinks and a network"
    return _unmet_ceiling(spec, x, pattern)


def _unsupported_places(spec: AttentionSpec, x: AttentionInputs) -> str | None:
    """Where positions do not follow slots, a bias of the distance has no equal diagonals."""
    if spec.score is not None and spec.score_form != "slope":
        return "positions that follow no order, with a position encoding that adds no slope"
    if x.q_far is not None:
        return "positions that follow no order, with other keys at the distance ceiling"
    return None


def _unmet_ceiling(spec: AttentionSpec, x: AttentionInputs, pattern: Pattern) -> str | None:
    """The kernels know two distances of a key: its own within the window, and that of all sinks
    beyond. None: that is enough.
    """
    if spec.score is None and x.q_far is None:
        return None  # near or far, keys are met alike
    window = pattern.window or FARTHEST
    beyond = FARTHEST if spec.ceiling is None else spec.ceiling
    if beyond == window if pattern.num_sinks else beyond >= window:
        return None
    return f"ceiling={spec.ceiling} with window={pattern.window}"


def attend_flash(
    spec: AttentionSpec, x: AttentionInputs
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Softmax attention by the kernels of `kernels.flash_attention`.

    On a mesh set by `jax.set_mesh`, each device attends for its rows, its heads and, where they are
    a multiple of 128, its part of a row's queries, to the keys and values of all.

    Returns:
        As `attend_reference`.

    Raises:
        ValueError: a call that the kernels do not do, see `unsupported`.
    """
    kernel, arrays = _kernel(spec, x)
    B, T = x.q.shape[:2]
    whole = T % PART or spec.network is not None  # a network needs the queries of all keys
    sizes = {"batch": B, "kv_heads": x.k.shape[2], "length": 1 if whole else T // PART}
    cut = [AXES.get(name, ("batch", "kv_heads")) for name in arrays]
    run = on_mesh(kernel, sizes, cut, [TOKENS_OF_HEADS] * 2)
    return _finished(x, run(*arrays.values()))


def attend_here(
    spec: AttentionSpec, x: AttentionInputs
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """The same on one device, whatever the mesh."""
    kernel, arrays = _kernel(spec, x)
    return _finished(x, kernel(*arrays.values()))


def _kernel(spec: AttentionSpec, x: AttentionInputs) -> Kernel:
    """What runs on each device."""
    reason, chip = unsupported(spec, x), target_chip()
    if reason is not None or chip is None:
        raise ValueError(
            f"implementation='flash' for {reason}; allowed: tokens attending to one another on a "
            "TPU; causal, full, sliding window, prefix, or sinks beside a window of at least "
            f"{SHORTEST_WINDOW}; a bias or factor of the distance; FIRE; in any order, a "
            "slope and any mask; bfloat16 or float32; "
            f"head_dim {', '.join(map(str, HEAD_DIMS))}"
        )
    return _aligned(spec, x, chip) if spec.aligned else _in_any_order(spec, x, chip)


def _finished(x: AttentionInputs, found: tuple[Array, Array]) -> tuple[Array, Array]:
    """Of the kernels' [B, N, T, H] and [B, N, T]."""
    out, lse = (a.swapaxes(1, 2) for a in found)
    return (out, lse) if x.sink_logits is None else with_sink_logits(out, lse, x.sink_logits)


def _aligned(spec: AttentionSpec, x: AttentionInputs, chip: str) -> Kernel:
    """For positions that follow the slots."""
    pattern = pattern_of(spec.mask, x.q.shape[1])
    assert pattern is not None
    arrays = _arrays(spec, x, pattern)

    def kernel(*values: Array | None) -> tuple[Array, Array]:
        a: dict[str, Any] = dict(zip(arrays, values, strict=True))
        far = (a.get(name) for name in ("q_far", "k_far", "far_bias", "far_factor"))
        sinks = Sinks(pattern.num_sinks, *far) if pattern.num_sinks else None
        return flash_attention(
            a["q"],
            a["k"],
            a["v"],
            a["segment_ids"],
            scale=spec.scale,
            ahead=pattern.ahead,
            window=pattern.window,
            softcap=spec.softcap,
            bias=a.get("bias"),
            learned_bias=spec.score_is_learned,
            factor=a.get("factor"),
            prefix=pattern.prefix,
            positions=a.get("positions"),
            sinks=sinks,
            fire=Fire(*(a[name] for name in Fire._fields)) if "numerator" in a else None,
            first_query=_first_query(a["q"], a["k"]),
            chip=chip,
        )

    return kernel, arrays


def _in_any_order(spec: AttentionSpec, x: AttentionInputs, chip: str) -> Kernel:
    """For positions that are data."""
    arrays: dict[str, Any] = {name: getattr(x, name).swapaxes(1, 2) for name in ("q", "k", "v")}
    for name in ("q_positions", "q_segment_ids", "k_positions", "k_segment_ids"):
        arrays[name] = getattr(x, name)
    if spec.score is not None:
        arrays["slopes"] = x.head_parameters

    def kernel(q: Array, k: Array, v: Array, *rest: Array) -> tuple[Array, Array]:
        q_at, k_at = At(*rest[:2]), At(*rest[2:4])
        return flash_attention_at(
            q,
            k,
            v,
            q_at,
            k_at,
            mask=spec.mask,
            scale=spec.scale,
            softcap=spec.softcap,
            slopes=rest[4] if len(rest) > 4 else None,
            ceiling=spec.ceiling,
            chip=chip,
        )

    return kernel, arrays


def _first_query(q: Array, k: Array) -> Int[Array, ""] | None:
    """The slot of this device's first query; None: it has the queries of all keys."""
    num_queries = q.shape[2]
    return None if num_queries == k.shape[2] else jax.lax.axis_index(CONTEXT) * num_queries


def _arrays(spec: AttentionSpec, x: AttentionInputs, pattern: Pattern) -> dict[str, Any]:
    """What the kernels are given, heads before length."""
    T = x.q.shape[1]
    arrays: dict[str, Any] = {"q": x.q, "k": x.k, "v": x.v}
    if pattern.num_sinks:
        arrays |= {"q_far": x.q_far, "k_far": x.k_far}
    arrays = {name: None if a is None else a.swapaxes(1, 2) for name, a in arrays.items()}
    arrays["segment_ids"] = x.q_segment_ids
    if pattern.num_sinks or pattern.prefix is not None:
        arrays["positions"] = x.q_positions
    distance, name = jnp.arange(1 - T, T, dtype=jnp.int32), spec.score_form
    if spec.network is not None:
        arrays |= spec.network(x.head_parameters, distance, x.q_positions)._asdict()
    elif name is not None:
        name = "bias" if name == "slope" else name
        arrays[name] = _of_distance(spec, x, distance)
        if pattern.num_sinks:
            arrays[f"far_{name}"] = _of_distance(spec, x, jnp.array([spec.ceiling], jnp.int32))[
                :, 0
            ]
    return arrays


def _of_distance(spec: AttentionSpec, x: AttentionInputs, distance: Array) -> Float[Array, "N D"]:
    """The position encoding's bias or factor for each head at these distances: what becomes of a
    score of 0, or of 1.
    """
    assert spec.score is not None
    score = jax.vmap(spec.score, in_axes=(0, None, None, None))
    scores = jnp.full((1, distance.size), float(spec.score_form == "factor"))
    return score(x.head_parameters, scores, distance[None], jnp.zeros((1, 1), jnp.int32))[:, 0]
