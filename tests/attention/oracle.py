"""Attention in float64 NumPy, pair by pair of the definition; it knows nothing of JAX.

One row at a time, every array dense, gradients written out by hand. The tests of the oracle itself
compare these gradients with central differences.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

# (head's parameters, scores [T, S], distance [T, S], query positions [T, 1])
# -> scores, and their pullback d_scores -> (d_parameters, d_scores).
Score = Callable[[Any, np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, Callable]]


@dataclasses.dataclass(frozen=True)
class Problem:
    """`visible(i, j)` is the mask as a NumPy function of broadcast positions; the rest as in jaxlm.

    `arrays` holds float64 q [B, T, N, H], k, v [B, S, K, H], optionally q_far, k_far, sink_logits
    [N] and head_parameters [N, ...], and the integer positions and segment ids.
    """

    visible: Callable[[np.ndarray, np.ndarray], np.ndarray]
    scale: float
    arrays: dict[str, np.ndarray]
    softcap: float | None = None
    score: Score | None = None
    ceiling: int | None = None


@dataclasses.dataclass(frozen=True)
class Head:
    """All that is known of one row and head after the forward pass."""

    out: np.ndarray
    lse: np.ndarray
    p: np.ndarray
    far: np.ndarray
    slope: np.ndarray  # of the soft cap
    pullback: Callable
    sink_share: np.ndarray


def _head(problem: Problem, b: int, n: int) -> Head:
    a = problem.arrays
    group = a["q"].shape[2] // a["k"].shape[2]
    i, j = a["q_positions"][b][:, None], a["k_positions"][b][None, :]
    q_segment, k_segment = a["q_segment_ids"][b][:, None], a["k_segment_ids"][b][None, :]
    seen = problem.visible(i, j) & (q_segment == k_segment) & (k_segment != 0)
    distance, far = i - j, np.zeros(seen.shape, bool)
    s = a["q"][b, :, n] @ a["k"][b, :, n // group].T
    if problem.ceiling is not None:
        if "q_far" in a:
            far = distance >= problem.ceiling
            s = np.where(far, a["q_far"][b, :, n] @ a["k_far"][b, :, n // group].T, s)
        distance = np.minimum(distance, problem.ceiling)
    s, slope = s * problem.scale, np.ones(s.shape)
    if problem.softcap is not None:
        tanh = np.tanh(s / problem.softcap)
        s, slope = problem.softcap * tanh, 1 - tanh**2

    def pullback(d):
        return None, d

    if problem.score is not None:
        s, pullback = problem.score(a["head_parameters"][n], s, distance, i)
    s = np.where(seen, s, -np.inf)
    sink = a["sink_logits"][n] if "sink_logits" in a else -np.inf
    top = np.maximum(s.max(1), sink)
    top = np.where(np.isfinite(top), top, 0.0)
    e, e_sink = np.exp(s - top[:, None]), np.exp(sink - top)
    total = e.sum(1) + e_sink
    safe = np.where(total == 0, 1.0, total)
    lse = np.where(total == 0, -np.inf, top + np.log(safe))
    p = e / safe[:, None]
    v = a["v"][b, :, n // group]
    return Head(p @ v, lse, p, far, slope, pullback, e_sink / safe)


def attend(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Output [B, T, N, H] and log-sum-exp [B, T, N]; -inf where a query sees nothing."""
    B, T, N, _ = problem.arrays["q"].shape
    out, lse = np.zeros(problem.arrays["q"].shape), np.zeros((B, T, N))
    for b in range(B):
        for n in range(N):
            head = _head(problem, b, n)
            out[b, :, n], lse[b, :, n] = head.out, head.lse
    return out, lse


def gradients(problem: Problem, d_out: np.ndarray, d_lse: np.ndarray) -> dict[str, np.ndarray]:
    """Of sum(out·d_out) + sum(lse·d_lse), for every floating array of the problem.

    d_lse must be 0 where a query sees nothing.
    """
    a = problem.arrays
    group = a["q"].shape[2] // a["k"].shape[2]
    grads = {n: np.zeros(x.shape) for n, x in a.items() if np.issubdtype(x.dtype, np.floating)}
    for b, n in np.ndindex(a["q"].shape[0], a["q"].shape[2]):
        head, m, do = _head(problem, b, n), n // group, d_out[b, :, n]
        known = d_lse[b, :, n] - (do * head.out).sum(1)
        ds = head.p * (do @ a["v"][b, :, m].T + known[:, None])
        grads["v"][b, :, m] += head.p.T @ do
        if "sink_logits" in a:
            grads["sink_logits"][n] += (head.sink_share * known).sum()
        d_parameters, ds = head.pullback(ds)
        if d_parameters is not None:
            grads["head_parameters"][n] += d_parameters
        ds = ds * head.slope * problem.scale
        for q, k, side in (("q", "k", ~head.far), ("q_far", "k_far", head.far)):
            if q in a:
                grads[q][b, :, n] += (ds * side) @ a[k][b, :, m]
                grads[k][b, :, m] += (ds * side).T @ a[q][b, :, n]
    return grads


def rounding_bounds(problem: Problem, d_out: np.ndarray, unit: float) -> dict[str, np.ndarray]:
    """Largest errors of out and of the gradients of q, k and v, to first order in `unit`.

    For a kernel whose products are exact but which stores p, d_scores, out and the gradients with
    relative error `unit` each. For problems without score, cap or ceiling.
    """
    a = problem.arrays
    group = a["q"].shape[2] // a["k"].shape[2]
    bounds = {name: np.zeros(a[name].shape) for name in ("q", "k", "v")}
    bounds["out"] = np.zeros(a["q"].shape)
    for b, n in np.ndindex(a["q"].shape[0], a["q"].shape[2]):
        head, m, do = _head(problem, b, n), n // group, d_out[b, :, n]
        v = a["v"][b, :, m]
        bounds["out"][b, :, n] = unit * (head.p @ np.abs(v) + np.abs(head.out))
        ds = head.p * (do @ v.T - (do * head.out).sum(1)[:, None])
        from_out = head.p * (np.abs(do) * bounds["out"][b, :, n]).sum(1)[:, None]
        error = (unit * np.abs(ds) + from_out) * problem.scale
        bounds["q"][b, :, n] += error @ np.abs(a["k"][b, :, m])
        bounds["k"][b, :, m] += error.T @ np.abs(a["q"][b, :, n])
        bounds["v"][b, :, m] += unit * head.p.T @ np.abs(do)
    for name, gradient in gradients(problem, d_out, np.zeros(d_out.shape[:3])).items():
        if name in bounds:
            bounds[name] += unit * np.abs(gradient)
    return bounds
