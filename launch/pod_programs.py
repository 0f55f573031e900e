"""Programs of a run as they go to a pod, by shapes alone: for launch.aot.child."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxlm.model.parameters import placed_params
from jaxlm.model.transformer import Transformer
from jaxlm.sharding.mesh import batch_sharding
from jaxlm.training.loop import compile_step
from jaxlm.training.optimizers import make_optimizer
from jaxlm.training.run import RunConfig
from jaxlm.training.state import abstract_state
from jaxlm.training.step import NextToken, loss_spec, make_train_step

BATCH = {"tokens": jnp.int32, "targets": jnp.int32, "positions": jnp.int32} | {
    "segment_ids": jnp.int32,
    "loss_weights": jnp.float32,
}


def train_step(mesh: Mesh, run: Mapping[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    """The jitted step of `launch.train`, and the shapes of (state, batch, frozen)."""
    config = RunConfig.from_dict(run)
    model = Transformer(config.model_config(tokenizer_vocab_size=1))
    optimizer = make_optimizer(config.train.optimizer, config.train.steps)
    state = abstract_state(placed_params(model, mesh), optimizer, config.train, mesh)
    objective = NextToken(model, loss_spec(model.config, config.train))
    step = compile_step(make_train_step(model, optimizer, config.train, objective), state)
    size = config.data.batch_size, config.data.sequence_length
    rows = batch_sharding(mesh, *size)
    batch = {n: jax.ShapeDtypeStruct(size, dtype, sharding=rows) for n, dtype in BATCH.items()}
    return step, (state, batch, {})
