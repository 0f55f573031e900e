"""One writer per workdir."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from absl import logging

LOCK = "lock"


class WorkdirLockedError(RuntimeError):
    """Another process writes into this workdir; the text names it."""


@contextlib.contextmanager
def workdir_lock(workdir: str | os.PathLike[str]) -> Iterator[None]:
    """Hold the workdir while the block runs.

    The kernel's file lock decides, so a killed owner (even by kill -9) never leaves a stale lock
    behind; the file's text only tells people who the owner is.

    Raises:
        WorkdirLockedError: somebody else holds it; with process id, host and age.
    """
    path = Path(workdir) / LOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _owner(path)
            raise WorkdirLockedError(
                f"{workdir} is being written by {owner}; stop that run or use another workdir"
            ) from None
        if path.stat().st_size:
            logging.warning("%s: taking over the lock of %s, which is gone", workdir, _owner(path))
        _write(path, {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()})
        try:
            yield
        finally:
            # Emptied, not removed: a waiting process may have this very file open.
            _write(path, None)


def _write(path: Path, owner: dict[str, object] | None) -> None:
    path.write_text("" if owner is None else json.dumps(owner))


def _owner(path: Path) -> str:
    try:
        owner = json.loads(path.read_text())
        age = time.time() - owner["since"]
        # Below 0: the clock was set back, or the owner's host has another.
        since = f"since {age:.0f} s" if age >= 0 else "(since when is unknown: clocks differ)"
        return f"process {owner['pid']} on {owner['host']} {since}"
    except (ValueError, KeyError, TypeError):
        return f"an unknown process (no owner in {path})"
