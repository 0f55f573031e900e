"""What a run tells people while it goes on; of several processes the first tells."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

from jaxlm.sharding.processes import is_first
from jaxlm.training.metrics import MetricsWriter
from jaxlm.training.progress import Progress


@dataclasses.dataclass(frozen=True)
class Report:
    """Metrics on disk and a progress bar; None: this process tells nothing."""

    writer: MetricsWriter | None
    progress: Progress | None

    def step(self, done: int) -> None:
        """Another step is done."""
        if self.progress is not None:
            self.progress.update(done)

    def record(self, step: int, values: Mapping[str, float], speed: Mapping[str, float]) -> None:
        """Figures of a step, see `MetricsWriter.write`."""
        if self.writer is not None:
            self.writer.write(step, values, speed)
        if self.progress is not None and "loss" in values:
            self.progress.show(values["loss"], speed)


@contextlib.contextmanager
def reporting(workdir: Path, description: str, total: int, start: int) -> Iterator[Report]:
    """A run's report, from step `start` to `total`."""
    if not is_first():
        yield Report(None, None)
        return
    with MetricsWriter(workdir, start) as writer, Progress(description, total, start) as progress:
        yield Report(writer, progress)
