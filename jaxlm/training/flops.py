"""How much arithmetic a model needs, and how much the device can do."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.model.config import ModelConfig


def matmul_parameters(config: ModelConfig) -> int:
    """Weights that each token is multiplied by: no embedding lookup, only the experts it uses."""
    c, a = config, config.attention
    attention = c.d_model * c.head_dim * (2 * a.num_heads + 2 * c.num_kv_heads)
    matrices = 3 if c.feed_forward.gated else 2
    width = c.d_ff if c.moe is None else c.moe.top_k * c.d_ff + c.shared_d_ff
    router = 0 if c.moe is None else c.d_model * (c.moe.num_experts + c.moe.shared_gate)
    layer = attention + matrices * c.d_model * width + router
    head = c.d_model * c.vocab_size + (c.d_model**2 if c.embedding.head_transform else 0)
    return c.num_layers * layer + head


def train_flops_per_token(config: ModelConfig, length: int) -> float:
    """Model FLOPs of forward and backward per token in sequences of `length`.

    6 for every weight, and 12 per layer and attention dim for every pair of tokens that the mask
    shows (PaLM's appendix B counts all pairs). Recomputation does not count.
    """
    pairs = 0.0
    for layer in range(config.num_layers):
        window = config.attention.sliding_window
        seen = length
        if config.layer_kind(layer) == "sliding" and window is not None:
            seen = min(window, length)
        hidden = 0 if config.layer_kind(layer) == "bidirectional" else seen * (seen - 1)
        pairs += seen - hidden / (2 * length)
    width = config.attention.num_heads * config.head_dim
    return 6.0 * matmul_parameters(config) + 12.0 * pairs * width


def decode_flops_per_token(config: ModelConfig) -> float:
    """Model FLOPs of one more token, at least: 2 for every weight. Attention's are no bound beside
    its reading of the cache, and are left out.
    """
    return 2.0 * matmul_parameters(config)


def prefill_flops(config: ModelConfig, length: int, keeps_all: bool) -> float:
    """Model FLOPs of reading a prompt and drawing the first token, at least.

    Args:
        keeps_all: False: tokens see what a cache keeps of others; their pairs are left out.
    """
    head = 2.0 * config.d_model * config.vocab_size  # of the last token alone
    forward = train_flops_per_token(config, length) / 3
    each = forward if keeps_all else decode_flops_per_token(config)
    return length * (each - head) + head


def matmul_peak(size: int = 2048, repeats: int = 2) -> float:
    """FLOP/s of one large float32 matmul on the default device, the best of a few: what "share of
    peak" refers to, measured on the same device in the same run.
    """
    x = jax.device_put(np.random.default_rng(0).standard_normal((size, size), np.float32))
    multiply = jax.jit(jnp.matmul).lower(x, x).compile()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        multiply(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def copy_bandwidth(numbers: int = 2**26, repeats: int = 3) -> float:
    """Bytes a second that an elementwise operation reads and writes on the default device, the best
    of a few: what "share of copy" refers to.
    """
    x = jnp.zeros(numbers, jnp.float32)
    # In place: memory that is new each time costs page faults, which are no matter of bandwidth.
    negate = jax.jit(jnp.negative, donate_argnums=0)
    x = negate(x).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        x = negate(x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2.0 * x.nbytes / best
