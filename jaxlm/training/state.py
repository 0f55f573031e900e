"""Everything a run carries from step to step."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.model.parameters import init_params
from jaxlm.model.transformer import Transformer
from jaxlm.training.config import TrainConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """One pytree; a checkpoint is exactly this.

    There is no RNG in it: every key is folded from the seed and the step. Its leaves are arrays; or
    what stands for them: shapes, shardings.

    Attributes:
        step: optimizer steps taken, skipped ones included; int32 [].
        params: of the model.
        optimizer: optax's state.
        ema: averaged parameters in float32, or None.
        bad_steps: skipped steps in all, and the latest of them in a row; int32 [2].
    """

    step: Any
    params: Any
    optimizer: Any
    ema: Any
    bad_steps: Any

    @property
    def averaged_params(self) -> Any:
        """What a run is for: the average of the parameters if it is kept, else the last ones."""
        if self.ema is None:
            return self.params
        return jax.tree.map(lambda e, p: e.astype(p.dtype), self.ema, self.params)


def start_state(
    params: Any, optimizer: optax.GradientTransformation, config: TrainConfig
) -> TrainState:
    """The state at step 0 of a run that learns `params`."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        optimizer=optimizer.init(params),
        ema=None if config.ema_decay is None else jax.tree.map(_float32_copy, params),
        bad_steps=jnp.zeros(2, jnp.int32),
    )


def init_state(
    model: Transformer, optimizer: optax.GradientTransformation, config: TrainConfig
) -> TrainState:
    """The state at step 0 of a fresh model: a pure function of the configs."""
    return start_state(init_params(model, config.seed), optimizer, config)


def _float32_copy(x: jax.Array) -> jax.Array:
    """A buffer of its own: a donated state must not hold one twice."""
    return jnp.array(x, jnp.float32, copy=True)


def abstract_state(
    params: Any, optimizer: optax.GradientTransformation, config: TrainConfig, mesh: Mesh
) -> TrainState:
    """Shapes, dtypes and shardings of the state: what creates it in place, or restores it.

    Whatever has a parameter's path (below the optimizer's own) and shape lies as that parameter
    does, so moments and averages are cut with their parameters; all else is on every device.

    Args:
        params: `jax.ShapeDtypeStruct`s with shardings, as of `placed_params`.
        optimizer, config: of the run.
        mesh: of the shardings.
    """
    shapes = jax.eval_shape(lambda p: start_state(p, optimizer, config), params)
    known = {
        jax.tree_util.keystr(path, simple=True, separator="/"): (x.shape, x.sharding)
        for path, x in jax.tree_util.tree_leaves_with_path(params)
    }

    def placed(path: Any, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        parts = [jax.tree_util.keystr((key,), simple=True) for key in path]
        sharding = NamedSharding(mesh, PartitionSpec())
        for first in range(len(parts)):
            shape, candidate = known.get("/".join(parts[first:]), (None, sharding))
            if shape == x.shape:
                sharding = candidate
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(placed, shapes)
