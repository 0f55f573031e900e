"""Optimizers and schedules of optax, by name."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import optax

from jaxlm.model.parameters import kernel_inputs
from jaxlm.training.config import OptimizerConfig

# Parameters that are no matrix of a linear map, by the end of their name.
UNDECAYED = ("scale", "bias", "sink_logits", "magnitude")


def _with_promotion(function: Callable[..., Any]) -> Callable[..., Any]:
    """optax mixes integers and floats, which strict promotion refuses."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return function(*args)

    return call


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """step → learning rate, over a run of `steps`."""
    peak, warmup = config.learning_rate, config.warmup_steps
    rest = max(steps - warmup, 1)
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, config.end_fraction)
    elif config.schedule == "linear":
        after = optax.linear_schedule(peak, peak * config.end_fraction, rest)
    elif config.schedule == "wsd":
        decay = min(max(round(steps * config.decay_fraction), 1), rest)
        end = optax.linear_schedule(peak, peak * config.end_fraction, decay)
        after = optax.join_schedules([optax.constant_schedule(peak), end], [rest - decay])
    elif config.schedule == "rsqrt":
        offset = max(warmup, 1)

        def after(step):
            return peak * math.sqrt(offset) * (step + offset) ** -0.5

    else:
        after = optax.constant_schedule(peak)
    if warmup > 0:
        start = optax.linear_schedule(0.0, peak, warmup)
        after = optax.join_schedules([start, after], [warmup])
    return _with_promotion(after)


def decayed(params: Any) -> Any:
    """A pytree of booleans: which parameters weight decay applies to."""

    def is_matrix(path: Any, _: Any) -> bool:
        names = [str(k.key) for k in path]
        return not names[-1].endswith(UNDECAYED) and names[0] != "position"

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def muon_dimensions(params: Any) -> Any:
    """Which axes of a parameter muon sees as a matrix's rows and columns; None: adamw's business.

    Leading "layers" and "expert" axes are batches of matrices.
    """

    def dimensions(path: Any, x: Any) -> optax.contrib.MuonDimensionNumbers | None:
        names = [str(k.key) for k in path]
        batch = ("layers" in names) + ("experts" in names and names[-1] in ("up", "gate", "down"))
        inner = x.ndim - batch
        if names[-1] not in ("kernel", "up", "gate", "down") or inner < 2:
            return None
        split = kernel_inputs(tuple(names), inner)
        return optax.contrib.MuonDimensionNumbers(
            tuple(range(batch, batch + split)), tuple(range(batch + split, x.ndim))
        )

    return jax.tree_util.tree_map_with_path(dimensions, params)


def _direction(config: OptimizerConfig) -> optax.GradientTransformation:
    """What each optimizer makes of the gradient, before weight decay and the learning rate."""
    c = config
    if c.name == "adamw":
        return optax.scale_by_adam(c.b1, c.b2, c.epsilon)
    if c.name == "lion":
        return optax.scale_by_lion(c.b1, c.b2)
    if c.name == "muon":
        # A rate of -1 leaves the direction as it is: optax multiplies by minus the rate.
        return optax.contrib.muon(
            -1.0, adam_b1=c.b1, adam_b2=c.b2, muon_weight_dimension_numbers=muon_dimensions
        )
    if c.name == "adafactor":
        return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    return optax.trace(c.b1)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping, the optimizer's direction, decoupled weight decay, the schedule."""
    parts = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
    parts.append(_direction(config))
    parts.append(optax.add_decayed_weights(config.weight_decay, decayed))
    parts.append(optax.scale_by_learning_rate(learning_rate(config, steps)))
    chain = optax.chain(*parts)
    return optax.GradientTransformation(chain.init, _with_promotion(chain.update))
