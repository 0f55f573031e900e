"""Choices of a training run, apart from the model and the data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jaxlm.config import at_least, between, build, check, check_types, one_of

OPTIMIZERS = ("adamw", "adafactor", "lion", "muon", "sgd")
SCHEDULES = ("cosine", "linear", "wsd", "rsqrt", "constant")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """An optax optimizer and its learning-rate schedule, by name.

    Attributes:
        name: "adamw"; "lion"; "sgd" (with momentum); "adafactor" (no first moment, updates clipped
            to RMS 1); "muon" (matrices of the layers; adamw for the rest, at the same rate).
        learning_rate: the schedule's peak.
        schedule: after the warm-up: "cosine" or "linear" to `end_fraction` of the peak, "wsd"
            (constant, then linear over the last `decay_fraction` of the run), "rsqrt", "constant".
        warmup_steps: linear from 0.
        end_fraction: last learning rate over the peak.
        decay_fraction: share of the run that "wsd" decays over.
        weight_decay: decoupled; on matrices and embeddings, not on norms, biases and position
            encodings.
        b1, b2: decay rates of the moments; b1 is the momentum of sgd, muon's own is 0.95.
        epsilon: of adamw's denominator.
        clip_norm: largest global gradient norm; None: no clipping.
    """

    name: str = "adamw"
    learning_rate: float = 1e-3
    schedule: str = "cosine"
    warmup_steps: int = 100
    end_fraction: float = 0.1
    decay_fraction: float = 0.2
    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    epsilon: float = 1e-8
    clip_norm: float | None = 1.0

    def __post_init__(self):
        check_types(type(self), vars(self), "optimizer")
        clip = self.clip_norm
        check(
            "optimizer",
            name=one_of(self.name, *OPTIMIZERS),
            learning_rate=at_least(self.learning_rate, 0),
            schedule=one_of(self.schedule, *SCHEDULES),
            warmup_steps=at_least(self.warmup_steps, 0),
            end_fraction=(self.end_fraction, 0 <= self.end_fraction <= 1, "0 to 1"),
            decay_fraction=(self.decay_fraction, 0 < self.decay_fraction <= 1, "in (0, 1]"),
            weight_decay=at_least(self.weight_decay, 0),
            b1=(self.b1, 0 <= self.b1 < 1, "in [0, 1)"),
            b2=(self.b2, 0 <= self.b2 < 1, "in [0, 1)"),
            epsilon=(self.epsilon, 0 < self.epsilon < math.inf, "a finite number > 0"),
            clip_norm=(clip, clip is None or 0 < clip < math.inf, "None or a finite number > 0"),
        )


@dataclasses.dataclass(frozen=True)
class RollbackConfig:
    """When a loss is a spike, and what is done about it.

    The run goes back to what it was `skip` steps before, and on from there without the batches of
    these steps, as if the texts had never had them.

    Attributes:
        factor: a loss of so many times the median of the last ones is a spike.
        window: how many last ones; before there are so many, none is a spike.
        skip: steps to go back, the one of the spike included.
        most: spikes of a run; the next one ends it.
    """

    factor: float
    window: int = 50
    skip: int = 20
    most: int = 10

    def __post_init__(self):
        check_types(type(self), vars(self), "rollback")
        factor = self.factor
        check(
            "rollback",
            factor=(factor, 1 < factor < math.inf, "a finite number > 1"),
            window=between(self.window, 1, 10_000),
            skip=at_least(self.skip, 1),
            most=at_least(self.most, 1),
        )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The run.

    Attributes:
        steps: optimizer steps.
        microbatches: parts that a batch is cut into; gradients are summed over them.
        optimizer: see there.
        z_weight: of the squared log-sum-exp in the loss.
        loss_chunk: positions of each row whose logits exist at one time; the TPU kernel needs none.
        ema_decay: of an exponential average of the parameters, kept beside them in float32, and
            what is evaluated and loaded; at step n it is at most (1 + n) / (10 + n). None: none.
        log_every: steps between two lines of metrics.
        evaluate_every: steps between two passes over the held-out text; None: only at the end.
        max_bad_steps: steps in a row with a non-finite loss or gradient before the run stops; each
            such step is skipped and counted.
        rollback: from spikes of the loss; None: they are trained through.
        seed: of parameters and dropout.
        profile: (first step, last step), counted from 0, of an xprof trace into the workdir's
            "profile" folder; None: no trace.
    """

    steps: int = 1000
    microbatches: int = 1
    optimizer: OptimizerConfig = OptimizerConfig()
    z_weight: float = 0.0
    loss_chunk: int = 64
    ema_decay: float | None = None
    log_every: int = 10
    evaluate_every: int | None = None
    max_bad_steps: int = 10
    rollback: RollbackConfig | None = None
    seed: int = 0
    profile: tuple[int, int] | None = None

    PARTS = {"optimizer": OptimizerConfig, "rollback": RollbackConfig}

    def __post_init__(self):
        check_types(type(self), vars(self), "train")
        every, decay, window = self.evaluate_every, self.ema_decay, self.profile
        check(
            "train",
            steps=at_least(self.steps, 1),
            microbatches=at_least(self.microbatches, 1),
            z_weight=at_least(self.z_weight, 0),
            loss_chunk=at_least(self.loss_chunk, 1),
            ema_decay=(decay, decay is None or 0 < decay < 1, "None or in (0, 1)"),
            log_every=at_least(self.log_every, 1),
            evaluate_every=(every, every is None or every >= 1, "None or an integer >= 1"),
            max_bad_steps=at_least(self.max_bad_steps, 1),
            seed=(self.seed, 0 <= self.seed < 2**32, "an integer in [0, 2**32)"),
            profile=(
                window,
                window is None or (len(window) == 2 and 0 <= window[0] <= window[1]),
                "None or (first step, last step)",
            ),
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """From a nested mapping; an unknown field is an error that tells the nearest name."""
        return build(cls, values, "train")
