"""Save a training state step by step, in the background, so that nothing saved is ever lost."""

from __future__ import annotations

import concurrent.futures
import functools
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from absl import logging

from jaxlm.checkpoints.commit import Snapshot, commit
from jaxlm.checkpoints.layout import available_steps, step_folders
from jaxlm.checkpoints.leaves import named_leaves, start_transfers, to_host
from jaxlm.checkpoints.manifest import MANIFEST, MARKER, STATE, check_file_name
from jaxlm.checkpoints.retention import Retention, discard
from jaxlm.checkpoints.together import start_commit
from jaxlm.sharding.processes import Meeting, OtherProcessError, is_first


class SaveError(RuntimeError):
    """A step was not saved; earlier steps are as they were."""


class Saver:
    """Writes steps into one directory, one at a time, on a thread of its own.

    Use it in a `with` block: leaving it waits for the save in flight. A directory has one writer;
    hold its `workdir_lock` meanwhile.

    Args:
        directory: where the step folders go; made if absent.
        keep_last, keep_every, go_back: see Retention.

    With several JAX processes each has a Saver of the same directory, which they share, and calls
    the same methods; the first one's metadata and files are saved.

    Raises:
        ValueError: a retention number that is too small.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep_last: int = 3,
        keep_every: int | None = None,
        go_back: int = 0,
    ):
        self.directory = Path(directory)
        self.retention = Retention(keep_last, keep_every, go_back)
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: concurrent.futures.Future[None] | None = None
        self._meeting = Meeting()

    def save(
        self,
        step: int,
        state: Any,
        metadata: Mapping[str, Any] | None = None,
        files: Mapping[str, bytes | str | os.PathLike[str]] | None = None,
    ) -> None:
        """Take a snapshot and return; its buffers may be donated or changed from then on.

        Waits first for the previous save, if that one is still being written.

        Args:
            step: >= 0. A step that is there already is replaced, unless its contents are the same.
            state: pytree of JAX or NumPy arrays, typed PRNG keys and numbers.
            metadata: JSON (config, counters); finite numbers only.
            files: contents, or a file or folder to copy, by path inside the step folder:
                {"tokenizer": tokenizer_folder}.

        Raises:
            SaveError: the previous save failed.
            ValueError, TypeError: the step, state, metadata or a file name can't be stored.
        """
        self.wait()
        if step < 0:
            raise ValueError(f"step={step}; allowed: an integer >= 0")
        named, about = named_leaves(state), _json_copy(metadata or {})
        sources = {_free_name(name): _source(name, file) for name, file in (files or {}).items()}
        write: Callable[[], Any]
        if jax.process_count() > 1:
            nbytes = sum(leaf.nbytes for leaf in named.values())
            try:
                write = start_commit(self.directory, step, named, about, sources, self._meeting)
            except (OSError, OtherProcessError) as error:
                raise SaveError(self._explanation(step, nbytes, error)) from error
        else:
            start_transfers(named.values())
            leaves = {name: to_host(name, leaf) for name, leaf in named.items()}
            snapshot = Snapshot(int(step), leaves, about, sources)
            nbytes, write = snapshot.nbytes, functools.partial(commit, self.directory, snapshot)
        self._pending = self._thread.submit(self._write, int(step), nbytes, write)

    def wait(self) -> None:
        """Block until the save in flight is on disk.

        Raises:
            SaveError: it failed; the text has the reason and the last good step. Raised once.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def give_up_after(self, step: int) -> None:
        """Wait, and delete the newer steps, whose history the run does not go on from."""
        self.wait()
        if is_first():
            for newer, folder in step_folders(self.directory).items():
                if newer > step:
                    discard(folder)

    def close(self) -> None:
        """Wait, and end the thread; the Saver can't be used after.

        Raises:
            SaveError: as wait.
        """
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _write(self, step: int, nbytes: int, write: Callable[[], Any]) -> None:
        try:
            write()
        except Exception as error:
            explanation = self._explanation(step, nbytes, error)
            # At once: the next wait may be far off.
            logging.error("%s", explanation)
            raise SaveError(explanation) from error
        if not is_first():
            return
        try:
            self.retention.apply(self.directory, step)
        except OSError as error:
            # The step is saved; the next save tries again.
            logging.warning("an old checkpoint could not be deleted: %s", error)

    def _explanation(self, step: int, nbytes: int, error: Exception) -> str:
        """The cause, the room there is, and what a person still has."""
        existing = next(p for p in (self.directory, *self.directory.parents) if p.exists())
        free = shutil.disk_usage(existing).free
        earlier = [saved for saved in available_steps(self.directory) if saved < step]
        kept = f"The last saved step is {earlier[-1]}." if earlier else "No earlier step is saved."
        return (
            f"step {step} was not saved in {self.directory}: {error}\n"
            f"It needs {nbytes} bytes; {free} are free there. {kept}"
        )


def _json_copy(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """A copy as it will be read back (tuples become lists).

    Raises:
        TypeError, ValueError: a value which JSON doesn't have, with the name of its field.
    """
    for field, value in metadata.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise type(error)(f"metadata[{field!r}]: {error}; allowed: JSON") from error
    return json.loads(json.dumps(dict(metadata)))


def _free_name(name: str) -> str:
    if check_file_name(name).split("/")[0] in (STATE, MANIFEST, MARKER):
        raise ValueError(f"file name {name!r}; {STATE}, {MANIFEST} and {MARKER} are taken")
    return name


def _source(name: str, source: bytes | str | os.PathLike[str]) -> bytes | Path:
    if isinstance(source, bytes):
        return source
    if not Path(source).exists():
        raise ValueError(f"files[{name!r}]={source}; allowed: bytes or a path that exists")
    return Path(source)
