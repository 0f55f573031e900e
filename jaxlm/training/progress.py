"""A progress bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType

from absl import logging
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar

SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Steps done, time left, loss and speed."""

    def __init__(self, description: str, total: int, start: int):
        self._description, self._total = description, total
        self._bar = Bar(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
        )
        self._task = self._bar.add_task(description, total=total, completed=start, status="")
        self._done, self._last_line = start, time.monotonic()

    def update(self, done: int) -> None:
        """Moves the bar."""
        self._done = done
        self._bar.update(self._task, completed=done)

    def show(self, loss: float, speed: Mapping[str, float]) -> None:
        """The newest figures: beside the bar, or as a line of the log."""
        status = f"loss {loss:.3f}"
        if speed:
            status += f" · {speed['tokens_per_second']:,.0f} tokens/s"
        self._bar.update(self._task, status=status)
        now = time.monotonic()
        last = self._done == self._total
        if self._bar.disable and (last or now - self._last_line >= SECONDS_BETWEEN_LINES):
            logging.info("%s: step %d/%d %s", self._description, self._done, self._total, status)
            self._last_line = now

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()
