"""Which steps stay on disk."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterable
from pathlib import Path

from jaxlm.checkpoints.layout import DISCARDED, step_folders


@dataclasses.dataclass(frozen=True)
class Retention:
    """Keep the newest `keep_last` steps, for ever every multiple of `keep_every`, and the newest
    one that lies `go_back` steps or more behind, which a run may have to go back to.

    Raises:
        ValueError: a number below 1, or a `go_back` below 0.
    """

    keep_last: int = 3
    keep_every: int | None = None
    go_back: int = 0

    def __post_init__(self):
        for field in ("keep_last", "keep_every"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"{field}={value}; allowed: an integer >= 1")
        if self.go_back < 0:
            raise ValueError(f"go_back={self.go_back}; allowed: an integer >= 0")

    def superseded(self, steps: Iterable[int], saved: int) -> list[int]:
        """Steps to delete after `saved` was committed, ascending; never `saved` itself.

        A step beyond `saved` was refused or left behind by an earlier run; it neither goes nor
        counts, or it could push out the only good one.
        """
        past = sorted(step for step in steps if step <= saved)
        behind = [step for step in past if step <= saved - self.go_back]
        old = [step for step in past[: -self.keep_last] if step not in behind[-1:]]
        return [step for step in old if self.keep_every is None or step % self.keep_every]

    def apply(self, directory: Path, saved: int) -> None:
        """Delete what is superseded."""
        folders = step_folders(directory)
        for step in self.superseded(folders, saved):
            discard(folders[step])


def discard(folder: Path) -> None:
    """Delete a step folder; a kill half-way leaves no half step under a step's name."""
    shutil.rmtree(set_aside(folder))


def set_aside(folder: Path) -> Path:
    """Takes a step its name; the next save deletes what has none, if nobody does before."""
    doomed = folder.with_name(folder.name + DISCARDED)
    folder.rename(doomed)
    return doomed
