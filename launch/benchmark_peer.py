"""A peer of launch.benchmark: a child process that does one repetition a request."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Peer:
    """`launch/benchmark_transformers.py` under an interpreter that has torch and transformers.

    Args:
        python: the interpreter.
        settings: what to measure; see there.

    Attributes:
        about: what it is.

    Raises:
        ValueError: it does not start.
    """

    def __init__(self, python: str, settings: Mapping[str, Any]):
        self._python = python
        script = Path(__file__).with_name("benchmark_transformers.py")
        self._process = subprocess.Popen(
            # -P: modules beside the script, such as inspect, are not the standard library's.
            [python, "-P", str(script), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # A waiting peer must not spin on the cores that we are measured on.
            env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"},
        )
        self.about = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ValueError(
                f"the peer failed to start with --peer_python={self._python}; allowed: an "
                "interpreter that imports torch and transformers"
            )
        return json.loads(line)

    def run(self) -> dict[str, float]:
        """Seconds of each phase of one repetition."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
