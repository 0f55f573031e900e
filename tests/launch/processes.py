"""Entry points as people start them: processes of their own, with signals and limits."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from jaxlm.training.metrics import read_metrics

TINY = "--config=tests/launch/tiny_config.py"


class Launcher:
    """Starts `python -m launch.…`; all processes share a cache of compiled programs."""

    def __init__(self, texts: Path, cache: Path):
        self.texts = texts
        self.env = {
            **os.environ,
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }

    def command(self, workdir: Path, *flags: str) -> list[str]:
        """Trains the tiny config, or that of a --config flag."""
        given = any(flag.startswith("--config=") for flag in flags)
        config = [] if given else [f"{TINY}:{self.texts}"]
        return [sys.executable, "-m", "launch.train", *config, f"--workdir={workdir}", *flags]

    def popen(self, command: list[str], **options) -> subprocess.Popen:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": self.env}
        return subprocess.Popen(command, text=True, **{**pipes, **options})

    def train(
        self,
        workdir: Path,
        *flags: str,
        largest_file: int | None = None,
        most_memory: int | None = None,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess:
        """Trains to the end. No file may grow past `largest_file` bytes: as on a full disk, the
        kernel refuses the write; so it does memory beyond `most_memory` bytes of addresses. `env`
        adds variables to the environment.
        """
        command = self.command(workdir, *flags)
        with self.popen(command, env={**self.env, **(env or {})}) as process:
            limits = {resource.RLIMIT_FSIZE: largest_file, resource.RLIMIT_AS: most_memory}
            for limit, value in limits.items():
                if value is not None:
                    resource.prlimit(process.pid, limit, (value, value))
            out, err = process.communicate()
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def stop(
        self, workdir: Path, number: int, when: Callable[[], bool], *flags: str
    ) -> subprocess.CompletedProcess:
        """Trains until `when()` holds, then sends the signal."""
        command = self.command(workdir, *flags)
        with self.popen(command) as process:
            while not when() and process.poll() is None:
                time.sleep(0.002)
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)
            out, err = process.communicate()
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def kill(self, workdir: Path, when: Callable[[], bool], *flags: str) -> None:
        """kill -9 as soon as `when()` holds."""
        killed = self.stop(workdir, signal.SIGKILL, when, *flags)
        assert killed.returncode == -signal.SIGKILL, killed.stderr


def last_step(workdir: Path) -> int:
    """Of the newest record of metrics.jsonl."""
    return max((r["step"] for r in read_metrics(workdir)), default=0)


def what_a_run_determines(workdir: Path) -> list[dict]:
    """The records without what depends on the machine."""
    return [{k: v for k, v in r.items() if k != "speed"} for r in read_metrics(workdir)]
