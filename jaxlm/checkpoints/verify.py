"""Whether a step folder is whole and undamaged: marker, then manifest, then files, then arrays."""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxlm.checkpoints import storage
from jaxlm.checkpoints.digest import leaf_digest
from jaxlm.checkpoints.layout import UNFINISHED
from jaxlm.checkpoints.leaves import LeafSpec
from jaxlm.checkpoints.manifest import (
    MANIFEST,
    MARKER,
    MAX_MANIFEST_BYTES,
    STATE,
    BadStepError,
    Manifest,
    parse,
)

# Read at a time, while what was read before is hashed.
READ_BYTES = 32 * 2**20


def opened_step(step: int, folder: Path) -> Manifest:
    """The manifest of a folder under a step's name, finished or not, checked as `verified_manifest`
    checks it.

    Raises:
        BadStepError: it never was finished, holds another step, or is damaged.
    """
    if folder.name.endswith(UNFINISHED):
        raise BadStepError("unfinished: its save was killed, or goes on just now")
    manifest = verified_manifest(folder)
    if manifest.step != step:
        raise BadStepError(f"its manifest is that of step {manifest.step}")
    return manifest


def verified_manifest(folder: Path) -> Manifest:
    """The manifest, after checking all that can be checked without reading arrays.

    Raises:
        BadStepError: no marker, or a file is missing, changed, or of another size.
    """
    marker = folder / MARKER
    try:
        if not marker.is_file():
            raise BadStepError(f"no {MARKER} marker: the save never ended, or files were removed")
        text = _read_at_most(folder / MANIFEST, MAX_MANIFEST_BYTES)
        if _read_at_most(marker, 100) != marker_bytes(text):
            raise BadStepError(f"{MANIFEST}: SHA-256 differs from the one in {MARKER}")
        manifest = parse(text)
        _check_files(folder, manifest)
    except OSError as error:
        raise BadStepError(f"{error.filename or folder}: {error.strerror}") from error
    return manifest


def _read_at_most(path: Path, limit: int) -> bytes:
    if not path.is_file():
        raise BadStepError(f"{path.name}: missing")
    if path.stat().st_size > limit:
        raise BadStepError(f"{path.name}: more than {limit} bytes")
    return path.read_bytes()


def marker_bytes(manifest: bytes) -> bytes:
    """What the commit marker holds: the manifest's SHA-256."""
    return hashlib.sha256(manifest).hexdigest().encode() + b"\n"


def _check_files(folder: Path, manifest: Manifest) -> None:
    root = os.path.realpath(folder)
    for name, record in manifest.files.items():
        path = os.path.join(root, name)
        if os.path.realpath(path) != path:
            raise BadStepError(f"{name}: a link; allowed: files of the step folder itself")
        if not os.path.isfile(path):
            raise BadStepError(f"{name}: missing")
        size = os.path.getsize(path)
        if size != record.nbytes:
            raise BadStepError(f"{name}: {size} bytes, {record.nbytes} when saved")
        if record.sha256 is not None:
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != record.sha256:
                    raise BadStepError(f"{name}: SHA-256 differs")


def verified_arrays(
    folder: Path, manifest: Manifest, names: Iterable[str]
) -> dict[str, np.ndarray]:
    """Read the named leaves and check the digest of each.

    What is read is hashed on other threads while more is read, and so costs little time.

    Raises:
        BadStepError: a leaf can't be read, or its bytes aren't those that were saved.
    """
    specs = {name: manifest.leaves[name] for name in names}
    arrays: dict[str, np.ndarray] = {}
    with concurrent.futures.ThreadPoolExecutor(thread_name_prefix="digest") as threads:
        digests = {}
        for part in read_leaves(folder, specs):
            arrays |= part
            for name, array in part.items():
                digests[name] = threads.submit(leaf_digest, name, specs[name], array)
    for name, digest in digests.items():
        if digest.result() != manifest.leaf_digests[name]:
            raise BadStepError(f"{name}: SHA-256 differs")
    return arrays


def unverified_arrays(
    folder: Path, manifest: Manifest, names: Iterable[str]
) -> dict[str, np.ndarray]:
    """Read the named leaves; only their sizes are checked.

    Raises:
        BadStepError: a leaf can't be read.
    """
    parts = read_leaves(folder, {name: manifest.leaves[name] for name in names})
    return {name: array for part in parts for name, array in part.items()}


def read_leaves(folder: Path, specs: Mapping[str, LeafSpec]) -> Iterator[dict[str, np.ndarray]]:
    """The named leaves, some at a time, of a folder that may have no manifest yet.

    Raises:
        BadStepError: a leaf can't be read.
    """
    stored = {name: spec for name, spec in specs.items() if spec.nbytes}
    yield {name: _empty(spec) for name, spec in specs.items() if not spec.nbytes}
    try:
        if stored:
            yield from storage.read_arrays(folder / STATE, stored, READ_BYTES)
    except MemoryError:
        raise
    except Exception as error:
        # Whatever type TensorStore chooses: a step that can't be read is a bad step.
        raise BadStepError(f"{STATE} can't be read: {error}") from error


def _empty(spec: LeafSpec) -> np.ndarray:
    """Of a leaf without elements, which Orbax can't store."""
    return np.zeros(spec.shape, jnp.dtype(spec.dtype))
