"""The training loop: resume, step, measure, save, stop."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding

from jaxlm.checkpoints import (
    Saver,
    available_steps,
    check_config,
    local_folder,
    restore,
    workdir_lock,
    write_config,
)
from jaxlm.data.loader import Loader
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.evaluation.loss import HeldOut, evaluate
from jaxlm.model.partition import combine
from jaxlm.model.transformer import Transformer
from jaxlm.sharding.memory import check_room
from jaxlm.sharding.mesh import batch_sharding, local_rows, make_mesh, place_rows
from jaxlm.sharding.processes import from_first
from jaxlm.training.divergence import FiniteCheck
from jaxlm.training.flops import matmul_peak, train_flops_per_token
from jaxlm.training.objectives.preference import Preference
from jaxlm.training.optimizers import make_optimizer
from jaxlm.training.profile import ProfileWindow
from jaxlm.training.report import Report, reporting
from jaxlm.training.rollback import SpikeCheck, SpikeError
from jaxlm.training.run import RunConfig
from jaxlm.training.speed import Stopwatch
from jaxlm.training.start import Start, from_checkpoint, from_seed
from jaxlm.training.state import TrainState, abstract_state, start_state
from jaxlm.training.step import Metrics, NextToken, Objective, loss_spec, make_train_step
from jaxlm.training.stopping import StopRequest, stop_on_signals
from jaxlm.training.workdir import CHECKPOINTS, PROFILE, TOKENIZER

# Once a process: on a CPU it takes a good part of a second.
_matmul_peak = functools.cache(matmul_peak)

TrainStep = Callable[..., tuple[TrainState, Metrics]]
# From the newest step asked for to a state and its metadata.
GoOn = Callable[[int | None], tuple[TrainState, Mapping[str, Any]]]


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        state: the last state.
        frozen: what is not learned; empty without an adapter.
        held_out: loss on the held-out text; None if there is none, or if the run was stopped
            before its end.
        stopped_by: name of the signal, or None.
    """

    state: TrainState
    frozen: Any
    held_out: HeldOut | None
    stopped_by: str | None

    @property
    def params(self) -> Any:
        """All parameters: averaged ones if there are such, else the last."""
        return combine(self.frozen, self.state.averaged_params)


def run_loop(
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
        ConfigMismatchError, NoCheckpointError: the workdir holds a run of another config or of
            other texts; or checkpoints of which none is good.
        WorkdirLockedError: another process trains in it.
        DivergedError: too many steps in a row without a finite loss.
        SaveError: a checkpoint could not be written; the earlier ones are good.
        ValueError: not a local folder.
    """
    checkpoints = (workdir := local_folder(workdir)) / CHECKPOINTS
    with contextlib.ExitStack() as stack:
        from_first(lambda: stack.enter_context(workdir_lock(workdir)))
        stack.enter_context(jax.set_mesh(mesh := make_mesh(run.mesh)))  # kernels ask it
        rows = batch_sharding(mesh, *(size := (run.data.batch_size, run.data.sequence_length)))
        begin = _begin(run, model, mesh)
        settings = _settings(run, model, loader, begin)
        changed, absent = allow_config_change, run.default_settings()
        from_first(lambda: check_config(workdir, settings, changed, absent, checkpoints))
        about, files = {**settings, "tokenizer": tokenizer.name}, {TOKENIZER: workdir / TOKENIZER}
        saver = _saver(run, checkpoints)
        with stop_on_signals() as stop, saver:
            step, go_on = _step_and_states(run, model, begin, mesh, checkpoints)
            state, saved = go_on(None)
            from_first(lambda: _write_down(workdir, settings, tokenizer))
            told = functools.partial(reporting, workdir, description, run.train.steps)
            report = _reopened(stack, told)
            loop = _Loop(
                run=run,
                model=model,
                loader=dataclasses.replace(loader, rows=local_rows(rows, *size)),
                rows=rows,
                frozen=begin.frozen,
                step=step,
                save=lambda n, x, more: saver.save(n, x, {**about, **more}, files),
                check_finite=FiniteCheck(run.train.max_bad_steps, run.data.seed, saver),
                check_spike=SpikeCheck(run.train.rollback, saved),
                report=report(int(state.step)),
                profile=stack.enter_context(ProfileWindow(workdir / PROFILE, run.train.profile)),
                stop=stop,
            )
            loop, state = _to_the_end(loop, state, saver, go_on, report)
            stopped = stop.at_the_end()
        # All is saved: a signal ends what is left as it ends any program.
        held_out = loop.evaluate(state) if stopped is None else None
    if stopped is not None:
        line = "stopped by %s at step %d, which is saved; the same command goes on from there"
        logging.warning(line, stopped, int(state.step))
    return TrainResult(state, begin.frozen, held_out, stopped)


def _settings(run: RunConfig, model: Transformer, loader: Loader, begin: Start) -> dict[str, Any]:
    """All that a run goes on by, as config.json and checkpoints have it."""
    base = {} if begin.digest is None else {"base": begin.digest}
    model_config = model.config.to_dict()
    return {**run.to_dict(), "model": model_config, "contents": loader.contents, **base}


def _saver(run: RunConfig, checkpoints: Path) -> Saver:
    """Keeps a step that the run can go back to, whichever of the next ones has a spike."""
    keep, rollback = run.checkpoint, run.train.rollback
    go_back = 0 if rollback is None else rollback.skip - 1
    return Saver(checkpoints, keep_last=keep.keep_last, keep_every=keep.keep_every, go_back=go_back)


def _to_the_end(
    loop: _Loop, state: TrainState, saver: Saver, go_on: GoOn, report: Callable[[int], Report]
) -> tuple[_Loop, TrainState]:
    """All steps, with a return to an earlier one at each spike of the loss."""
    while True:
        try:
            state = loop.run_steps(state)
            saver.wait()
            return loop, state
        except SpikeError as spike:
            back_to, skipped = spike.back_to, spike.skipped
        # The error is gone, and with it the state of the spike: there is room for another.
        saver.wait()
        state, saved = go_on(back_to)
        saver.give_up_after(back_to)
        loop = dataclasses.replace(
            loop,
            check_spike=SpikeCheck(loop.run.train.rollback, saved, skipped),
            report=report(int(state.step)),
        )


def _reopened(
    stack: contextlib.ExitStack, told: Callable[[int], contextlib.AbstractContextManager[Report]]
) -> Callable[[int], Report]:
    """Opens a report from a step on, and closes the one before; `stack` closes the last."""
    last = stack.enter_context(contextlib.ExitStack())

    def report(begun: int) -> Report:
        last.close()
        return last.enter_context(told(begun))

    return report


def _write_down(workdir: Path, settings: Mapping[str, Any], tokenizer: Tokenizer) -> None:
    """What else a workdir holds, once it is known that the run can go on with it."""
    write_config(workdir, settings)
    tokenizer.save(workdir / TOKENIZER)


def compile_step(step: TrainStep, shapes: TrainState) -> TrainStep:
    """The step jitted, its state donated and kept where `shapes` (see abstract_state) says."""
    shardings = jax.tree.map(lambda x: x.sharding, shapes)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def _begin(run: RunConfig, model: Transformer, mesh: Mesh) -> Start:
    if run.finetune is None:
        return from_seed(model, run.train.seed, mesh)
    return from_checkpoint(model, run.finetune, run.train.seed, mesh)


def _objective(run: RunConfig, model: Transformer) -> Objective:
    beta = None if run.finetune is None else run.finetune.preference_beta
    if beta is not None:
        return Preference(model, beta, run.train.loss_chunk)
    return NextToken(model, loss_spec(model.config, run.train))


def _step_and_states(
    run: RunConfig, model: Transformer, begin: Start, mesh: Mesh, folder: Path
) -> tuple[TrainStep, GoOn]:
    """The step; and what gives the newest good checkpoint's state, none newer than asked for, and
    metadata, or a fresh state where there are no checkpoints, made where it belongs.
    """
    optimizer = make_optimizer(run.train.optimizer, run.train.steps)
    shapes = abstract_state(begin.shapes, optimizer, run.train, mesh)
    check_room("the training state", shapes)
    train_step = make_train_step(model, optimizer, run.train, _objective(run, model))

    def go_on(up_to: int | None) -> tuple[TrainState, Mapping[str, Any]]:
        if from_first(lambda: bool(available_steps(folder))):
            restored = restore(folder, shapes, up_to=up_to)
            logging.info("going on from step %d of %s", restored.step, folder)
            return restored.state, restored.metadata
        fresh = jax.jit(
            lambda p: start_state(p, optimizer, run.train),
            out_shardings=jax.tree.map(lambda x: x.sharding, shapes),
            donate_argnums=0,
        )
        # Blocked on: of a program that found no memory, a number would be waited for without end.
        return jax.block_until_ready(fresh(jax.block_until_ready(begin.make()))), {}

    return compile_step(train_step, shapes), go_on


@dataclasses.dataclass(frozen=True)
class _Loop:
    """The run's parts, and what happens between two steps."""

    run: RunConfig
    model: Transformer
    loader: Loader
    rows: NamedSharding
    frozen: Any
    step: TrainStep
    save: Callable[[int, TrainState, Mapping[str, Any]], None]
    check_finite: FiniteCheck
    check_spike: SpikeCheck
    report: Report
    profile: ProfileWindow
    stop: StopRequest

    def run_steps(self, state: TrainState) -> TrainState:
        """All steps that are left, or until a stop is asked for; the last state is saved.

        Raises:
            SpikeError: where the run has to go back to.
        """
        t, start = self.run.train, int(state.step)
        if start >= t.steps:
            return state
        if start == 0 and t.rollback is not None:
            self.save(0, state, self.check_spike.to_dict())  # to go back to
        watch = self._stopwatch()
        batches = self._batches(start, watch)
        unchecked: tuple[int, Metrics] | None = None
        for done in range(start + 1, t.steps + 1):
            self.profile.before(done - 1, state)
            with jax.transfer_guard("disallow"):
                state, metrics = self.step(state, next(batches), self.frozen)
                # The step before, never this one: the device always has work, and the loop is one
                # step ahead at most.
                if unchecked:
                    bad = self._check(*unchecked)
                    watch.step()
            unchecked = done, metrics
            if watch.paused:  # this step compiled, or came after a pause: nothing ran beside it
                bad, unchecked = self._check(done, metrics), None
                watch.start()
            self.report.step(done)
            last = self.stop.is_last(done) or done == t.steps
            if done % t.log_every == 0 or done == t.steps:
                self._record(done, metrics, watch.read())
            if t.evaluate_every and done % t.evaluate_every == 0 and done < t.steps:
                watch.pause()
                self.evaluate(state)
            if last or done % self.run.checkpoint.every == 0:
                if unchecked:
                    bad = self._check(*unchecked)
                    watch.step()
                    unchecked = None
                watch.pause()
                # Within a bad streak the parameters may be what makes the steps bad: a save would
                # push a good checkpoint out.
                if last or not bad:
                    self.save(done, state, self.check_spike.to_dict())
            if last:
                break
        return state

    def _check(self, step: int, metrics: Metrics) -> int:
        """As FiniteCheck; both wait for the metrics."""
        bad = self.check_finite(step, metrics)
        self.check_spike(step, metrics)
        return bad

    def _stopwatch(self) -> Stopwatch:
        data = self.run.data
        flops = train_flops_per_token(self.model.config, data.sequence_length)
        tuned = self.run.finetune
        if tuned is not None and tuned.adapter is not None:
            # Frozen matrices have no gradient: two passes of three. A reference is one pass more.
            flops *= (2 + (tuned.preference_beta is not None)) / 3
        peak = _matmul_peak() * jax.device_count()
        return Stopwatch(data.batch_size * data.sequence_length, flops, peak)

    def _batches(self, start: int, watch: Stopwatch) -> Iterator[Mapping[str, jax.Array]]:
        """Batches on the devices, from step `start` on, with the time each one took to come."""
        source, local = self._without_spikes(start), self.loader.rows
        assert local is not None
        while True:
            begin = time.perf_counter()
            batch = next(source)
            watch.waited(time.perf_counter() - begin)
            yield self._placed(batch, local)

    def _placed(self, batch: Mapping[str, np.ndarray], rows: Sequence[int]) -> dict[str, jax.Array]:
        """On the devices of all processes; of the whole batch, `rows` are at hand."""
        size = self.run.data.batch_size
        return {name: place_rows(x, rows, size, self.rows) for name, x in batch.items()}

    def _without_spikes(self, start: int) -> Iterator[Mapping[str, Any]]:
        """The loader's batches from step `start` on, but for the skipped ones."""
        last: int | None = start
        while last is not None:
            start, last = last, self.check_spike.next_skip(last)
            count = None if last is None else last - start
            numbered = self.loader.iterate(self.check_spike.batch_of(start))
            with contextlib.closing(numbered) as batches:
                yield from itertools.islice(batches, count)

    def _record(self, step: int, metrics: Metrics, speed: Mapping[str, float]) -> None:
        values = {k: float(v) for k, v in jax.device_get(metrics).items()}
        if not self.loader.stores[0].pairs:  # whose loss is no number of nats a token
            values["bits_per_byte"] = values["loss"] / math.log(2) / self.loader.bytes_per_target
        self.report.record(step, values, speed)

    def evaluate(self, state: TrainState) -> HeldOut | None:
        """Loss on the held-out text, also into the metrics; None without such a text."""
        if not self.loader.held_out_stores:
            return None
        params = combine(self.frozen, state.averaged_params)
        every = range(self.run.data.batch_size)
        batches = (self._placed(batch, every) for batch in self.loader.held_out())
        result = evaluate(self.model, params, batches, self.loader.held_out_bytes)
        values = {"held_out_loss": result.loss, "held_out_accuracy": result.accuracy}
        if result.bits_per_byte is not None:
            values["held_out_bits_per_byte"] = result.bits_per_byte
        self.report.record(int(state.step), values, {})
        return result
