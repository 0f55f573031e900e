"""Which steps stay on disk."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterable
from pathlib import Path

from jaxlm.checkpoints.layout import DISCARDED, step_folders


@dataclasses.dataclass(frozen=True)
class Retention:
    """Keep the newest `keep_last` steps, and for ever every multiple of `keep_every`.

    Raises:
        ValueError: a number below 1.
    """

    keep_last: int = 3
    keep_every: int | None = None

    def __post_init__(self):
        for field in ("keep_last", "keep_every"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"{field}={value}; allowed: an integer >= 1")

    def superseded(self, steps: Iterable[int], saved: int) -> list[int]:
        """Steps to delete after `saved` was committed, ascending; never `saved` itself.

        A step beyond `saved` was refused or left behind by an earlier run; it neither goes nor
        counts, or it could push out the only good one.
        """
        past = sorted(step for step in steps if step <= saved)[: -self.keep_last]
        return [step for step in past if self.keep_every is None or step % self.keep_every]

    def apply(self, directory: Path, saved: int) -> None:
        """Delete what is superseded."""
        folders = step_folders(directory)
        for step in self.superseded(folders, saved):
            discard(folders[step])


def discard(folder: Path) -> None:
    """Delete a step folder; a kill half-way leaves no half step under a step's name."""
    doomed = folder.with_name(folder.name + DISCARDED)
    folder.rename(doomed)
    shutil.rmtree(doomed)
