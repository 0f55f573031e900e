"""The training loop: resume, step, measure, save, stop."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

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
from jaxlm.training.flops import matmul_peak, train_flops_per_token
from jaxlm.training.metrics import MetricsWriter
from jaxlm.training.optimizers import make_optimizer
from jaxlm.training.progress import Progress
from jaxlm.training.run import RunConfig
from jaxlm.training.speed import Stopwatch
from jaxlm.training.state import TrainState, abstract_state, init_state
from jaxlm.training.step import Batch, Metrics, make_train_step
from jaxlm.training.stopping import StopRequest, stop_on_signals

CHECKPOINTS = "checkpoints"
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


class DivergedError(RuntimeError):
    """Too many steps in a row without a finite loss; the text says where the run can go on."""


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
        DivergedError: see there.
        SaveError: a checkpoint could not be written; the earlier ones are good.
    """
    workdir = Path(workdir)
    with contextlib.ExitStack() as stack:
        stack.enter_context(workdir_lock(workdir))
        settings = {"run": _plain(run), "model": model.config.to_dict()}
        check_config(workdir, settings, allow_config_change)
        mesh = make_mesh(run.mesh)
        optimizer = make_optimizer(run.train.optimizer, run.train.steps)
        shapes = abstract_state(model, optimizer, run.train, mesh)
        state = _first_state(
            shapes, lambda: init_state(model, optimizer, run.train), workdir / CHECKPOINTS
        )
        start = int(state.step)
        writer = stack.enter_context(MetricsWriter(workdir, start))
        saver = stack.enter_context(
            Saver(
                workdir / CHECKPOINTS,
                keep_last=run.checkpoint.keep_last,
                keep_every=run.checkpoint.keep_every,
            )
        )
        progress = stack.enter_context(Progress(description, run.train.steps, start))
        stop = stack.enter_context(stop_on_signals())
        loop = _Loop(
            run, model, tokenizer, loader, workdir, mesh, writer, saver, progress, settings
        )
        step = jax.jit(
            make_train_step(model, optimizer, run.train),
            donate_argnums=0,
            out_shardings=(jax.tree.map(lambda x: x.sharding, shapes), None),
        )
        state = loop.steps(state, step, stop)
        finished = int(state.step) >= run.train.steps
        held_out = loop.evaluate(state) if finished else None
    if stop.name is not None:
        logging.warning(
            "stopped by %s at step %d, which is saved; the same command goes on from there",
            stop.name,
            int(state.step),
        )
    return TrainResult(state, held_out, stop.name)


def _plain(run: RunConfig) -> dict[str, Any]:
    """The run's settings as JSON-able values; the comparison around it is not part of it."""
    return {
        "data": dataclasses.asdict(run.data),
        "train": dataclasses.asdict(run.train),
        "checkpoint": dataclasses.asdict(run.checkpoint),
        "mesh": dataclasses.asdict(run.mesh),
    }


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


@dataclasses.dataclass
class _Loop:
    """The run's parts, and what happens between two steps."""

    run: RunConfig
    model: Transformer
    tokenizer: Tokenizer
    loader: Loader
    workdir: Path
    mesh: Mesh
    writer: MetricsWriter
    saver: Saver
    progress: Progress
    settings: Mapping[str, Any]

    def steps(self, state: TrainState, step_function: TrainStep, stop: StopRequest) -> TrainState:
        """All steps that are left, or until a stop is asked for."""
        t = self.run.train
        start = int(state.step)
        if start >= t.steps:
            return state
        length = self.run.data.sequence_length
        tokens = self.run.data.batch_size * length
        watch = Stopwatch(train_flops_per_token(self.model.config, length), matmul_peak())
        batches = self._batches(start, watch)
        before: Metrics = {}
        for step in range(start, t.steps):
            with self._trace(step), jax.transfer_guard("disallow"):
                state, metrics = step_function(state, next(batches))
                # The step before, never this one: the device always has work, and the loop is one
                # step ahead at most.
                self._check_finite(step, before)
            if step == start:
                jax.block_until_ready(metrics)
                watch.start()  # the first step compiled
            else:
                watch.step()
            before = metrics
            done = step + 1
            self.progress.update(done)
            if done % t.log_every == 0 or done == t.steps:
                self._record(done, metrics, watch.read(tokens))
            if t.evaluate_every and done % t.evaluate_every == 0 and done < t.steps:
                self.evaluate(state)
                watch.start()
            if stop.name or done % self.run.checkpoint.every == 0 or done == t.steps:
                self._check_finite(done, metrics)
                self._save(state, done)
                watch.start()
            if stop.name:
                break
        self.saver.wait()
        return state

    def _batches(self, start: int, watch: Stopwatch) -> Iterator[Mapping[str, jax.Array]]:
        """Batches on the devices, from step `start` on, with the time each one took to come."""
        sharding = batch_sharding(self.mesh, self.run.data.batch_size)
        source = self.loader.iterate(start)
        while True:
            begin = time.perf_counter()
            batch = next(source)
            watch.waited(time.perf_counter() - begin)
            yield jax.device_put(batch, sharding)

    def _check_finite(self, step: int, metrics: Metrics) -> None:
        """Says that step `step` was skipped, and stops the run after too many in a row."""
        in_a_row = int(jax.device_get(metrics["bad_in_a_row"])) if metrics else 0
        if not in_a_row:
            return
        batch = f"data seed {self.run.data.seed}, step {step - 1}"
        logging.warning("step %d: loss or gradient not finite, skipped (batch: %s)", step, batch)
        if in_a_row >= self.run.train.max_bad_steps:
            good = available_steps(self.workdir / CHECKPOINTS)
            raise DivergedError(
                f"step {step}: the loss or gradient of the last {in_a_row} steps is not finite "
                f"(last batch: {batch}); parameters are unchanged since step {step - in_a_row}; "
                f"last saved step: {good[-1] if good else 'none'}. "
                "Try a lower learning rate or a longer warm-up."
            )

    def _record(self, step: int, metrics: Metrics, speed: Mapping[str, float]) -> None:
        values = {k: float(v) for k, v in jax.device_get(metrics).items()}
        finite = {k: v if np.isfinite(v) else str(v) for k, v in values.items()}
        self.writer.write(step, finite, speed)
        self.progress.show(values["loss"], speed)

    def evaluate(self, state: TrainState) -> HeldOut:
        """Loss on the held-out text, also into the metrics."""
        result = evaluate(
            self.model, state.params, self.loader.held_out(), self.loader.held_out_bytes
        )
        values = {"held_out_loss": result.loss, "held_out_accuracy": result.accuracy}
        if result.bits_per_byte is not None:
            values["held_out_bits_per_byte"] = result.bits_per_byte
        self.writer.write(int(state.step), values, {})
        return result

    def _save(self, state: TrainState, step: int) -> None:
        metadata = {**self.settings, "tokenizer": self.tokenizer.name}
        self.saver.save(step, state, metadata, {"tokenizer": self.workdir / "tokenizer"})

    @contextlib.contextmanager
    def _trace(self, step: int) -> Iterator[None]:
        """An xprof trace from the first to the last step of `train.profile`."""
        first, last = self.run.train.profile or (-1, -1)
        if step == first:
            jax.profiler.start_trace(str(self.workdir / "profile"))
        yield
        if step == last:
            jax.profiler.stop_trace()
