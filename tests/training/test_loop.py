"""The loop within this process: what it compiles, records, keeps, refuses and survives."""

import dataclasses
import glob
import json
import logging
import math
import os
import shutil
import signal
import struct
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

import jaxlm
from jaxlm.checkpoints import (
    ConfigMismatchError,
    NoCheckpointError,
    StateMismatchError,
    WorkdirLockedError,
    available_steps,
    load_numpy,
    restore,
    workdir_lock,
)
from jaxlm.checkpoints.retention import discard
from jaxlm.data.loader import open_loader
from jaxlm.load import load_config
from jaxlm.training import loop, progress
from jaxlm.training.compiles import count_compiles
from jaxlm.training.divergence import DivergedError
from jaxlm.training.metrics import MetricsWriter, read_metrics
from jaxlm.training.profile import ProfileWindow
from jaxlm.training.run import CompareConfig
from jaxlm.training.speed import Stopwatch
from jaxlm.training.workdir import CHECKPOINTS, DEFAULT_RUN
from tests.checkpoints.states import assert_same_bytes
from tests.training.texts import tiny_run, train_tiny, write_texts

SPEED = {
    "tokens_per_second",
    "model_flops_per_second",
    "matmul_peak_share",
    "step_ms_p50",
    "step_ms_p95",
    "data_wait_fraction",
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts"))


@dataclasses.dataclass(frozen=True)
class Finished:
    run: object
    workdir: object
    result: object
    compiled: dict


@pytest.fixture(scope="module")
def finished(texts, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    run = tiny_run(texts, train__profile=(2, 3))
    with count_compiles() as compiled:
        result = train_tiny(run, workdir, texts / "cache")
    return Finished(run, workdir, result, dict(compiled))


def scalars(workdir):
    """What TensorBoard's files hold as {(tag, step): value}, later files over earlier ones.

    A file is a list of records: length, checksum, event, checksum.
    """
    found = {}
    for path in sorted(glob.glob(f"{workdir}/tensorboard/*")):
        with open(path, "rb") as file:
            while header := file.read(12):
                event = Event.FromString(file.read(struct.unpack("<Q", header[:8])[0]))
                file.read(4)
                if event.HasField("session_log"):
                    found = {k: v for k, v in found.items() if k[1] < event.step}
                for value in event.summary.value:
                    assert (value.tag, event.step) not in found
                    found[value.tag, event.step] = value.simple_value
    return found


def as_scalars(records):
    return {
        (f"{group}/{name}", r["step"]): np.float32(value)
        for r in records
        for group, values in (("train", r), ("speed", r.get("speed", {})))
        for name, value in values.items()
        if name not in ("step", "speed")
    }


def test_the_step_is_compiled_once(finished):
    assert finished.compiled["train_step"] == 1
    # Evaluation and the peak's measurement have a program each, whatever the number of steps.
    assert finished.compiled["_batch_sums"] == 1
    assert finished.compiled["matmul"] == 1


def test_nothing_compiles_after_the_first_step(texts, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    seen = []
    step = Stopwatch.step

    def counting(self):
        seen.append(sum(compiled.values()))
        step(self)

    monkeypatch.setattr(Stopwatch, "step", counting)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", math.inf)  # however busy the machine is
    run = tiny_run(texts, train__evaluate_every=None, train__steps=12)
    with count_compiles() as compiled:
        train_tiny(run, tmp_path, texts / "cache")
    # All steps are timed but the first, and the one that follows a save.
    assert len(seen) == 10 and len(set(seen)) == 1 and seen[0] > 0
    # And away from a terminal the log has a line at the end, none for each step.
    lines = [r.getMessage() for r in caplog.records if "tokens/s" in r.getMessage()]
    assert len(lines) == 1 and lines[0].startswith("train: step 12/12 loss ")


def test_records(finished, texts):
    records = read_metrics(finished.workdir)
    held_out = [r for r in records if "held_out_loss" in r]
    steps = [r for r in records if "loss" in r]
    assert [r["step"] for r in held_out] == [15, 30, 40]
    assert [r["step"] for r in steps] == list(range(5, 41, 5))
    for r in steps:
        assert set(r["speed"]) == SPEED
        assert all(v > 0 for v in r["speed"].values())
        assert r["speed"]["step_ms_p95"] >= r["speed"]["step_ms_p50"]
        assert r["speed"]["data_wait_fraction"] < 1
        assert {"grad_norm", "learning_rate", "z", "accuracy", "targets"} < set(r)
        assert (r["bad_steps"], r["bad_in_a_row"]) == (0, 0)
    # Three rows of the first text to one of the second; a token a byte, and an end a document.
    documents = [
        Path(source.path).read_text().split("\n\n\n") for source in finished.run.data.sources
    ]
    sizes = [sum(map(len, of_one)) for of_one in documents]
    loader, _ = open_loader(finished.run.data, texts / "cache")
    shares = [weight / len(store) for weight, store in zip((3, 1), loader.stores, strict=True)]
    num_bytes = sum(share * size for share, size in zip(shares, sizes, strict=True))
    ends = sum(share * len(of_one) for share, of_one in zip(shares, documents, strict=True))
    targets = num_bytes + ends
    for r in steps:
        bits = r["loss"] / np.log(2) * targets / num_bytes
        np.testing.assert_allclose(r["bits_per_byte"], bits, rtol=1e-9)
    assert steps[-1]["loss"] < 0.6 * steps[0]["loss"]
    last, result = held_out[-1], finished.result.held_out
    assert last["held_out_loss"] == result.loss
    bits = result.loss * result.tokens / np.log(2)
    size = Path(finished.run.data.held_out[0].path).stat().st_size
    np.testing.assert_allclose(last["held_out_bits_per_byte"], bits / size, rtol=1e-6)


def test_tensorboard_holds_the_same(finished):
    assert scalars(finished.workdir) == as_scalars(read_metrics(finished.workdir))


def test_profile_window_wrote_a_trace(finished):
    assert glob.glob(f"{finished.workdir}/profile/**/*.xplane.pb", recursive=True)


def test_a_trace_starts_and_stops_when_the_step_before_is_done(tmp_path, monkeypatch):
    happened = []

    class State:
        def block_until_ready(self):
            happened.append("done")

    for name in ("start_trace", "stop_trace"):
        monkeypatch.setattr(jax.profiler, name, lambda *_, name=name: happened.append(name))
    with ProfileWindow(tmp_path, (2, 3)) as profile:
        for step in range(6):
            happened.append(step)
            profile.before(step, State())
    assert happened == [0, 1, 2, "done", "start_trace", 3, 4, "done", "stop_trace", 5]


def test_a_signal_while_the_last_state_is_evaluated_ends_the_process(finished, texts, monkeypatch):
    """All is saved by then, and a run that is stopped would be one that goes on."""
    evaluate = loop.evaluate

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return evaluate(*arguments)

    monkeypatch.setattr(loop, "evaluate", interrupted)
    # A shell starts background jobs, such as a whole test run, with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            train_tiny(finished.run, finished.workdir, texts / "cache")
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_finished_run_started_again_trains_and_writes_nothing(finished, texts):
    before = {p: p.read_bytes() for p in finished.workdir.glob("*.jsonl")}
    steps = available_steps(finished.workdir / CHECKPOINTS)
    with count_compiles() as compiled:
        again = train_tiny(finished.run, finished.workdir, texts / "cache")
    assert "train_step" not in compiled and "matmul" not in compiled
    assert_same_bytes(again.state, finished.result.state)
    assert again.held_out == finished.result.held_out
    assert {p: p.read_bytes() for p in finished.workdir.glob("*.jsonl")} == before
    assert available_steps(finished.workdir / CHECKPOINTS) == steps == [30, 40]
    assert scalars(finished.workdir) == as_scalars(read_metrics(finished.workdir))


def test_another_config_is_refused_with_the_difference(finished, texts):
    other = tiny_run(texts, train__steps=50, train__optimizer__b1=0.5, train__profile=(2, 3))
    with pytest.raises(ConfigMismatchError) as caught:
        train_tiny(other, finished.workdir, texts / "cache")
    assert str(caught.value).splitlines()[1:] == [
        "train.optimizer.b1: 0.5 here, 0.9 in the workdir",
        "train.steps: 50 here, 40 in the workdir",
    ]


def test_without_its_config_a_workdir_has_the_checkpoints(finished, texts, tmp_path):
    """Else the run would go on under any config that has the same parameters; and of one that has
    others, their shapes would be all that is told.
    """
    copy = shutil.copytree(finished.workdir, tmp_path / "copy")
    (copy / "config.json").unlink()
    wider = tiny_run(texts, model__d_model=64)
    with pytest.raises(ConfigMismatchError, match=r"\nmodel\.d_model: 64 here, "):
        train_tiny(wider, copy, texts / "cache")
    other = tiny_run(texts, train__optimizer__b1=0.5, train__profile=(2, 3))
    with pytest.raises(ConfigMismatchError) as caught:
        train_tiny(other, copy, texts / "cache")
    difference = "train.optimizer.b1: 0.5 here, 0.9 in the workdir"
    assert str(caught.value).splitlines()[1:] == [difference]
    assert not (copy / "config.json").exists()
    train_tiny(finished.run, copy, texts / "cache")
    assert (copy / "config.json").read_bytes() == (finished.workdir / "config.json").read_bytes()


def test_a_workdir_of_a_version_with_fewer_fields_goes_on(finished, texts, tmp_path):
    """Nobody has to allow a change that the person did not make."""
    older = shutil.copytree(finished.workdir, tmp_path / "older")
    settings = json.loads((older / "config.json").read_text())
    del settings["train"]["rollback"], settings["data"]["stall_seconds"]
    del settings["model"]["attention"]["sliding_window"]
    (older / "config.json").write_text(json.dumps(settings))
    train_tiny(finished.run, older, texts / "cache")
    assert json.loads((older / "config.json").read_text())["data"]["stall_seconds"] == 300


@pytest.mark.slow
def test_a_change_that_the_checkpoint_does_not_fit_leaves_the_config(texts, tmp_path):
    run = tiny_run(texts, train__steps=2)
    train_tiny(run, tmp_path, texts / "cache")
    wider = tiny_run(texts, train__steps=2, model__d_model=64)
    with pytest.raises(StateMismatchError):
        train_tiny(wider, tmp_path, texts / "cache", allow_config_change=True)
    train_tiny(run, tmp_path, texts / "cache")


def test_a_comparison_is_not_trained_as_a_run(texts, tmp_path):
    compare = {"position_encodings": ("rope", "nope")}
    run = dataclasses.replace(tiny_run(texts), compare=CompareConfig(**compare))
    with pytest.raises(ValueError, match="compare is set; allowed: None"):
        train_tiny(run, tmp_path, texts / "cache")
    (tmp_path / DEFAULT_RUN).write_text("{}")
    with pytest.raises(ValueError, match="holds a comparison; allowed: a run's, or a new one"):
        train_tiny(tiny_run(texts), tmp_path, texts / "cache")


def test_a_run_is_opened(finished):
    """It has a config.json, as a folder of the hub's has."""
    model, params, tokenizer = jaxlm.load(finished.workdir)
    assert model.config.d_model == finished.run.model["d_model"]
    assert_same_bytes(params, finished.result.state.averaged_params)
    assert tokenizer.name == "bytes"


def test_a_step_that_is_deleted_while_it_is_opened(finished, tmp_path, monkeypatch):
    """Of a run that goes on: another step is opened, and an error where none is left."""
    shutil.copytree(finished.workdir, tmp_path / "run")
    *_, older, newest = available_steps(tmp_path / "run/checkpoints")

    def deleted(*arguments, **options):
        restored = restore(*arguments, **options)
        if restored.step == newest:
            discard(restored.folder)
        return restored

    monkeypatch.setattr(sys.modules["jaxlm.load"], "restore", deleted)
    with pytest.raises(NoCheckpointError, match=f"step {newest} "):
        jaxlm.load(tmp_path / "run", step=newest)
    shutil.rmtree(tmp_path / "run")
    shutil.copytree(finished.workdir, tmp_path / "run")
    _, params, _ = jaxlm.load(tmp_path / "run")
    kept = restore(tmp_path / "run/checkpoints", prefix=("ema", "params"))
    assert kept.step == older
    assert_same_bytes(params, kept.state)


@pytest.mark.parametrize("text", ["{", "[]", '{"data": {}}', None])
def test_a_damaged_config_is_named(tmp_path, text):
    (tmp_path / CHECKPOINTS).mkdir()
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json is (not JSON|absent)|has no model's"):
        load_config(tmp_path)


def test_a_refused_run_leaves_the_tokenizer_alone(finished, texts):
    def files():
        return {p.name: p.read_bytes() for p in (finished.workdir / "tokenizer").iterdir()}

    before = files()
    changes = {"data__tokenizer": "bpe:300", "train__profile": (2, 3)}
    with pytest.raises(ConfigMismatchError):
        train_tiny(tiny_run(texts, **changes), finished.workdir, texts / "cache")
    wider = tiny_run(texts, **changes, model__d_model=64)
    with pytest.raises(StateMismatchError):
        train_tiny(wider, finished.workdir, texts / "cache", allow_config_change=True)
    assert files() == before


def test_one_writer_per_workdir(finished, texts):
    with workdir_lock(finished.workdir), pytest.raises(WorkdirLockedError):
        train_tiny(finished.run, finished.workdir, texts / "cache")


def test_divergence_stops_the_run_and_says_where_it_can_go_on(texts, tmp_path, caplog):
    """A learning rate of 1e30: parameters stay those after the first step."""
    run = tiny_run(
        texts,
        train__optimizer__schedule="constant",
        train__optimizer__warmup_steps=0,
        train__optimizer__learning_rate=1e30,
        train__max_bad_steps=3,
        train__log_every=1,
        checkpoint__every=1,
        checkpoint__keep_last=1,
        data__seed=5,
    )
    with pytest.raises(DivergedError) as caught:
        train_tiny(run, tmp_path, texts / "cache")
    assert str(caught.value) == (
        "step 4: the loss or gradient of the last 3 steps is not finite (last batch: data seed 5, "
        "step 3); parameters are unchanged since step 1; last good checkpoint: step 1. "
        "Try a lower learning rate or a longer warm-up."
    )
    skipped = [r.getMessage() for r in caplog.records if "skipped" in r.getMessage()]
    assert skipped == [
        f"step {n}: loss or gradient not finite, skipped (batch: data seed 5, step {n - 1})"
        for n in (2, 3, 4)
    ]
    # The records are JSON that any reader takes, and TensorBoard has them as well.
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    strict = [json.loads(x, parse_constant=pytest.fail) for x in lines]
    assert strict[1]["grad_norm"] in ("nan", "inf") and strict[1]["bad_steps"] == 1
    assert not np.isfinite(scalars(tmp_path)["train/grad_norm", 2])
    saved = load_numpy(tmp_path / CHECKPOINTS)
    assert saved["step"] == 1 and saved["bad_steps"].tolist() == [0, 0]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(saved["params"]))


def test_records_past_the_step_of_a_resume_are_dropped(tmp_path):
    with MetricsWriter(tmp_path, 0) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss": float(step)}, {"tokens_per_second": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # cut short by a kill
    with MetricsWriter(tmp_path, 2) as writer:
        writer.write(3, {"loss": 30.0}, {})
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path)] == [(1, 1), (2, 2), (3, 30)]
    assert scalars(tmp_path) == as_scalars(read_metrics(tmp_path))


def test_stopwatch_counts_no_wait_or_time_before_its_start():
    watch = Stopwatch(tokens_per_step=100, flops_per_token=2.0, peak=1000.0)
    watch.waited(100.0)
    time.sleep(0.2)
    watch.step()
    assert watch.read() == {}
    watch.start()
    begin = time.perf_counter()
    for _ in range(2):
        watch.waited(0.001)
        time.sleep(0.01)
        watch.step()
    elapsed = time.perf_counter() - begin
    speed = watch.read()
    assert speed["tokens_per_second"] == pytest.approx(200 / elapsed, rel=0.05)
    assert speed["model_flops_per_second"] == 2 * speed["tokens_per_second"]
    assert speed["matmul_peak_share"] == speed["model_flops_per_second"] / 1000
    assert speed["data_wait_fraction"] == pytest.approx(0.002 / elapsed, rel=0.05)
    assert watch.read() == {}


@pytest.mark.slow
def test_an_implicit_transfer_in_the_loop_is_an_error(texts, tmp_path, monkeypatch):
    """The guard is on: a batch that nobody put on the device stops the run."""
    monkeypatch.setattr(loop._Loop, "_placed", lambda self, batch, rows: batch)
    run = tiny_run(texts, train__steps=2)
    with pytest.raises(Exception, match=r"[Dd]isallowed host-to-device transfer"):
        train_tiny(run, tmp_path, texts / "cache")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__microbatches": 3}, "train: microbatches=3; allowed: a divisor of data.batch_s"),
        ({"train__profile": (5, 2)}, "train: profile=(5, 2); allowed: None or (first step, last"),
        ({"train__seed": -1}, "train: seed=-1; allowed: an integer in [0, 2**32)"),
        ({"checkpoint__every": 0}, "checkpoint: every=0; allowed: a number >= 1"),
        ({"model__num_layers": 0}, "model: num_layers=0; allowed: a number >= 1"),
        ({"model__position_encoding": "ropee"}, "ropee"),
        ({"train__optimizer__name": "adam"}, "optimizer: name='adam'; allowed: adamw, adafactor"),
        ({"model__vocab_size": 100}, "model.vocab_size=100; allowed: at least the tokenizer's 258"),
        ({"train__ema_decay": 1.0}, "train: ema_decay=1.0; allowed: None or in (0, 1)"),
        ({"train__optimizer__clip_norm": math.inf}, "clip_norm=inf; allowed: None or a finite"),
        ({"train__optimizer__weight_decay": math.inf}, "optimizer: weight_decay=inf; allowed"),
        ({"train__profile": ("a", "b")}, "train: profile=('a', 'b'); allowed: tuple[int, int]"),
        ({"model__numerics__param_dtype": "float16"}, "param_dtype='float16'; allowed: float32"),
    ],
)
def test_bad_settings(texts, changes, message):
    with pytest.raises(ValueError) as caught:
        tiny_run(texts, **changes).model_config(tokenizer_vocab_size=258)
    assert message in str(caught.value)


def test_rows_longer_than_the_table_of_learned_positions(texts):
    run = tiny_run(texts, model__position_encoding="learned", model__context_length=16)
    with pytest.raises(ValueError, match=r"data\.sequence_length=32; allowed: at most 16 with"):
        run.check_model()


def test_without_a_held_out_text_nothing_is_evaluated(texts, tmp_path):
    run = tiny_run(texts, data__held_out=(), train__steps=4, train__evaluate_every=2)
    result = train_tiny(run, tmp_path / "run", tmp_path / "cache")
    assert result.held_out is None and int(result.state.step) == 4
