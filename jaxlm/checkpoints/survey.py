"""Which steps a directory holds, and whether each is good."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

from jaxlm.checkpoints.layout import UNFINISHED, step_folders
from jaxlm.checkpoints.leaves import in_parts
from jaxlm.checkpoints.manifest import MARKER, BadStepError, Manifest
from jaxlm.checkpoints.verify import opened_step, verified_arrays

# Arrays in memory at a time; small ones together, so that opening files is not what takes the time.
HELD_BYTES = 256 * 2**20


@dataclasses.dataclass(frozen=True)
class Survey:
    """One folder under a step's name.

    Attributes:
        manifest: None if the step is bad.
        problem: why it is; None if it is good as far as was looked.
    """

    step: int
    folder: Path
    manifest: Manifest | None
    problem: str | None

    @property
    def is_unfinished(self) -> bool:
        """It never became a step: the save was killed, or goes on just now."""
        return self.folder.name.endswith(UNFINISHED)

    @property
    def nbytes(self) -> int:
        """Of all its files, on disk. (A run that goes on may delete them meanwhile.)"""
        paths = [Path(parent, name) for parent, _, names in os.walk(self.folder) for name in names]
        return sum(found.st_size for found in map(_stat, paths) if found is not None)

    @property
    def saved_at(self) -> float | None:
        """Seconds since the epoch, by its marker's file; None without one."""
        marker = _stat(self.folder / MARKER)
        return None if marker is None else marker.st_mtime


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


def survey(directory: Path, arrays: bool) -> Iterator[Survey]:
    """Each step, the oldest first, and what saves left unfinished.

    Args:
        arrays: read all arrays too, `HELD_BYTES` or one larger array at a time, and check the
            SHA-256 of each; otherwise their sizes alone.
    """
    folders = [*step_folders(directory).items(), *step_folders(directory, UNFINISHED).items()]
    for step, folder in sorted(folders, key=lambda item: (item[0], item[1].name)):
        yield survey_step(step, folder, arrays)


def survey_step(step: int, folder: Path, arrays: bool) -> Survey:
    """One step."""
    try:
        manifest = opened_step(step, folder)
        if arrays:
            for part in in_parts(manifest.leaves, HELD_BYTES):
                verified_arrays(folder, manifest, part)
    except BadStepError as error:
        return Survey(step, folder, None, str(error))
    return Survey(step, folder, manifest, None)
