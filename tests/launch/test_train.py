"""python -m launch.train in real processes: killed, stopped, damaged, misspelt, out of disk."""

import json
import os
import pty
import random
import resource
import signal
import time

import pytest

from jaxlm.checkpoints import available_steps, restore
from tests.launch.processes import last_step, what_a_run_determines


def digest(workdir, step=40):
    return restore(workdir / "checkpoints", step=step).digest


def same_run(workdir, reference):
    """Parameters, optimizer, counters, and all that was recorded of them."""
    assert digest(workdir) == digest(reference[0])
    assert what_a_run_determines(workdir) == what_a_run_determines(reference[0])


def test_what_a_finished_run_prints(reference):
    workdir, finished = reference
    assert "Held-out text" in finished.stdout and "this run" in finished.stdout
    # Nothing for a terminal alone, and no line a step.
    assert not {c for c in finished.stdout + finished.stderr if ord(c) < 32 and c != "\n"}
    assert len(finished.stderr.splitlines()) == 1
    assert "step 40/40 loss" in finished.stderr
    assert available_steps(workdir / "checkpoints") == [30, 40]


def check_kills(launcher, workdir, reference, kills, *flags):
    """Kill after a random number of records, or in the middle of a save, and go on."""
    generator = random.Random(0)
    step = 0
    for kill in range(kills):
        aim = min(step + generator.randint(1, 40 // kills), 38)
        saving = workdir / "checkpoints" / f"step_{10 * (aim // 10 + 1):08d}.tmp"
        moment = time.monotonic() + 120
        launcher.kill(
            workdir,
            lambda aim=aim, saving=saving, moment=moment, kill=kill: (
                (saving.exists() if kill % 2 else last_step(workdir) >= aim)
                or time.monotonic() > moment
            ),
            *flags,
        )
        step = last_step(workdir)
    finished = launcher.train(workdir, *flags)
    assert finished.returncode == 0, finished.stderr
    same_run(workdir, reference)


@pytest.mark.parametrize("kills", [2, pytest.param(12, marks=pytest.mark.slow)])
def test_killed_and_started_again_is_the_same_run(launcher, reference, tmp_path, kills):
    """Mixture, dropout and the average on: every bit of the last state and of the records."""
    check_kills(launcher, tmp_path, reference, kills, "--config.train.log_every=5")


@pytest.fixture(scope="module")
def experts(launcher, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("experts")
    config = f"--config=tests/launch/tiny_config.py:{launcher.texts},experts"
    finished = launcher.train(workdir, config)
    assert finished.returncode == 0, finished.stderr
    return workdir, config


def test_a_mixture_of_experts_survives_a_kill_too(launcher, experts, tmp_path):
    workdir, config = experts
    check_kills(launcher, tmp_path, (workdir, None), 1, config)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_saves_says_how_to_go_on_and_is_the_same(
    launcher, reference, tmp_path, number
):
    stopped = launcher.stop(tmp_path, number, lambda: last_step(tmp_path) >= 5)
    assert stopped.returncode == 0, stopped.stderr
    (step,) = set(available_steps(tmp_path / "checkpoints")) - {10, 20, 30} or {10}
    name = signal.Signals(number).name
    assert f"stopped by {name} at step " in stopped.stderr
    assert stopped.stderr.endswith("which is saved; the same command goes on from there\n")
    assert "Held-out" not in stopped.stdout
    finished = launcher.train(tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert f"going on from step {step} of " in finished.stderr
    same_run(tmp_path, reference)


def test_a_corrupt_newest_checkpoint_is_passed_over_loudly(launcher, reference, tmp_path):
    """...and the steps since the one before are done again, to the same end."""
    steps = "--config.train.steps=40"
    first = launcher.train(tmp_path, steps)
    assert first.returncode == 0, first.stderr
    chunk = tmp_path / "checkpoints/step_00000040/state/params.embedding/0.0"
    content = bytearray(chunk.read_bytes())
    content[1000] ^= 1
    chunk.write_bytes(content)
    again = launcher.train(tmp_path, steps)
    assert again.returncode == 0, again.stderr
    assert "checkpoint step 40 refused" in again.stderr
    assert "params/embedding: SHA-256 differs" in again.stderr
    assert "checkpoint of step 30 is used instead" in again.stderr
    same_run(tmp_path, reference)


def test_another_config(launcher, reference, tmp_path):
    workdir, _ = reference
    flag = "--config.train.optimizer.b2=0.9"
    refused = launcher.train(workdir, flag)
    assert refused.returncode == 1
    assert refused.stderr.splitlines() == [
        f"error: {workdir} holds a run with another config:",
        "train.optimizer.b2: 0.9 here, 0.95 in the workdir",
        "allowed with --allow_config_change",
    ]
    # In a workdir of its own, since this changes it.
    launcher.kill(tmp_path, lambda: available_steps(tmp_path / "checkpoints") == [10])
    allowed = launcher.train(tmp_path, flag, "--allow_config_change")
    assert allowed.returncode == 0, allowed.stderr
    assert "config changed: train.optimizer.b2: 0.9 here, 0.95 in the workdir" in allowed.stderr
    assert digest(tmp_path) != digest(workdir)


def small_files(limit):
    """No file may grow past `limit` bytes: as on a full disk, the kernel refuses the write."""

    def set_limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return set_limit


def test_no_room_for_a_checkpoint(launcher, reference, tmp_path):
    """The second one is refused by the system; the first stays good, the run ends with an error."""
    launcher.kill(tmp_path, lambda: available_steps(tmp_path / "checkpoints") == [10])
    largest = 320 * 32 * 4  # bytes of the embedding
    full = launcher.train(tmp_path, preexec_fn=small_files(largest - 1))
    assert full.returncode == 1
    assert f"step 20 was not saved in {tmp_path}/checkpoints: " in full.stderr
    assert "File too large" in full.stderr
    assert full.stderr.splitlines()[-1].endswith("The last saved step is 10.")
    assert "Traceback" not in full.stderr
    assert available_steps(tmp_path / "checkpoints") == [10]
    finished = launcher.train(tmp_path)
    assert finished.returncode == 0, finished.stderr
    same_run(tmp_path, reference)


def test_no_room_for_metrics(launcher, tmp_path):
    full = launcher.train(tmp_path, preexec_fn=small_files(5000))
    assert full.returncode == 1
    assert full.stderr.splitlines()[-1].startswith("error: [Errno 27] File too large")
    assert "Traceback" not in full.stderr


def test_progress_bar_on_a_terminal(launcher, tmp_path):
    controller, terminal = pty.openpty()
    flags = ("--config.train.steps=10",)
    with launcher.popen(launcher.command(tmp_path, *flags), stderr=terminal) as process:
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
    assert b"10/10" in shown and b"ETA" in shown and b"tokens/s" in shown
    assert b"\x1b[" in shown  # it moves
    assert "Held-out text" in out and "\x1b" not in out


# Flag: how the error begins, and a part of it. One line each, and status 1.
BAD_FLAGS = {
    "--config.model.num_layer=8": "config.model has no field 'num_layer' (did you mean num_layers",
    "--config.trian.steps=8": "config has no field 'trian' (did you mean train?); allowed: ",
    "--config.train.optimizer.name=adam": "optimizer: name='adam'; allowed: adamw, adafactor,",
    "--config.model.num_layers=0": "num_layers=0; allowed: a number >= 1",
    "--config.model.d_model=33": "d_model=33; allowed: a multiple of attention.num_heads=2",
    "--config.model.vocab_size=100": "vocab_size=100; allowed: at least the tokenizer's 258",
    "--config.model.position_encoding=ropee": "did you mean rope",
    "--config.mesh.fsdp=2": "fsdp=2 × tensor=1 = 2; allowed: sizes whose product is the number of",
    "--config.train.microbatches=3": "microbatches=3; allowed: a divisor of data.batch_size=4",
    "--config.model.num_layers=abc": "flag --config.model.num_layers=abc: invalid literal for int",
    "--config=no/such/config.py": "no/such/config.py",
}


@pytest.fixture(scope="module")
def refusals(launcher, tmp_path_factory):
    """All of them at once: starting a process is what takes the time."""
    workdir = tmp_path_factory.mktemp("refused")
    flags = {
        **dict.fromkeys(BAD_FLAGS),
        **{
            f"--config.data.sources={launcher.texts}/{n}": None
            for n in ("empty.txt", "binary.txt", "absent.txt")
        },
    }
    (launcher.texts / "empty.txt").write_bytes(b"")
    (launcher.texts / "binary.txt").write_bytes(bytes(range(256)) * 10)
    results = {}
    for flag in flags:
        results[flag] = launcher.train(workdir / str(len(results)), flag)
    return results


@pytest.mark.parametrize("flag", BAD_FLAGS)
def test_bad_flags(refusals, flag):
    refused = refusals[flag]
    assert refused.returncode == 1
    assert BAD_FLAGS[flag] in refused.stderr
    assert "Traceback" not in refused.stderr
    assert refused.stdout == ""


@pytest.mark.parametrize("name", ["empty.txt", "binary.txt", "absent.txt"])
def test_bad_files_are_named(launcher, refusals, name):
    refused = refusals[f"--config.data.sources={launcher.texts}/{name}"]
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: ") and f"{launcher.texts}/{name}" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


def test_results_are_where_other_programs_look(reference):
    workdir, _ = reference
    saved = json.loads((workdir / "config.json").read_text())
    assert saved["train"]["steps"] == 40 and saved["model"]["vocab_size"] == 320
    assert restore(workdir / "checkpoints").metadata["model"] == saved["model"]
