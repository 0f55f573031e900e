"""Several real processes train one run on this machine: as one would, stopped, killed."""

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxlm.checkpoints import available_steps, load_numpy, restore
from launch.processes import SECONDS_TO_MEET
from tests.launch.processes import Launcher, last_step, what_a_run_determines

# Without a sign of one process the others stop so soon: three missed heartbeats of three seconds.
HEARTBEAT = 10
STEPS = 20
FLAGS = (f"--config.train.steps={STEPS}", "--config.checkpoint.every=5", "--config.mesh.fsdp=2")


@dataclasses.dataclass(frozen=True)
class Together:
    """Starts one run as several processes, each with devices of its own."""

    launcher: Launcher

    def start(self, workdir, devices: tuple[int, ...], *flags: str) -> list[subprocess.Popen]:
        processes, each = [], flags_of_each(len(devices))
        for own, count in zip(each, devices, strict=True):
            command = self.launcher.command(workdir, *FLAGS, *own, *flags)
            env = {**self.launcher.env, "XLA_FLAGS": devices_flag(count)}
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            processes.append(subprocess.Popen(command, env=env, text=True, **pipes))
        return processes

    def run(self, workdir, devices: tuple[int, ...], *flags: str) -> list[str]:
        """To the end; what each said."""
        processes = self.start(workdir, devices, *flags)
        said = [process.communicate(timeout=300) for process in processes]
        assert [p.returncode for p in processes] == [0] * len(devices), said
        return ["".join(outputs) for outputs in said]


def flags_of_each(count: int) -> list[list[str]]:
    if count == 1:
        return [[]]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = [f"--coordinator=localhost:{port}", f"--heartbeat_seconds={HEARTBEAT}"]
    common.append(f"--num_processes={count}")
    return [[*common, f"--process_id={index}"] for index in range(count)]


def two_of(module: str, *arguments: str) -> list[subprocess.Popen]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return [
        subprocess.Popen([sys.executable, "-m", module, argument, *own], text=True, **pipes)
        for argument, own in zip(arguments, flags_of_each(2), strict=True)
    ]


def devices_flag(count: int) -> str:
    return f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"


@pytest.fixture(scope="module")
def together(launcher):
    return Together(launcher)


@pytest.fixture(scope="module")
def undisturbed(together, tmp_path_factory):
    """The workdir of a run of two processes of two devices, and what each said."""
    workdir = tmp_path_factory.mktemp("two")
    return workdir, together.run(workdir, (2, 2))


def same_run(workdir, other):
    steps = [restore(w / "checkpoints", step=STEPS).digest for w in (workdir, other)]
    assert steps[0] == steps[1]
    assert what_a_run_determines(workdir) == what_a_run_determines(other)


def test_the_first_process_tells_and_all_write(undisturbed):
    workdir, (first, second) = undisturbed
    assert f"step {STEPS}/{STEPS} loss" in first and "Held-out text" in first
    assert "loss" not in second and "Held-out" not in second
    assert available_steps(workdir / "checkpoints") == [15, 20]
    (folder,) = (workdir / "checkpoints" / "step_00000020" / "state").glob("params.embedding")
    assert sorted(p.name for p in folder.glob("[0-9]*")) == ["0.0", "0.1"]  # a chunk a shard


def test_two_processes_learn_what_one_does(undisturbed, together, tmp_path):
    """As close as sums in another order are: 2^-23 of a number a sum, 20 steps, and Adam's
    quotients of small numbers: 1e-5 of the losses and of the largest parameter.
    """
    together.run(tmp_path, (4,))
    for ours, theirs in zip(*map(what_a_run_determines, (undisturbed[0], tmp_path)), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert value == pytest.approx(theirs[name], rel=1e-5, abs=1e-5), name
    ours, theirs = (load_numpy(w / "checkpoints")["params"] for w in (undisturbed[0], tmp_path))
    np.testing.assert_allclose(ours["head"], theirs["head"], atol=1e-5)
    np.testing.assert_allclose(ours["embedding"], theirs["embedding"], atol=1e-5)


@pytest.mark.parametrize("index", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_stopped_and_gone_on_is_the_same_run(together, undisturbed, tmp_path, index):
    """A signal to one process stops all at one step."""
    processes = together.start(tmp_path, (2, 2))
    while last_step(tmp_path) < 5 and all(p.poll() is None for p in processes):
        time.sleep(0.01)
    processes[index].send_signal(signal.SIGTERM)
    said = [p.communicate(timeout=120) for p in processes]
    assert [p.returncode for p in processes] == [0, 0], said
    stopped = available_steps(tmp_path / "checkpoints")[-1]
    assert 5 <= stopped < STEPS
    for _, err in said:
        assert f"stopped by SIGTERM at step {stopped}, which is saved" in err
    together.run(tmp_path, (2, 2))
    same_run(tmp_path, undisturbed[0])


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_killed_and_gone_on_is_the_same_run(together, undisturbed, tmp_path, index):
    """When one process is killed the others stop soon."""
    processes = together.start(tmp_path, (2, 2))
    while last_step(tmp_path) <= 5 and all(p.poll() is None for p in processes):
        time.sleep(0.01)
    processes[index].kill()
    began = time.monotonic()
    said = [p.communicate(timeout=120) for p in processes]
    assert time.monotonic() - began < 6 * HEARTBEAT
    assert all(p.returncode != 0 for p in processes), said

    together.run(tmp_path, (2, 2))
    same_run(tmp_path, undisturbed[0])


@pytest.mark.slow
def test_an_error_of_one_process_ends_all_soon(together, tmp_path):
    """Which the others can't know of: they wait for its part of a step."""
    (tmp_path / "tensorboard").write_text("in the way")
    processes = together.start(tmp_path, (2, 2))
    said = [p.communicate(timeout=200) for p in processes]
    assert processes[0].returncode == 1
    assert "error: [Errno 17] File exists: " in said[0][1] and "Traceback" not in said[0][1]
    # By JAX, which has missed the first: not by what carries sums between CPUs, after 30 seconds,
    # which TPUs have not.
    assert processes[1].returncode == -signal.SIGABRT
    assert "Terminating process because the JAX distributed service" in said[1][1]


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize(("act", "status"), [("fails", 1), ("waits", 130)])
def test_one_that_ends_alone_does_not_wait(index, act, status):
    """Interrupted while it looks whether the others end too, or before."""
    acts = ["waits", "waits"]
    acts[index] = act
    processes = two_of("tests.launch.failing_process", *acts)
    try:
        assert processes[index].stdout.readline() == "started\n"
        time.sleep(2)
        processes[index].send_signal(signal.SIGINT)
        assert processes[index].wait(SECONDS_TO_MEET + HEARTBEAT) == status
        assert processes[1 - index].wait(6 * HEARTBEAT) == -signal.SIGABRT
    finally:
        for process in processes:
            process.kill()
        said = [process.communicate()[1] for process in processes]
    assert ("error: x=1; allowed: 2" if act == "fails" else "interrupted") in said[index]


@pytest.mark.slow
def test_all_go_back_before_a_spike_killed_or_not(together, tmp_path):
    """A rate so large that there are spikes; after some of them all are killed."""
    flags = [f"--config.train.rollback.{field}" for field in ("factor=1.05", "window=3", "skip=2")]
    flags += ["--config.train.optimizer.learning_rate=0.1", "--config.train.log_every=1"]
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    said = together.run(calm, (2, 2), *flags)
    assert all("without its batches" in one for one in said)

    processes = together.start(killed, (2, 2), *flags)
    while last_step(killed) < STEPS - 2 and all(p.poll() is None for p in processes):
        time.sleep(0.002)
    for process in processes:
        process.kill()
    said = [process.communicate() for process in processes]
    assert [p.returncode for p in processes] == [-signal.SIGKILL] * 2, said
    together.run(killed, (2, 2), *flags)
    same_run(killed, calm)
    assert restore(killed / "checkpoints").metadata["rollback"]["skipped"]


@pytest.mark.slow
def test_a_run_goes_on_in_another_number_of_processes(together, undisturbed, tmp_path):
    """Two processes, then one of four devices, then four of one."""
    for steps, devices in ((5, (2, 2)), (10, (4,)), (STEPS, (1, 1, 1, 1))):
        flags = [f"--config.train.steps={steps}", "--allow_config_change"]
        together.run(tmp_path, devices, *flags)
    assert restore(tmp_path / "checkpoints").step == STEPS
    ours, theirs = (load_numpy(w / "checkpoints")["params"] for w in (tmp_path, undisturbed[0]))
    # The schedule knew another end: only the shapes and that it learned are the same.
    assert ours["head"].shape == theirs["head"].shape and np.isfinite(ours["head"]).all()


def test_flags_that_do_not_fit(launcher, tmp_path):
    for flags, message in (
        (["--num_processes=2"], "coordinator is absent; allowed: all of"),
        (
            ["--coordinator=localhost:1", "--num_processes=2", "--process_id=2"],
            "process_id=2; allowed: 0 to 1 of num_processes=2",
        ),
    ):
        finished = launcher.train(tmp_path, *flags)
        assert finished.returncode == 1
        assert finished.stderr.strip().splitlines()[-1].startswith(f"error: {message}")
