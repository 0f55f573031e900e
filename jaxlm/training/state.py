"""Everything a run carries from step to step."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from jaxlm.model.parameters import init_params
from jaxlm.model.transformer import Transformer
from jaxlm.training.config import TrainConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """One pytree; a checkpoint is exactly this.

    There is no RNG in it: every key is folded from the seed and the step.

    Attributes:
        step: optimizer steps taken, skipped ones included.
        params: of the model.
        optimizer: optax's state.
        ema: averaged parameters, or None.
        bad_steps: skipped steps in all, and the latest of them in a row.
    """

    step: Int[Array, ""]
    params: Any
    optimizer: Any
    ema: Any
    bad_steps: Int[Array, "2"]


def init_state(
    model: Transformer, optimizer: optax.GradientTransformation, config: TrainConfig
) -> TrainState:
    """The state at step 0: a pure function of the configs."""
    params = init_params(model, config.seed)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        optimizer=jax.jit(optimizer.init)(params),
        ema=None if config.ema_decay is None else jax.tree.map(jnp.copy, params),
        bad_steps=jnp.zeros(2, jnp.int32),
    )
