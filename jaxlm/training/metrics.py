"""Metrics of a run: one JSON line a record, and the same numbers for TensorBoard."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"


def read_metrics(workdir: str | Path) -> list[dict[str, Any]]:
    """All records of a workdir, oldest first; a line cut short by a kill is left out."""
    path = Path(workdir) / METRICS
    records = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


class MetricsWriter:
    """Appends records; on resume, first drops those past the step that the run goes on from.

    What depends on the run alone (loss, gradient norm) lies at the top of a record, what depends on
    the machine under "speed": two runs of one config agree in the former to the last digit.
    """

    def __init__(self, workdir: str | Path, resume_step: int):
        path = Path(workdir) / METRICS
        kept = [r for r in read_metrics(workdir) if r["step"] <= resume_step]
        self._present = [r for r in kept if r["step"] == resume_step]
        text = "".join(json.dumps(r) + "\n" for r in kept)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(text)
        temporary.replace(path)
        self._file = path.open("ab", buffering=0)  # a record that fails leaves nothing behind
        self._board = _Board(Path(workdir) / TENSORBOARD, resume_step)

    def write(self, step: int, values: Mapping[str, float], speed: Mapping[str, float]) -> None:
        """One record at `step`, on disk when this returns. JSON has no NaN: it is written as text.

        A record that is there already, as when a finished run is started again, is not repeated.
        """
        plain = {k: v if math.isfinite(v) else str(v) for k, v in values.items()}
        record: dict[str, Any] = {"step": step, **plain}
        if record in self._present:
            return
        if speed:
            record["speed"] = dict(speed)
        self._file.write((json.dumps(record) + "\n").encode())
        scalars = {f"train/{k}": v for k, v in values.items()}
        self._board.write(step, scalars | {f"speed/{k}": v for k, v in speed.items()})

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


class _Board:
    """One TensorBoard file for each start of the run.

    Written without the threads of tensorboardX's SummaryWriter: a kill between two records loses
    none, and a full disk is an error here, not a thread that died.
    """

    def __init__(self, folder: Path, resume_step: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        self._event = event_pb2.Event
        folder.mkdir(exist_ok=True)
        # Two starts within a second must not share a name.
        count = len(list(folder.iterdir()))
        self._file = EventsWriter(str(folder / "events"), f".{count}")
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        # TensorBoard hides what earlier files hold from this step on.
        self._write(resume_step + 1, session_log=start)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        from tensorboardX.summary import scalar

        for name, value in scalars.items():
            self._write(step, summary=scalar(name, value))
        self._file.flush()

    def _write(self, step: int, **what: Any) -> None:
        self._file.write_event(self._event(wall_time=time.time(), step=step, **what))

    def close(self) -> None:
        self._file.close()
