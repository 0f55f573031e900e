"""Names inside a checkpoint directory: one folder a step, and what is not (yet) a step."""

from __future__ import annotations

import os
import re
from pathlib import Path

# Being written; a kill leaves it behind. Only the rename to the plain name makes it a step.
UNFINISHED = ".tmp"
# Being deleted.
DISCARDED = ".old"


def step_folder(directory: Path, step: int) -> Path:
    """DIRECTORY/step_00000030 for step 30."""
    return directory / f"step_{step:08d}"


def step_folders(directory: Path, suffix: str = "") -> dict[int, Path]:
    """Step folders with this suffix, by step, oldest first; other names are left alone."""
    pattern = re.compile(r"step_(\d{8,})" + re.escape(suffix))
    names = os.listdir(directory) if directory.is_dir() else []
    matches = [match for match in map(pattern.fullmatch, names) if match]
    found = {int(match[1]): directory / match[0] for match in matches}
    return {step: found[step] for step in sorted(found)}


def available_steps(directory: str | os.PathLike[str]) -> list[int]:
    """Saved steps in a checkpoint directory, ascending; empty if there are none.

    They are there in full unless something damaged them; `restore` checks.
    """
    return list(step_folders(Path(directory)))


def local_folder(path: str | os.PathLike[str]) -> Path:
    """A workdir's path.

    Raises:
        ValueError: it is empty, an address such as gs://bucket/run, or a file.
    """
    if not str(path) or "://" in str(path) or os.path.isfile(path):
        raise ValueError(f"workdir={str(path)!r}; allowed: a local folder")
    return Path(path)
