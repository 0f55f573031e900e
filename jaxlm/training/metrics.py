"""Metrics of a run: one JSON line a record, and the same numbers for TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

METRICS = "metrics.jsonl"


def read_metrics(workdir: str | Path) -> list[dict[str, Any]]:
    """All records of a workdir, oldest first; a line cut short by a kill is left out."""
    path = Path(workdir) / METRICS
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


class MetricsWriter:
    """Appends records; on resume, first drops those past the step that the run goes on from.

    What depends on the run alone (loss, gradient norm) lies at the top of a record, what depends on
    the machine under "speed": two runs of one config agree in the former to the last digit.
    """

    def __init__(self, workdir: str | Path, resume_step: int):
        import tensorboardX

        self._path = Path(workdir) / METRICS
        kept = [r for r in read_metrics(workdir) if r["step"] <= resume_step]
        text = "".join(json.dumps(r) + "\n" for r in kept)
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(text)
        temporary.replace(self._path)
        self._file = self._path.open("a")
        self._board = tensorboardX.SummaryWriter(
            str(Path(workdir) / "tensorboard"), purge_step=resume_step, write_to_disk=True
        )

    def write(self, step: int, values: Mapping[str, float], speed: Mapping[str, float]) -> None:
        """One record at `step`."""
        record = {"step": step, **values, **({"speed": dict(speed)} if speed else {})}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(f"train/{name}", value, step)
        for name, value in speed.items():
            self._board.add_scalar(f"speed/{name}", value, step)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()
        self._board.close()
