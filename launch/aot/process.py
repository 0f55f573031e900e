"""Runs the child that compiles, and says how it ended."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.aot.topology import environment

_RUNNING: set[subprocess.Popen[str]] = set()
_STOPPED = threading.Event()
ROOT = Path(__file__).parents[2]
_FATAL = re.compile(r"^F\d{4} [\d:.]+ +\d+ [\w.]+:\d+\] (.*)", re.MULTILINE)


class AbortedError(Exception):
    """The process ended without a result; the text is its last word."""


def run_child(
    request: dict[str, Any], folder: Path, flags: Sequence[str], timeout: float
) -> dict[str, Any]:
    """The child's result.json.

    Raises:
        AbortedError: the compiler aborted the process, or it took longer than `timeout` seconds.
    """
    command = [sys.executable, "-m", "launch.aot.child", json.dumps(request), str(folder)]
    # The child imports what this process would.
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    base = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    try:
        status, said = _run(command, environment(base, flags), timeout)
    except subprocess.TimeoutExpired as error:
        raise AbortedError(f"not done after {timeout:.0f} seconds") from error
    result = folder / "result.json"
    if status == 0 and result.exists():
        return json.loads(result.read_text())
    fatal = _FATAL.search(said)
    lines = said.strip().splitlines() or ["no message"]
    raise AbortedError(fatal[1] if fatal else f"exit status {status}: {lines[-1]}")


def _run(command: list[str], env: dict[str, str], timeout: float) -> tuple[int, str]:
    """Exit status and stderr."""
    options: dict[str, Any] = {"text": True, "errors": "replace"}
    options |= {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=env, **options) as process:
        _RUNNING.add(process)
        try:
            if _STOPPED.is_set():
                process.kill()
            said = process.communicate(timeout=timeout)[1]
            return process.wait(), said
        finally:
            process.kill()
            _RUNNING.discard(process)


def stop_children() -> None:
    """Ends those that other threads wait for, and those that they would start after."""
    _STOPPED.set()
    for process in tuple(_RUNNING):
        process.kill()
