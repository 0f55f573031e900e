"""How fast the steps between two records were, and what they waited for."""

from __future__ import annotations

import time

import numpy as np


class Stopwatch:
    """Collects step times and data waits; `read` sums them up and starts anew. It is paused until
    `start`.

    Args:
        tokens_per_step: of a batch.
        flops_per_token: model FLOPs, see jaxlm.training.flops.
        peak: the device's matmul FLOP/s.
    """

    def __init__(self, tokens_per_step: int, flops_per_token: float, peak: float):
        self._tokens, self._flops, self._peak = tokens_per_step, flops_per_token, peak
        self._steps: list[float] = []
        self._waits: list[float] = []
        self._wait = 0.0
        self._last = 0.0
        self.paused = True

    def start(self) -> None:
        """Begins now: what came before counts for no step."""
        self._last, self._wait, self.paused = time.perf_counter(), 0.0, False

    def pause(self) -> None:
        """Steps count no more (those that compile, or wait for an evaluation or a save)."""
        self.paused = True

    def waited(self, seconds: float) -> None:
        """The batch of the next step took so long to come."""
        self._wait += seconds

    def step(self) -> None:
        """One more step is done: known to be, not only begun."""
        if self.paused:
            return
        now = time.perf_counter()
        self._steps.append(now - self._last)
        self._waits.append(self._wait)
        self._last, self._wait = now, 0.0

    def read(self) -> dict[str, float]:
        """Speed since the last reading; empty if there was no step."""
        steps, waits = np.asarray(self._steps), sum(self._waits)
        self._steps, self._waits = [], []
        if not len(steps):
            return {}
        rate = self._tokens * len(steps) / float(steps.sum())
        return {
            "tokens_per_second": rate,
            "model_flops_per_second": rate * self._flops,
            "matmul_peak_share": rate * self._flops / self._peak,
            "step_ms_p50": float(np.percentile(steps, 50)) * 1e3,
            "step_ms_p95": float(np.percentile(steps, 95)) * 1e3,
            "data_wait_fraction": float(waits / steps.sum()),
        }
