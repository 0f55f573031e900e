"""Files by path, on this machine or behind any address that fsspec knows (gs://, s3://, …)."""

from __future__ import annotations

import glob
import hashlib
from pathlib import Path
from typing import Any

from jaxlm.data.optional import MissingPackageError
from jaxlm.data.stall import open_patiently, within


def is_address(path: str) -> bool:
    """Whether a path is behind a protocol."""
    return "://" in path


def _remote(address: str) -> tuple[Any, str]:
    """(file system, path in it) of an address."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(address)
    except ImportError as error:
        raise MissingPackageError(f"{address}: {error} (pip install -e '.[hf]')") from error
    except ValueError as error:
        raise ValueError(
            f"{address}: {error}; allowed: a local path, or a protocol of fsspec such as gs://"
        ) from error


def open_binary(path: str) -> Any:
    """A file's bytes as they are, to be read.

    Raises:
        TimeoutError: here or on reading: it gives nothing for too long, see jaxlm.data.stall.
    """
    if is_address(path):
        file_system, inner = _remote(path)
        return open_patiently(path, lambda: file_system.open(inner, "rb"))
    return open_patiently(path, lambda: Path(path).open("rb", buffering=0))


def find(path: str) -> list[str]:
    """What has this name or, if nothing has, matches it as a glob (** for any depth); sorted."""
    if is_address(path):
        file_system, inner = _remote(path)
        if within(path, lambda: file_system.exists(inner)):
            return [path]
        matches = within(path, lambda: file_system.glob(inner))
        return sorted(file_system.unstrip_protocol(p) for p in matches)
    return [path] if Path(path).exists() else sorted(glob.glob(path, recursive=True))


def _version(path: str) -> str:
    """Tells a file's contents apart without reading them: name, size and time, or the server's."""
    if is_address(path):
        file_system, inner = _remote(path)
        info = sorted(within(path, lambda: file_system.info(inner)).items())
        return f"{path}:{hashlib.sha256(repr(info).encode()).hexdigest()}"
    stat = Path(path).stat()
    return f"{Path(path).resolve()}:{stat.st_size}:{stat.st_mtime_ns}"


def file_digest(path: str, known: dict[str, str]) -> str:
    """SHA-256 of a file, or of a local folder's files and their names.

    Args:
        path: what to read.
        known: digests by version; spares files that have not changed, and is added to.
    """
    if not is_address(path) and Path(path).is_dir():
        parts = [f for f in sorted(Path(path).rglob("*")) if f.is_file()]
        lines = "".join(f"{f.relative_to(path)} {file_digest(str(f), known)}\n" for f in parts)
        return hashlib.sha256(lines.encode()).hexdigest()
    version = _version(path)
    if version not in known:
        with open_binary(path) as file:
            known[version] = hashlib.file_digest(file, "sha256").hexdigest()
    return known[version]
