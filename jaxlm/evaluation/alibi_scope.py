"""How far a head with ALiBi can see at all: a bound from the parameters, without any text.

RazorAttention (arXiv 2407.15891), theorem 1, in a form of ours. Let |q·k|·scale ≤ B for all inputs.
Beside the weight of the query's own token, that at distance Δ is at most exp(2B − slope·Δ), so it
is below ε from Δ = (2B − ln ε)/slope on. B is the spectral norm of W_q W_kᵀ, with a row for biases,
times the largest square of the norm of what comes into them: √D·max|γ| + |b| after a norm.

It is a worst case, and loose: real texts come nowhere near.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxlm.caches.head_lists import HeadLists
from jaxlm.config import check
from jaxlm.model.config import ModelConfig
from jaxlm.model.layouts import num_scanned, unroll_layers
from jaxlm.positions.alibi import ALiBi


def alibi_scope(
    config: ModelConfig, params: Any, epsilon: float = 1e-5
) -> Float[np.ndarray, "L N"]:
    """Distance from which on no weight of a query head exceeds epsilon; infinite where its slope is
    0. float64.

    Raises:
        ValueError: a model without ALiBi, whose attention sees what no norm has bounded, or whose
            queries and keys are more than linear; parameters in few bits or with adapters.
    """
    check("alibi_scope", epsilon=(epsilon, 0 < epsilon < 1, "a number in (0, 1)"))
    _check(config)
    params = unroll_layers(config, params) if num_scanned(config) else params
    blocks = params["last_layers"]
    return np.stack(
        [_of_layer(config, blocks[f"block_{i}"], i, epsilon) for i in range(len(blocks))]
    )


def reaching(scope: Float[np.ndarray, "L N"], window: int, config: ModelConfig) -> HeadLists:
    """The kv heads of each layer of which a query head sees farther than a window: those that a
    razor cache should let keep all.
    """
    far = scope.reshape(config.num_layers, config.num_kv_heads, -1).max(-1) > window
    return tuple(tuple(np.flatnonzero(row).tolist()) for row in far)


def _check(config: ModelConfig) -> None:
    kinds = {config.layer_kind(i) for i in range(config.num_layers)}
    alibi = all(isinstance(config.encoding.of_kind(kind), ALiBi) for kind in kinds)
    a, n = config.attention, config.norm
    bounded = config.feed_forward.parallel != "none" or n.placement in ("pre", "sandwich")
    check(
        "alibi_scope",
        position_encoding=(str(config.encoding), alibi, "alibi"),
        placement=(n.placement, bounded, "pre, sandwich"),
        qk_norm=(a.qk_norm, a.qk_norm == "none", "none"),
        clip_qkv=(n.clip_qkv, n.clip_qkv is None, "None"),
    )


def _of_layer(
    config: ModelConfig, block: Mapping[str, Any], layer: int, epsilon: float
) -> Float[np.ndarray, "N"]:
    a, D = config.attention, config.d_model
    norm = {name: np.asarray(x, np.float64) for name, x in block["attention_norm"].items()}
    gain = norm.get("scale", np.zeros(1) if config.norm.scale_plus_one else np.ones(1))
    gain = gain + 1 if config.norm.scale_plus_one else gain
    radius = math.sqrt(D) * np.abs(gain).max() + np.linalg.norm(norm.get("bias", np.zeros(1)))
    q, k = (_matrix(block["attention"], name) for name in "qk")
    group = a.num_heads // config.num_kv_heads
    scale = config.head_dim**-0.5 if a.scale is None else a.scale
    square = radius**2 + (1 if a.qkv_bias else 0)
    bounds = [_norm_of_product(q[:, h], k[:, h // group]) for h in range(a.num_heads)]
    bound = np.array(bounds) * square * scale
    bound = bound if a.softcap is None else np.minimum(bound, a.softcap)
    encoding = config.encoding.of_kind(config.layer_kind(layer))
    slopes = np.asarray(encoding.head_parameters({}, a.num_heads), np.float64)
    with np.errstate(divide="ignore"):
        return (2 * bound - math.log(epsilon)) / slopes


def _matrix(attention: Mapping[str, Any], name: str) -> Float[np.ndarray, "_ N H"]:
    """[d_model, heads, head_dim], and a row of biases where there are any."""
    own = attention[name]
    if not set(own) <= {"kernel", "bias"}:
        told = "allowed: neither in few bits nor with an adapter"
        raise ValueError(f"parameters of {name}: {', '.join(sorted(own))}; {told}")
    rows = [np.asarray(own["kernel"], np.float64)]
    rows += [np.asarray(own["bias"], np.float64)[None]] if "bias" in own else []
    return np.concatenate(rows)


def _norm_of_product(a: Float[np.ndarray, "D H"], b: Float[np.ndarray, "D H"]) -> float:
    """Spectral norm of a·bᵀ, by way of matrices that are head_dim wide."""
    r_a, r_b = (np.linalg.qr(x).R for x in (a, b))
    return float(np.linalg.norm(r_a @ r_b.T, 2))
