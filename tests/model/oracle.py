"""The whole model in float64 NumPy, token by token and head by head; it knows nothing of JAX.

It reads a config's plain fields and a pytree of arrays in the unrolled layout (every layer a block
of its own), and shares no code with the library.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

Tree = dict[str, Any]
_erf = np.vectorize(math.erf)


class Given(NamedTuple):
    """One row of the batch: per token its id, its position, its document (0 is padding), its type
    (None: all 0).
    """

    tokens: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    types: np.ndarray | None = None


class RouterSums(NamedTuple):
    """What the experts' losses of one layer need of one row, summed over the real tokens."""

    chosen: np.ndarray
    probs: np.ndarray
    lse_squared: float
    count: int


def norm(config, p: Tree, x: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    if config.kind == "layernorm":
        x = x - x.mean(-1, keepdims=True)
    y = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.epsilon)
    if config.scale:
        y = y * (p["scale"] + (1.0 if config.scale_plus_one else 0.0))
    return y + p["bias"] if config.bias else y


def activation(kind: str, x: np.ndarray) -> np.ndarray:
    """The function of a plain MLP, or of a gate."""
    if kind == "swiglu":
        return x / (1 + np.exp(-x))
    if kind in ("geglu", "gelu"):
        return x * (1 + _erf(x / math.sqrt(2))) / 2
    if kind in ("geglu_tanh", "gelu_tanh"):
        return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
    return {"relu": np.maximum(x, 0), "relu2": np.maximum(x, 0) ** 2}[kind]


def mlp(kind: str, x: np.ndarray, up, gate, down) -> np.ndarray:
    """up, gate and down are (matrix, bias); no gate in a plain MLP."""
    h = x @ up[0] + up[1]
    if kind == "clamped_swiglu":
        g, h = np.minimum(x @ gate[0] + gate[1], 7.0), np.clip(h, -7.0, 7.0) + 1
        return (g / (1 + np.exp(-1.702 * g)) * h) @ down[0] + down[1]
    h = activation(kind, h) if gate is None else activation(kind, x @ gate[0] + gate[1]) * h
    return h @ down[0] + down[1]


def feed_forward(config, p: Tree, x: np.ndarray) -> np.ndarray:
    """The dense MLP."""
    parts = {n: (q["kernel"], q.get("bias", 0.0)) for n, q in p.items()}
    return mlp(config.feed_forward.kind, x, parts["up"], parts.get("gate"), parts["down"])


def experts(config, p: Tree, x: np.ndarray, given: Given) -> tuple[np.ndarray, RouterSums]:
    """Each token through its experts, one at a time."""
    m, out = config.moe, np.zeros_like(x)
    sums = [np.zeros(m.num_experts), np.zeros(m.num_experts), 0.0, 0]
    for t, row in enumerate(x):
        logits = row @ p["router"]["kernel"] + p["router"].get("bias", 0.0)
        lse = np.log(np.exp(logits).sum())
        probs = np.exp(logits - lse)
        chosen = np.argsort(-probs)[: m.top_k]
        total = probs[chosen].sum() if m.normalize else 1.0
        for e in chosen:
            parts = {
                n: (p[n][e], p[f"{n}_bias"][e] if config.feed_forward.bias else 0.0)
                for n in ("up", "gate", "down")
                if n in p
            }
            y = mlp(config.feed_forward.kind, row, parts["up"], parts.get("gate"), parts["down"])
            out[t] += probs[e] / total * y
        if given.segments[t]:
            sums[0][chosen] += 1
            sums[1] += probs
            sums[2] += lse**2
            sums[3] += 1
    if m.num_shared_experts:
        gate = 1 / (1 + np.exp(-x @ p["shared_gate"]["kernel"])) if m.shared_gate else 1.0
        out += gate * feed_forward(config, p["shared"], x)
    return out, RouterSums(*sums)


def rope(x: np.ndarray, position: int, base: float, fraction: float) -> np.ndarray:
    """One head's vector, pairs (n, n + width/2), as complex numbers times e^(i·angle)."""
    width = int(fraction * len(x))
    half = width // 2
    turned = x[:half] + 1j * x[half:width]
    turned = turned * np.exp(1j * position * base ** (-2 * np.arange(half) / width))
    return np.concatenate([turned.real, turned.imag, x[width:]])


def t5_bucket(encoding, distance: int) -> int:
    """The first half of the buckets is of one distance each, the rest grow by one factor."""
    count = encoding.num_buckets
    if encoding.bidirectional:
        count //= 2
    elif distance < 0:
        return 0
    n, half = abs(distance), count // 2
    if n >= half:
        growth = math.log(n / half) / math.log(encoding.max_distance / half)
        n = min(half + int(growth * (count - half) + 1e-9), count - 1)
    return n + (count if distance < 0 else 0)


def _slopes(heads: int) -> list[float]:
    """ALiBi's, for a power of two."""
    return [2 ** (-8 * (h + 1) / heads) for h in range(heads)]


def _heads(config, p: Tree, name: str, x: np.ndarray) -> np.ndarray:
    """[T, heads, head_dim]: projected, and normalised if asked for."""
    y = np.einsum("td,dnh->tnh", x, p[name]["kernel"]) + p[name].get("bias", 0.0)
    if config.norm.clip_qkv is not None:
        y = np.clip(y, -config.norm.clip_qkv, config.norm.clip_qkv)
    kind = config.attention.qk_norm
    if name == "v" or kind == "none":
        return y
    if kind == "head":
        return norm(config.norm, p.get(f"{name}_norm", {}), y)
    return norm(config.norm, p.get(f"{name}_norm", {}), y.reshape(len(y), -1)).reshape(y.shape)


def attention(config, p: Tree, x: np.ndarray, given: Given, kind: str, table) -> np.ndarray:
    """Query by query, over the list of the keys that it sees; `table` is T5's."""
    a, encoding = config.attention, config.position_encoding
    window = a.sliding_window if kind == "sliding" else None
    if encoding.name == "by_kind":
        encoding = encoding.sliding if kind == "sliding" else encoding.full
    q, k, v = (_heads(config, p, n, x) for n in ("q", "k", "v"))
    T, N, H = q.shape
    at, mixed = given.positions, np.zeros_like(q)
    if encoding.name == "rope":
        for y in (q, k):
            for t, n in np.ndindex(y.shape[:2]):
                y[t, n] = rope(y[t, n], at[t], encoding.base, encoding.fraction)
    for t, n in np.ndindex(T, N):
        scores, values = [], []
        for s in range(T):
            distance = at[t] - at[s]
            apart = given.segments[s] != given.segments[t] or given.segments[s] == 0
            ahead = distance < 0 and kind != "bidirectional"
            if apart or ahead or (window is not None and distance >= window):
                continue
            group = n * k.shape[1] // N
            score = q[t, n] @ k[s, group] * (H**-0.5 if a.scale is None else a.scale)
            if a.softcap is not None:
                score = a.softcap * math.tanh(score / a.softcap)
            if encoding.name == "alibi":
                score -= encoding.scale * _slopes(N)[n] * distance
            if encoding.name == "t5":
                score += table[n, t5_bucket(encoding, distance)]
            scores.append(score)
            values.append(v[s, group])
        if scores:
            weights = np.exp(scores)
            sink = np.exp(p["sink_logits"][n]) if a.sink_logits else 0.0
            mixed[t, n] = weights @ np.array(values) / (weights.sum() + sink)
    return np.einsum("tnh,nhd->td", mixed, p["out"]["kernel"]) + p["out"].get("bias", 0.0)


def block(
    config, p: Tree, x, given: Given, kind: str, table
) -> tuple[np.ndarray, RouterSums | None]:
    """One layer."""
    routed: list[RouterSums] = []

    def second(y):
        if config.moe is None:
            return feed_forward(config, p["feed_forward"], y)
        y, sums = experts(config, p["experts"], y, given)
        routed.append(sums)
        return y

    def first(y):
        return attention(config, p["attention"], y, given, kind, table)

    placement, parallel = config.norm.placement, config.feed_forward.parallel
    if parallel != "none":
        other = p.get("attention_norm" if parallel == "shared" else "feed_forward_norm", {})
        y = first(norm(config.norm, p.get("attention_norm", {}), x))
        y = y + second(norm(config.norm, other, x))
        if placement == "sandwich":
            y = norm(config.norm, p["post_norm"], y)
        x = x + y
    else:
        for name, sublayer in (("attention", first), ("feed_forward", second)):
            y = x
            if placement in ("pre", "sandwich"):
                y = norm(config.norm, p.get(f"{name}_norm", {}), y)
            y = sublayer(y)
            if placement in ("post", "sandwich"):
                y = norm(config.norm, p[f"{name}_post_norm"], y)
            x = x + y
            if placement == "residual":
                x = norm(config.norm, p[f"{name}_residual_norm"], x)
    return x, routed[0] if routed else None


def forward(config, params: Tree, rows: list[Given]) -> tuple[np.ndarray, tuple[float, float]]:
    """Logits [B, T, V] and the two losses of the experts, weighted and summed over the layers."""
    logits, routed = [], []
    for given in rows:
        x = params["embedding"][given.tokens]
        if config.embedding.scale is not None:
            x = x * config.embedding.scale
        if config.embedding.num_token_types:
            x = x + params["token_types"][0 if given.types is None else given.types]
        table = params.get("position", {}).get("table")
        if config.position_encoding.name == "learned":
            x = x + table[given.positions + config.position_encoding.offset]
        if config.embedding.norm:
            x = norm(config.norm, params["embedding_norm"], x)
        pattern = config.attention.layer_pattern
        for i in range(config.num_layers):
            p = params["last_layers"][f"block_{i}"]
            x, sums = block(config, p, x, given, pattern[i % len(pattern)], table)
            routed.append((i, sums))
        if config.norm.placement != "residual":
            x = norm(config.norm, params.get("final_norm", {}), x)
        if config.embedding.head_transform:
            dense = params["head_transform"]["dense"]
            x = activation(config.feed_forward.kind, x @ dense["kernel"] + dense["bias"])
            x = norm(config.norm, params["head_transform"]["norm"], x)
        x = x * (config.embedding.logit_scale or 1.0)
        y = x @ (params["embedding"].T if config.embedding.tied else params["head"])
        if config.embedding.head_bias:
            y = y + params["head_bias"]
        cap = config.embedding.logit_softcap
        logits.append(y if cap is None else cap * np.tanh(y / cap))
    balance = z = 0.0
    for i in range(config.num_layers if config.moe is not None else 0):
        parts = [s for j, s in routed if i == j]
        chosen, probs, squares, count = (sum(x) for x in zip(*parts, strict=True))
        share = chosen / (count * config.moe.top_k)
        balance += config.moe.num_experts * (share * probs / count).sum()
        z += squares / count
    m = config.moe
    losses = (0.0, 0.0) if m is None else (m.load_balance_weight * balance, m.router_z_weight * z)
    return np.array(logits), losses
