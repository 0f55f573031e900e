"""Attention calls in every combination, for whichever implementation is registered here.

A new kernel joins by one line in IMPLEMENTATIONS; `test_implementations.py` then holds it to the
float64 oracle. Masks and scores are written twice, for the library and for NumPy.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from jaxlm.attention import mask as masks
from jaxlm.attention.blockwise import attend_blockwise
from jaxlm.attention.blockwise_tiles import Blocks
from jaxlm.attention.inputs import AttentionInputs, AttentionSpec
from jaxlm.attention.reference import attend_reference
from tests.attention import oracle

# Small tiles: short rows then have many, of every kind, and heads fall into several groups.
SMALL = Blocks(queries=16, keys=24, rows=64)

IMPLEMENTATIONS: dict[str, Callable] = {
    "reference": attend_reference,
    "blockwise": attend_blockwise,
    "blockwise_small_tiles": functools.partial(attend_blockwise, blocks=SMALL),
}

MASKS: dict[str, tuple[masks.AttentionMask, Callable]] = {
    "full": (masks.full(), lambda i, j: np.ones(np.broadcast(i, j).shape, bool)),
    "causal": (masks.causal(), lambda i, j: j <= i),
    "window": (masks.sliding_window(13), lambda i, j: (j <= i) & (i - j < 13)),
    "chunk": (masks.causal() & masks.chunked(20), lambda i, j: (j <= i) & (i // 20 == j // 20)),
    "prefix": (masks.prefix(17), lambda i, j: (j <= i) | (j < 17)),
    "sinks": (masks.kept_sinks(5), lambda i, j: (j <= i) & (j < 5)),
    "lambda": (masks.lambda_shaped(18, 3), lambda i, j: (j <= i) & ((i - j < 18) | (j < 3))),
    "ahead": (
        masks.AttentionMask((masks.Interval(ahead=6, window=9),)),
        lambda i, j: (j - i <= 6) & (i - j < 9),
    ),
    "union": (
        masks.sliding_window(4) | masks.chunked(32) & masks.kept_sinks(40) | masks.prefix(2),
        lambda i, j: (
            ((j <= i) & ((i - j < 4) | (i // 32 == j // 32) & (j < 40))) | (j <= i) | (j < 2)
        ),
    ),
}


def _alibi(head, s, distance, i):
    return s - head[0] * distance.astype(jnp.float32)


def _alibi_oracle(head, s, distance, i):
    return s - head[0] * distance, lambda ds: (np.array([-(ds * distance).sum()]), ds)


def _table(head, s, distance, i):
    return s + head[jnp.clip(distance, 0, head.shape[0] - 1)]


def _table_oracle(head, s, distance, i):
    at = np.clip(distance, 0, len(head) - 1)

    def back(ds):
        return np.bincount(at.ravel(), ds.ravel(), len(head)), ds

    return s + head[at], back


def _multiplicative(head, s, distance, i):
    far = jnp.log1p(jnp.maximum(distance, 0).astype(jnp.float32))
    return s / (1 + head[0] * far)


def _multiplicative_oracle(head, s, distance, i):
    far = np.log1p(np.maximum(distance, 0))
    return s / (1 + head[0] * far), lambda ds: (
        np.array([-(ds * s * far / (1 + head[0] * far) ** 2).sum()]),
        ds / (1 + head[0] * far),
    )


def _by_query(head, s, distance, i):
    """Depends on the query's position too, as FIRE does."""
    whole = jnp.maximum(i.astype(jnp.float32), head[0])
    return s - jnp.maximum(distance, 0).astype(jnp.float32) / whole


def _by_query_oracle(head, s, distance, i):
    d, whole = np.maximum(distance, 0), np.maximum(i, head[0])
    return s - d / whole, lambda ds: (np.array([(ds * d * (i < head[0]) / whole**2).sum()]), ds)


# name: (the library's form, the oracle's, smallest and largest parameter, parameters a head)
SCORES: dict[str, tuple[Callable | None, Callable | None, float, float, int]] = {
    "none": (None, None, 0.0, 0.0, 0),
    "alibi": (_alibi, _alibi_oracle, 0.02, 0.5, 1),
    "table": (_table, _table_oracle, -1.0, 1.0, 11),
    "multiplicative": (_multiplicative, _multiplicative_oracle, 0.1, 1.0, 1),
    "by_query": (_by_query, _by_query_oracle, 20.3, 30.3, 1),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One call. sizes: (B, T, S, N, K, H); aligned calls have S = T and real documents."""

    mask: str = "causal"
    score: str = "none"
    sizes: tuple[int, int, int, int, int, int] = (2, 53, 53, 4, 2, 8)
    softcap: float | None = None
    ceiling: int | None = None
    far: bool = False
    sinks: bool = False
    aligned: bool = True
    packed: bool = True
    seed: int = 0


SIZES = ((2, 53, 53, 4, 2, 8), (1, 97, 97, 6, 2, 4), (2, 33, 33, 2, 2, 8), (1, 71, 71, 3, 1, 4))
UNEQUAL = ((2, 7, 61, 4, 2, 8), (1, 65, 30, 3, 3, 4))


@st.composite
def cases(draw) -> Case:
    """Any combination."""
    aligned = draw(st.booleans())
    ceiling = draw(st.sampled_from([None, 10, 31]))
    return Case(
        mask=draw(st.sampled_from(sorted(MASKS))),
        score=draw(st.sampled_from(sorted(SCORES))),
        sizes=draw(st.sampled_from(SIZES if aligned else SIZES[:1] + UNEQUAL)),
        softcap=draw(st.sampled_from([None, 2.5])),
        ceiling=ceiling,
        far=ceiling is not None and draw(st.booleans()),
        sinks=draw(st.booleans()),
        aligned=aligned,
        packed=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


def _documents(rng: np.random.Generator, batch: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and segment ids of packed documents, with padding before, between and behind."""
    positions, segments = np.zeros((2, batch, length), np.int32)
    for b in range(batch):
        slot, name = int(rng.integers(0, 4)), 0
        while slot < length:
            size = min(int(rng.integers(1, length)), length - slot)
            name += 1
            positions[b, slot : slot + size] = np.arange(size)
            segments[b, slot : slot + size] = name
            slot += size + int(rng.integers(0, 3))
    return positions, segments


def _tokens(case: Case, rng: np.random.Generator) -> dict[str, np.ndarray]:
    B, T, S = case.sizes[:3]
    names = ("q_positions", "q_segment_ids", "k_positions", "k_segment_ids")
    if case.aligned:
        if case.packed:
            positions, segments = _documents(rng, B, T)
        else:
            positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
            segments = np.ones((B, T), np.int32)
        return dict(zip(names, (positions, segments, positions, segments), strict=True))

    def anywhere(length: int) -> tuple[np.ndarray, np.ndarray]:
        segments = rng.integers(0, 3, (B, length)) if case.packed else np.ones((B, length))
        return rng.integers(0, 60, (B, length)).astype(np.int32), segments.astype(np.int32)

    return dict(zip(names, (*anywhere(T), *anywhere(S)), strict=True))


def build(case: Case) -> tuple[AttentionSpec, AttentionInputs, oracle.Problem]:
    """The library's call, float32, and the oracle's of the same numbers, float64."""
    rng = np.random.default_rng(case.seed)
    B, T, S, N, K, H = case.sizes
    shapes = {"q": (B, T, N, H), "k": (B, S, K, H), "v": (B, S, K, H)}
    if case.far:
        shapes |= {"q_far": shapes["q"], "k_far": shapes["k"]}
    if case.sinks:
        shapes |= {"sink_logits": (N,)}
    arrays: dict[str, Any] = {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
    score, score_oracle, low, high, count = SCORES[case.score]
    if count:
        arrays["head_parameters"] = rng.uniform(low, high, (N, count)).astype(np.float32)
    arrays |= _tokens(case, rng)
    mask, visible = MASKS[case.mask]
    common = {"scale": 0.5, "softcap": case.softcap, "ceiling": case.ceiling}
    spec = AttentionSpec(mask=mask, score=score, aligned=case.aligned, **common)
    inputs = AttentionInputs(**{n: jnp.asarray(a) for n, a in arrays.items()})
    wide = {
        n: a.astype(np.float64) if a.dtype == np.float32 else a.astype(np.int64)
        for n, a in arrays.items()
    }
    return spec, inputs, oracle.Problem(visible, arrays=wide, score=score_oracle, **common)


def floats(x: AttentionInputs) -> dict[str, jax.Array]:
    """The arrays with a gradient, by name."""
    given = {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}
    return {
        n: a for n, a in given.items() if a is not None and jnp.issubdtype(a.dtype, jnp.floating)
    }


def assert_close(got, want, what=""):
    """Within 1e-5 of the array's largest entry.

    float32 rounds at 6e-8; a result is a sum of at most some thousand terms of either sign, whose
    rounding errors add like their square root, and an exponent of size 10 passes its own on.
    """
    got = np.asarray(got, np.float64)
    assert np.isfinite(got).all(), what
    bound = 1e-5 * max(np.abs(want).max(initial=0.0), 1e-3)
    np.testing.assert_allclose(got, want, rtol=0, atol=bound, err_msg=what)


@functools.partial(jax.jit, static_argnums=(0, 1))
def value_and_gradients(implementation, spec, x, d_out, d_lse):
    """(out, lse) and the gradients, by name, of sum(out·d_out) + sum(lse·d_lse)."""

    def run(arrays):
        return implementation(spec, dataclasses.replace(x, **arrays))

    value, back = jax.vjp(run, floats(x))
    return value, back((d_out.astype(value[0].dtype), d_lse))[0]
