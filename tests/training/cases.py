"""Small models of every kind that the loss and the step treat apart, and packed batches."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jaxlm.model.config import ModelConfig
from jaxlm.model.transformer import Transformer

VOCAB, ROWS, LENGTH = 37, 8, 13

BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "num_layers": 2,
    "d_model": 16,
    "context_length": 16,
    "attention": {"num_heads": 2, "implementation": "reference"},  # compiles in half the time
    "feed_forward": {"d_ff": 24},
}
EXPERTS = {"num_experts": 4, "top_k": 2, "d_ff": 8, "num_shared_experts": 1}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"embedding": {"tied": True, "scale": 4.0}},
    "head": {"embedding": {"head_bias": True, "logit_softcap": 2.0}},
    "experts": {"moe": EXPERTS, "feed_forward": {"d_ff": 24, "bias": True}},
}


def make_model(name: str = "plain", **changes: Any) -> Transformer:
    return Transformer(ModelConfig.from_dict({**BASE, **MODELS[name], **changes}))


def make_batch(seed: int = 0, rows: int = ROWS, length: int = LENGTH) -> dict[str, Any]:
    """Two documents and padding in each row; some targets have no weight, some half."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, VOCAB, (rows, length + 1))
    segments, positions = np.zeros((2, rows, length), np.int32)
    for row in range(rows):
        first, second = sorted(generator.integers(1, length, 2))
        segments[row, :first], positions[row, :first] = 1, np.arange(first)
        segments[row, first:second], positions[row, first:second] = 2, np.arange(second - first)
    weights = generator.choice([0.0, 0.5, 1.0], (rows, length), p=[0.2, 0.2, 0.6])
    batch = {
        "tokens": tokens[:, :-1].astype(np.int32),
        "targets": tokens[:, 1:].astype(np.int32),
        "positions": positions,
        "segment_ids": segments,
        "loss_weights": (weights * (segments > 0)).astype(np.float32),
    }
    return jax.device_put(batch)
