"""python -m launch.train in real processes: killed, stopped, damaged, misspelt, out of disk."""

import json
import os
import pty
import shutil
import signal
import time

import numpy as np
import pytest

import jaxlm
from jaxlm.checkpoints import available_steps, restore
from jaxlm.checkpoints.layout import UNFINISHED, step_folders
from jaxlm.data.config import DataConfig
from jaxlm.data.loader import held_out_batches, open_loader
from jaxlm.training.metrics import read_metrics
from launch.overrides import parse, unknown_field
from tests.checkpoints.test_save_restore import all_files
from tests.launch.processes import TINY, Launcher, last_step, what_a_run_determines
from tests.marks import slow_but


def digest(workdir, step=40):
    return restore(workdir / "checkpoints", step=step).digest


def same_run(workdir, reference):
    """Parameters, optimizer, counters, and all that was recorded of them. Every key and the place
    in the data are functions of the seed and of the step, which is one of these counters.
    """
    assert digest(workdir) == digest(reference[0])
    last = [w / "checkpoints" / "step_00000040" for w in (workdir, reference[0])]
    assert all_files(last[0]) == all_files(last[1])
    assert what_a_run_determines(workdir) == what_a_run_determines(reference[0])


def test_what_a_finished_run_prints(reference):
    workdir, finished = reference
    assert "Held-out text" in finished.stdout and "this run" in finished.stdout
    # Nothing for a terminal alone, and no line a step: one each half minute.
    assert not {c for c in finished.stdout + finished.stderr if ord(c) < 32 and c != "\n"}
    assert len(finished.stderr.splitlines()) < 5
    assert "step 40/40 loss" in finished.stderr
    assert available_steps(workdir / "checkpoints") == [30, 40]


def test_the_run_has_all_that_a_start_could_change(reference):
    """Dropout, experts, an average, sources in a mixture, documents packed into rows."""
    workdir, _ = reference
    config = json.loads((workdir / "config.json").read_text())
    assert config["model"]["dropout"] > 0 and config["model"]["moe"]["num_experts"] > 1
    assert config["train"]["ema_decay"] > 0
    loader, _ = open_loader(DataConfig(**config["data"]), workdir / "data")
    one, two = (
        {row["tokens"].tobytes() for row in map(s.__getitem__, range(len(s)))}
        for s in loader.stores
    )
    batches = [loader.batch_at(step) for step in range(40)]
    rows = [row.tobytes() for batch in batches for row in batch["tokens"]]
    assert sum(row in one for row in rows) == 120 and sum(row in two for row in rows) == 40
    documents = [batch["segment_ids"].max(axis=1) for batch in batches]
    assert (np.concatenate(documents) > 1).mean() > 0.5


STOPS = [((signal.SIGTERM, 15),), ((signal.SIGINT, 5), (signal.SIGTERM, 25))]


@pytest.mark.parametrize("stops", [STOPS[0], pytest.param(STOPS[1], marks=pytest.mark.slow)])
def test_stopped_it_saves_says_how_to_go_on_and_is_the_same_run(
    launcher, reference, tmp_path, stops
):
    at = 0
    for number, until in stops:
        stopped = launcher.stop(tmp_path, number, lambda until=until: last_step(tmp_path) >= until)
        assert stopped.returncode == 0, stopped.stderr
        assert at == 0 or f"going on from step {at} of " in stopped.stderr
        at = available_steps(tmp_path / "checkpoints")[-1]
        assert until <= at < 40
        name = signal.Signals(number).name
        assert stopped.stderr.endswith(
            f"stopped by {name} at step {at}, which is saved; the same command goes on from there\n"
        )
        assert "Held-out" not in stopped.stdout
    finished = launcher.train(tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert f"going on from step {at} of " in finished.stderr
    same_run(tmp_path, reference)


def test_a_second_signal_waits_for_the_save_in_flight_alone(launcher, tmp_path):
    """Not for the step's own, which the first one would have ended with."""
    checkpoints = tmp_path / "checkpoints"
    command = launcher.command(tmp_path, "--config.checkpoint.every=1")
    with launcher.popen(command) as process:
        while not (writing := step_folders(checkpoints, UNFINISHED)) and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "interrupted; the same command goes on from what is saved"
    assert available_steps(checkpoints)[-1] >= max(writing)
    assert not step_folders(checkpoints, UNFINISHED)
    assert restore(checkpoints).step == available_steps(checkpoints)[-1]


@pytest.mark.slow
def test_programs_that_are_optimized_go_on_to_the_same_bits(launcher, tmp_path):
    """As a person's are, and other tests' are not."""
    optimized = Launcher(launcher.texts, tmp_path / "programs")
    optimized.env["XLA_FLAGS"] = ""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    flag = "--config.checkpoint.every=2"  # each waits for the one before: the kill is in time
    finished = optimized.train(whole, flag)
    assert finished.returncode == 0, finished.stderr
    optimized.kill(killed, lambda: bool(available_steps(killed / "checkpoints")), flag)
    again = optimized.train(killed, flag)
    assert again.returncode == 0 and "going on from step " in again.stderr, again.stderr
    assert digest(killed) == digest(whole)
    assert what_a_run_determines(killed) == what_a_run_determines(whole)


@pytest.fixture
def copy(reference, tmp_path):
    """A finished workdir to spoil."""
    shutil.copytree(reference[0], tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_a_corrupt_newest_checkpoint_is_passed_over_loudly(launcher, reference, copy):
    """...and the steps since the one before are done again, to the same end."""
    chunk = copy / "checkpoints/step_00000040/state/params.embedding/0.0"
    content = bytearray(chunk.read_bytes())
    content[1000] ^= 1
    chunk.write_bytes(content)
    again = launcher.train(copy)
    assert again.returncode == 0, again.stderr
    assert "checkpoint step 40 refused" in again.stderr
    assert "params/embedding: SHA-256 differs" in again.stderr
    assert "checkpoint of step 30 is used instead" in again.stderr
    same_run(copy, reference)


@pytest.mark.slow
def test_another_config(launcher, reference, copy):
    flag = "--config.data.seed=1"
    refused = launcher.train(copy, flag)
    assert refused.returncode == 1
    assert refused.stderr.splitlines() == [
        f"error: {copy} holds a run with another config:",
        "data.seed: 1 here, 0 in the workdir",
        "allowed with --allow_config_change",
    ]
    assert digest(copy) == digest(reference[0])
    shutil.rmtree(copy / "checkpoints/step_00000040")
    allowed = launcher.train(copy, flag, "--allow_config_change")
    assert allowed.returncode == 0, allowed.stderr
    assert "config changed: data.seed: 1 here, 0 in the workdir" in allowed.stderr
    assert digest(copy) != digest(reference[0])


def test_another_config_is_refused_before_texts_are_read(launcher, copy):
    """Tokenizing may take hours, training a tokenizer too."""
    refused = launcher.train(copy, "--config.data.tokenizer=absent.json")
    assert refused.returncode == 1
    assert 'data.tokenizer: "absent.json" here, ' in refused.stderr.splitlines()[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_while_texts_are_read(launcher, tmp_path, number):
    texts = shutil.copytree(launcher.texts, tmp_path / "texts")
    long = "It was the best of times.\n" * 2_000_000
    for number_of_file in range(6):  # a signal that is late by many seconds is in time
        (texts / f"long{number_of_file}.txt").write_text(long)
    workdir = tmp_path / "run"
    stopped = launcher.stop(
        workdir,
        number,
        lambda: any(workdir.glob("data/*.shards")),
        f"{TINY}:{texts}",
    )
    assert stopped.returncode == 130
    last = "interrupted; the same command goes on from what is saved"
    assert stopped.stderr.splitlines()[-1] == last and "Traceback" not in stopped.stderr


@pytest.mark.slow
def test_other_texts_under_the_same_name(launcher, copy, tmp_path_factory):
    """The tokens would be others than the ones it was trained on, or their order."""
    texts = tmp_path_factory.mktemp("texts")
    shutil.copytree(launcher.texts, texts, dirs_exist_ok=True)
    here = f"--config=tests/launch/tiny_config.py:{texts}"
    began = launcher.train(copy / "run", here, "--config.train.steps=10")
    assert began.returncode == 0, began.stderr
    with (texts / "two.txt").open("a") as file:
        file.write("One more line.\n")
    refused = launcher.train(copy / "run", here, "--config.train.steps=10")
    assert refused.returncode == 1
    assert f"contents.{texts}/two.txt: " in refused.stderr and "Traceback" not in refused.stderr
    assert "allowed with --allow_config_change" in refused.stderr


def test_no_good_checkpoint_at_all(launcher, copy):
    """Not a reason to start anew and write over what can perhaps be saved."""
    for manifest in copy.glob("checkpoints/*/manifest.json"):
        manifest.write_text("{}")
    refused = launcher.train(copy)
    assert refused.returncode == 1
    last = refused.stderr.splitlines()
    assert any(line.startswith("error: no good checkpoint in ") for line in last)
    assert available_steps(copy / "checkpoints") == [30, 40]


def test_no_room_for_a_checkpoint(launcher, reference, copy):
    """The write is refused: the step before stays good, the run ends with an error."""
    shutil.rmtree(copy / "checkpoints/step_00000040")
    largest = max(p.stat().st_size for p in (copy / "checkpoints/step_00000030/state").rglob("0*"))
    full = launcher.train(copy, largest_file=largest - 1)
    assert full.returncode == 1
    assert f"step 40 was not saved in {copy}/checkpoints: " in full.stderr
    assert "File too large" in full.stderr
    # Not always the last line: TensorStore prints of writes that end after the one that failed.
    lines = full.stderr.splitlines()
    said = [line.startswith("error: step 40 was not saved") for line in lines].index(True)
    assert lines[said + 1].endswith("The last saved step is 30.")
    assert available_steps(copy / "checkpoints") == [30]
    finished = launcher.train(copy)
    assert finished.returncode == 0, finished.stderr
    same_run(copy, reference)


def test_no_room_for_metrics(launcher, copy):
    shutil.rmtree(copy / "checkpoints")
    full = launcher.train(copy, largest_file=1500)
    assert full.returncode == 1
    assert "error: [Errno 27] File too large" in full.stderr.splitlines()
    assert "Traceback" not in full.stderr


def test_progress_bar_on_a_terminal(launcher, tmp_path):
    controller, terminal = pty.openpty()
    with launcher.popen(launcher.command(tmp_path), stderr=terminal) as process:
        os.close(terminal)
        shown = b""
        while True:
            try:
                part = os.read(controller, 4096)
            except OSError:  # the other end is closed
                break
            shown += part
        out, _ = process.communicate()
    os.close(controller)
    assert process.returncode == 0, shown
    assert b"40/40" in shown and b"ETA" in shown and b"tokens/s" in shown
    assert b"\x1b[" in shown  # it moves
    assert "Held-out text" in out and "\x1b" not in out


BAD_FLAGS = {
    "--config.model.num_layer=8": "config.model has no field 'num_layer' (did you mean num_layers",
    "--config.model.num_layer=None": "config.model has no field 'num_layer' (did you mean num_la",
    "--config.model.num_layers=None": "model: num_layers=None; allowed: int",
    "--config.model.num_layers=abc": "flag --config.model.num_layers=abc: invalid literal for int",
    "--config.model.d_model=33": "d_model=33; allowed: a multiple of attention.num_heads=2",
    "--workdir=gs://bucket/run": "workdir='gs://bucket/run'; allowed: a local folder",
    "--workdir=": "workdir=''; allowed: a local folder",
    "--config=no/such/config.py": "no/such/config.py",
    "--config=README.md": "--config=README.md; allowed: a Python file",
    "--workdir=README.md": "workdir='README.md'; allowed: a local folder",
    "--config.model.num_layers.foo=3": "--config.model.num_layers.foo=3: config.model.num_layers h",
}


# One that the library refuses, one that the flags do, and one that names no file.
FLAGS_IN_EVERY_RUN = list(BAD_FLAGS)[0::4]


@pytest.mark.parametrize("flag", slow_but(FLAGS_IN_EVERY_RUN, BAD_FLAGS))
def test_bad_flags(launcher, tmp_path, flag):
    refused = launcher.train(tmp_path, flag)
    assert refused.returncode == 1
    assert BAD_FLAGS[flag] in refused.stderr
    assert "Traceback" not in refused.stderr
    assert refused.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_a_binary_file_is_named(launcher, tmp_path):
    path = tmp_path / "binary.txt"
    path.write_bytes(bytes(range(256)) * 10)
    refused = launcher.train(tmp_path / "run", f"--config.data.sources={path}")
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: ") and str(path) in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


# ml_collections loads config files by a method that Python will drop.
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.trian.steps=8", "config has no field 'trian' (did you mean train?); allowed: "),
        ("--config.train.optimizer.beta1=1", "config.train.optimizer has no field 'beta1'"),
        ("-config.nothing=1", "config has no field 'nothing'; allowed: "),
        (
            "--config.model.num_layers.foo=3",
            "config.model.num_layers has no fields; allowed: --config.model.num_layers=VALUE",
        ),
        ("--config.train.steps=8", None),
    ],
)
def test_unknown_field(launcher, flag, message):
    found = unknown_field(["train", f"{TINY}:{launcher.texts}", flag, "--workdir=x"])
    assert found is None if message is None else found.startswith(f"{flag}: {message}")


@pytest.mark.parametrize("flag", ["--config=nofile.py", "--config=nofile.py:x", "--config=tests"])
def test_a_config_that_is_no_file_is_one_line(flag, capsys):
    with pytest.raises(SystemExit):
        parse(["train", *flag.split("="), "--workdir=x"])
    said = f"error: {flag}; allowed: a Python file that is there, as configs/tiny.py\n"
    assert capsys.readouterr().err == said


def test_an_empty_file_is_named(launcher, tmp_path):
    path = tmp_path / "empty.txt"
    path.touch()
    refused = launcher.train(tmp_path / "run", f"--config.data.sources={path}")
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: ") and str(path) in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


def test_what_is_loaded_is_what_was_evaluated(launcher, reference, tmp_path):
    """The average of the parameters, which this run keeps; not its last parameters."""
    workdir, _ = reference
    model, params, tokenizer = jaxlm.load(workdir)
    config = json.loads((workdir / "config.json").read_text())["data"]
    (source,) = config["held_out"]
    batches, num_bytes = held_out_batches(
        source["path"], tokenizer, config["sequence_length"], config["batch_size"], tmp_path
    )
    batches = list(batches)
    last = restore(workdir / "checkpoints", prefix="params").state
    recorded = [r for r in read_metrics(workdir) if "held_out_loss" in r][-1]
    assert jaxlm.evaluate(model, params, batches, num_bytes).loss == recorded["held_out_loss"]
    assert jaxlm.evaluate(model, last, batches, num_bytes).loss != recorded["held_out_loss"]


def test_results_are_where_other_programs_look(reference):
    workdir, _ = reference
    saved = json.loads((workdir / "config.json").read_text())
    assert saved["train"]["steps"] == 40 and saved["model"]["vocab_size"] == 320
    assert restore(workdir / "checkpoints").metadata["model"] == saved["model"]
