"""Write one step folder so that it is there in full or not at all."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import importlib.metadata
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from absl import logging

from jaxlm.checkpoints import storage
from jaxlm.checkpoints.digest import leaf_digest, whole_digest
from jaxlm.checkpoints.layout import DISCARDED, UNFINISHED, step_folder, step_folders
from jaxlm.checkpoints.leaves import HostLeaf, LeafSpec
from jaxlm.checkpoints.manifest import (
    MANIFEST,
    MARKER,
    STATE,
    BadStepError,
    FileRecord,
    Manifest,
    is_chunk,
)
from jaxlm.checkpoints.retention import set_aside
from jaxlm.checkpoints.verify import marker_bytes, verified_arrays, verified_manifest


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """What one step will hold, all on the host and unchanging.

    Attributes:
        leaves: by leaf path.
        files: contents, or the file or folder to copy, by path inside the step folder.
    """

    step: int
    leaves: dict[str, HostLeaf]
    metadata: dict[str, Any]
    files: Mapping[str, bytes | Path]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(leaf.spec.nbytes for leaf in self.leaves.values())


def commit(directory: Path, snapshot: Snapshot) -> Path:
    """Write the snapshot; its folder gets a step's name only by the last rename.

    Order: arrays and files, manifest, marker, each on disk (fsync) before the rename. A good folder
    of the same step and contents is left alone; any other one of that step is replaced.

    Raises:
        Exception: of the operating system or Orbax; the unfinished folder is removed.
    """
    unfinished = open_unfinished(directory, snapshot.step, snapshot.nbytes)
    try:
        arrays = {name: leaf.array for name, leaf in snapshot.leaves.items() if leaf.array.size}
        storage.write_arrays(unfinished / STATE, arrays)
        digests = {
            name: leaf_digest(name, leaf.spec, leaf.array) for name, leaf in snapshot.leaves.items()
        }
        specs = {name: leaf.spec for name, leaf in snapshot.leaves.items()}
        about = (snapshot.step, specs, digests, snapshot.metadata, snapshot.files)
        return publish(directory, seal(unfinished, *about), unfinished)
    except BaseException:
        remove_surely(unfinished)
        raise


def open_unfinished(directory: Path, step: int, nbytes: int) -> Path:
    """A new folder for a step, without a step's name; what killed saves left behind goes.

    Raises:
        OSError: no room for so many bytes, or no folder can be made.
    """
    final = step_folder(directory, step)
    for suffix in (UNFINISHED, DISCARDED):
        for leftover in step_folders(directory, suffix).values():
            shutil.rmtree(leftover, ignore_errors=True)
    directory.mkdir(parents=True, exist_ok=True)
    # Chunks aren't compressed, so the need is known; and a disk is left with room for others.
    if shutil.disk_usage(directory).free < nbytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    unfinished = final.with_name(final.name + UNFINISHED)
    unfinished.mkdir()
    return unfinished


def seal(
    folder: Path,
    step: int,
    leaves: dict[str, LeafSpec],
    digests: dict[str, str],
    metadata: dict[str, Any],
    files: Mapping[str, bytes | Path],
) -> Manifest:
    """Add files, manifest and marker to a folder whose arrays are there; all is on disk then."""
    for name, source in files.items():
        _write_file(folder / name, source)
    manifest = Manifest(
        step=step,
        digest=whole_digest(digests),
        leaves=leaves,
        leaf_digests=digests,
        files={str(p.relative_to(folder)): _recorded(folder, p) for p in _files_below(folder)},
        metadata=metadata,
        versions=_versions(),
    )
    text = manifest.to_bytes()
    _write_synced(folder / MANIFEST, text)
    _write_synced(folder / MARKER, marker_bytes(text))
    for parent, _, _ in os.walk(folder):
        _sync(Path(parent))
    return manifest


def publish(directory: Path, manifest: Manifest, unfinished: Path) -> Path:
    """Give a sealed folder its step's name, unless a good folder of these contents has it."""
    final, replaced = step_folder(directory, manifest.step), None
    if final.exists():
        if _holds(final, manifest):
            logging.info("step %d is already saved, with these contents", manifest.step)
            shutil.rmtree(unfinished)
            return final
        replaced = set_aside(final)
    unfinished.rename(final)
    _sync(directory)
    if replaced is not None:  # only now: to delete takes seconds, and a kill in them cost both
        shutil.rmtree(replaced, ignore_errors=True)
    return final


def remove_surely(folder: Path) -> None:
    """Remove a folder in which Orbax's other writers may still be ending, and make files anew."""
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.05)
        if not folder.exists():
            return


def _write_file(target: Path, source: bytes | Path) -> None:
    if isinstance(source, Path) and source.is_dir():
        shutil.copytree(source, target)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(source if isinstance(source, bytes) else source.read_bytes())


def _files_below(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if not path.is_dir())


def _recorded(folder: Path, path: Path) -> FileRecord:
    """Bring the file to disk, and say what it is."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        chunk = is_chunk(str(path.relative_to(folder)))
        digest = None if chunk else hashlib.file_digest(file, "sha256").hexdigest()
    return FileRecord(path.stat().st_size, digest)


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _holds(folder: Path, manifest: Manifest) -> bool:
    """Whether the folder is a good copy of this very step."""
    try:
        present = verified_manifest(folder)
        if present != manifest:
            return False
        verified_arrays(folder, present, present.leaves)
    except BadStepError:
        return False
    return True


def _versions() -> dict[str, str]:
    libraries = ("jax", "numpy", "orbax-checkpoint", "tensorstore")
    found = {name: importlib.metadata.version(name) for name in libraries}
    return {"python": platform.python_version(), **found}
