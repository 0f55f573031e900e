"""Trains a small model on rows of tokens that a function draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxlm.model.transformer import Transformer
from jaxlm.training.config import OptimizerConfig, TrainConfig
from jaxlm.training.optimizers import make_optimizer
from jaxlm.training.state import init_state
from jaxlm.training.step import make_train_step

# A generator of NumPy's to tokens int32 [batch, length + 1] and weights float32 [batch, length] of
# the losses of tokens[:, 1:].
Draw = Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]]


def learn(
    model: Transformer, draw: Draw, steps: int, learning_rate: float = 1e-3, seed: int = 0
) -> Any:
    """Parameters after so many steps of AdamW, with a warm-up and a cosine to a tenth."""
    optimizer = OptimizerConfig(learning_rate=learning_rate, warmup_steps=max(steps // 20, 1))
    config = TrainConfig(steps=steps, seed=seed, optimizer=optimizer)
    chain = make_optimizer(config.optimizer, steps)
    state = jax.jit(lambda: init_state(model, chain, config))()
    step = jax.jit(make_train_step(model, chain, config), donate_argnums=0)
    generator = np.random.default_rng(seed)
    for _ in range(steps):
        tokens, weights = draw(generator)
        rows, length = weights.shape
        batch = {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "positions": np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)),
            "segment_ids": np.ones((rows, length), np.int32),
            "loss_weights": weights,
        }
        state, _ = step(state, batch)
    return state.params
