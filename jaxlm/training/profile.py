"""An xprof trace of a few steps."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import jax


class ProfileWindow:
    """Traces the steps first to last, whichever of them this process runs.

    Args:
        folder: of the trace.
        window: (first step, last step), or None: no trace.
    """

    def __init__(self, folder: Path, window: tuple[int, int] | None):
        self._folder, self._window = folder, window
        self._on = False

    def before(self, step: int, state: Any) -> None:
        """Step `step` is about to run on `state`; a trace starts and stops once that is there."""
        inside = self._window is not None and self._window[0] <= step <= self._window[1]
        if inside != self._on:
            jax.block_until_ready(state)  # the loop is a step ahead of the device
        if inside and not self._on:
            jax.profiler.start_trace(str(self._folder))
        elif self._on and not inside:
            jax.profiler.stop_trace()
        self._on = inside

    def __enter__(self) -> ProfileWindow:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._on:
            jax.profiler.stop_trace()
            self._on = False
