"""Runs the child that compiles, and says how it ended."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.aot.topology import environment

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
        run = subprocess.run(
            command,
            env=environment(base, flags),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise AbortedError(f"not done after {timeout:.0f} seconds") from error
    result = folder / "result.json"
    if run.returncode == 0 and result.exists():
        return json.loads(result.read_text())
    fatal = _FATAL.search(run.stderr)
    lines = run.stderr.strip().splitlines() or ["no message"]
    raise AbortedError(fatal[1] if fatal else f"exit status {run.returncode}: {lines[-1]}")
