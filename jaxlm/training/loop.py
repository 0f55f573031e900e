"""The training loop: resume, step, measure, save, stop."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from absl import logging
from jax.sharding import NamedSharding

from jaxlm.checkpoints import (
    NoCheckpointError,
    Saver,
    available_steps,
    check_config,
    restore,
    workdir_lock,
)
from jaxlm.data.loader import Loader
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.evaluation.loss import HeldOut, evaluate
from jaxlm.model.transformer import Transformer
from jaxlm.sharding.mesh import batch_sharding, make_mesh
from jaxlm.training.divergence import FiniteCheck
from jaxlm.training.flops import matmul_peak, train_flops_per_token
from jaxlm.training.metrics import MetricsWriter
from jaxlm.training.optimizers import make_optimizer
from jaxlm.training.profile import ProfileWindow
from jaxlm.training.progress import Progress
from jaxlm.training.run import RunConfig
from jaxlm.training.speed import Stopwatch
from jaxlm.training.state import TrainState, abstract_state, init_state
from jaxlm.training.step import Batch, Metrics, make_train_step
from jaxlm.training.stopping import StopRequest, stop_on_signals

CHECKPOINTS = "checkpoints"
TOKENIZER = "tokenizer"
PROFILE = "profile"
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        state: the last state.
        held_out: loss on the held-out text; None if the run was stopped before its end.
        stopped_by: name of the signal, or None.
    """

    state: TrainState
    held_out: HeldOut | None
    stopped_by: str | None


def train(
    run: RunConfig,
    model: Transformer,
    tokenizer: Tokenizer,
    loader: Loader,
    workdir: str | Path,
    *,
    description: str = "train",
    allow_config_change: bool = False,
) -> TrainResult:
    """Trains until `run.train.steps`, from the newest good checkpoint of `workdir` if it has one.

    Raises:
        ConfigMismatchError: the workdir holds another config.
        WorkdirLockedError: another process trains in it.
        DivergedError: too many steps in a row without a finite loss.
        SaveError: a checkpoint could not be written; the earlier ones are good.
    """
    workdir = Path(workdir)
    checkpoints = workdir / CHECKPOINTS
    with contextlib.ExitStack() as stack:
        stack.enter_context(workdir_lock(workdir))
        settings = {**run.to_dict(), "model": model.config.to_dict()}
        check_config(workdir, settings, allow_config_change)
        tokenizer.save(workdir / TOKENIZER)
        mesh = make_mesh(run.mesh)
        rows = batch_sharding(mesh, run.data.batch_size)
        optimizer = make_optimizer(run.train.optimizer, run.train.steps)
        shapes = abstract_state(model, optimizer, run.train, mesh)
        stop = stack.enter_context(stop_on_signals())
        state = _first_state(
            shapes, lambda: init_state(model, optimizer, run.train), checkpoints
        )
        start, c = int(state.step), run.checkpoint
        saver = stack.enter_context(
            Saver(checkpoints, keep_last=c.keep_last, keep_every=c.keep_every)
        )
        loop = _Loop(
            run=run,
            model=model,
            loader=loader,
            rows=rows,
            step=jax.jit(
                make_train_step(model, optimizer, run.train),
                donate_argnums=0,
                out_shardings=(jax.tree.map(lambda x: x.sharding, shapes), None),
            ),
            check_finite=FiniteCheck(run.train.max_bad_steps, run.data.seed, checkpoints),
            writer=stack.enter_context(MetricsWriter(workdir, start)),
            progress=stack.enter_context(Progress(description, run.train.steps, start)),
            profile=stack.enter_context(ProfileWindow(workdir / PROFILE, run.train.profile)),
            stop=stop,
        )
        metadata = {**settings, "tokenizer": tokenizer.name}
        files = {"tokenizer": workdir / TOKENIZER}
        for done, state in loop.states_to_save(state):  # noqa: B020  the newest is the result
            saver.save(done, state, metadata, files)
        saver.wait()
        finished = int(state.step) >= run.train.steps
        held_out = loop.evaluate(state) if finished else None
    if stop.name is not None:
        logging.warning(
            "stopped by %s at step %d, which is saved; the same command goes on from there",
            stop.name,
            int(state.step),
        )
    return TrainResult(state, held_out, stop.name)


def _first_state(shapes: TrainState, fresh: Callable[[], TrainState], folder: Path) -> TrainState:
    """The newest good checkpoint's state, or a fresh one, made where it belongs."""
    if available_steps(folder):
        try:
            restored = restore(folder, shapes)
        except NoCheckpointError as error:
            logging.warning("%s; starting at step 0", error)
        else:
            logging.info("going on from step %d of %s", restored.step, folder)
            return restored.state
    shardings = jax.tree.map(lambda x: x.sharding, shapes)
    return jax.jit(fresh, out_shardings=shardings)()
