"""manifest.json: what a step folder must hold, and its reading from a source nobody trusts."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import PurePosixPath
from typing import Any

from jaxlm.checkpoints.digest import whole_digest
from jaxlm.checkpoints.leaves import DTYPES, LeafSpec, leaf_folder

FORMAT = 1
STATE = "state"
MANIFEST = "manifest.json"
MARKER = "COMMIT"
MAX_MANIFEST_BYTES = 64 * 2**20


class BadStepError(Exception):
    """This step can't be used; the text says why."""


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """Size and SHA-256 of one file; None for an array's chunk, which its leaf's digest covers."""

    nbytes: int
    sha256: str | None


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Everything about a step but its arrays.

    Attributes:
        digest: of the whole state (see digest.py).
        leaves, leaf_digests: by leaf path.
        files: by path inside the step folder; all but manifest and marker.
        metadata: the caller's (config and the like).
        versions: of the libraries that wrote it.
    """

    step: int
    digest: str
    leaves: dict[str, LeafSpec]
    leaf_digests: dict[str, str]
    files: dict[str, FileRecord]
    metadata: dict[str, Any]
    versions: dict[str, str]

    def to_bytes(self) -> bytes:
        """As JSON, equal for equal contents: sorted keys, no dates."""
        leaves = {
            name: {
                "dtype": spec.dtype,
                "shape": list(spec.shape),
                "prng": spec.prng,
                "sha256": self.leaf_digests[name],
            }
            for name, spec in self.leaves.items()
        }
        files = {name: {"bytes": f.nbytes, "sha256": f.sha256} for name, f in self.files.items()}
        layout = {
            "format": FORMAT,
            "step": self.step,
            "digest": self.digest,
            "leaves": leaves,
            "files": files,
            "metadata": self.metadata,
            "versions": self.versions,
        }
        return json.dumps(layout, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"


def check_file_name(name: str) -> str:
    """The name, if it stays inside its folder.

    Raises:
        ValueError: absolute, with "..", or otherwise not a plain relative path.
    """
    path = PurePosixPath(name)
    plain = name and str(path) == name and not path.is_absolute() and ".." not in path.parts
    if not plain or name == "." or "\\" in name or "\0" in name:
        raise ValueError(f"file name {name!r}; allowed: a relative path inside its folder")
    return name


def is_chunk(name: str) -> bool:
    """Whether a file holds an array's bytes and nothing else."""
    return re.fullmatch(rf"{STATE}/[^/]+/\d+(\.\d+)*", name) is not None


def parse(text: bytes) -> Manifest:
    """Read and check a manifest.

    Raises:
        BadStepError: not JSON, an unknown format, a field missing or of the wrong type, a name that
            leaves the folder, sizes that don't fit the shapes, or digests that don't fit together.
    """
    try:
        layout = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadStepError(f"{MANIFEST} is not JSON: {error}") from error
    _require(isinstance(layout, dict), "not an object")
    _require(layout.get("format") == FORMAT, f"format {layout.get('format')!r}, not {FORMAT}")
    _require(_is_count(layout.get("step")), "step")
    _require(isinstance(layout.get("metadata"), dict), "metadata")
    _require(isinstance(layout.get("versions"), dict), "versions")
    leaves = {name: _leaf(name, record) for name, record in _records(layout, "leaves")}
    digests = {name: _sha256(record.get("sha256")) for name, record in _records(layout, "leaves")}
    files = {name: _file(name, record) for name, record in _records(layout, "files")}
    _require(layout.get("digest") == whole_digest(digests), "digest is not that of the leaves")
    _check_sizes(leaves, files)
    return Manifest(
        layout["step"],
        layout["digest"],
        leaves,
        digests,
        files,
        layout["metadata"],
        {name: str(version) for name, version in layout["versions"].items()},
    )


def _require(good: bool, what: str) -> None:
    if not good:
        raise BadStepError(f"{MANIFEST}: {what}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _sha256(value: Any) -> str:
    _require(isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None, "sha256")
    return value


def _records(layout: dict[str, Any], field: str) -> list[tuple[str, dict[str, Any]]]:
    records = layout.get(field)
    good = isinstance(records, dict) and all(isinstance(r, dict) for r in records.values())
    _require(good, field)
    return list(layout[field].items())


def _leaf(name: str, record: dict[str, Any]) -> LeafSpec:
    dtype: Any = record.get("dtype")
    shape: Any = record.get("shape")
    prng: Any = record.get("prng")
    _require(isinstance(dtype, str) and dtype in DTYPES, f"{name}: dtype {dtype!r}")
    _require(isinstance(shape, list) and all(map(_is_count, shape)), f"{name}: shape {shape!r}")
    _require(prng is None or isinstance(prng, str), f"{name}: prng {prng!r}")
    try:
        leaf_folder(name)
        spec = LeafSpec(tuple(shape), dtype, prng)
        spec.abstract()
    except (ValueError, TypeError, OverflowError) as error:
        raise BadStepError(f"{MANIFEST}: {name}: {error}") from error
    return spec


def _file(name: str, record: dict[str, Any]) -> FileRecord:
    try:
        check_file_name(name)
    except ValueError as error:
        raise BadStepError(f"{MANIFEST}: {error}") from error
    _require(_is_count(record.get("bytes")), f"{name}: bytes")
    digest = record.get("sha256")
    _require(digest is not None or is_chunk(name), f"{name}: no sha256")
    return FileRecord(record["bytes"], None if digest is None else _sha256(digest))


def _check_sizes(leaves: dict[str, LeafSpec], files: dict[str, FileRecord]) -> None:
    """Chunks are uncompressed: a shape that its files' bytes don't fill is a lie or a loss."""
    sizes: dict[str, int] = {}
    for name, record in files.items():
        if is_chunk(name):
            folder = name.split("/")[1]
            sizes[folder] = sizes.get(folder, 0) + record.nbytes
    for name, spec in leaves.items():
        size = sizes.pop(leaf_folder(name), 0)
        _require(size == spec.nbytes, f"{name}: {size} bytes of files for {spec.nbytes} of array")
    _require(not sizes, f"chunks of no leaf: {sorted(sizes)}")
