"""Where documents come from: a registry of formats, each a function from a path to texts."""

from __future__ import annotations

import gzip
import importlib.resources
import io
import json
import re
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from etils import epath

from jaxlm.data.config import SourceConfig

BUILTIN = {
    "austen": "five novels of Jane Austen (3.5 MB, public domain)",
    "austen_valid": "the first half of her Persuasion",
    "austen_test": "its second half",
    "python": "the running Python's own standard library",
}


def _need(module: str, what: str) -> Any:
    """An optional package, or an error that says how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{what} needs {module}: pip install 'jaxlm[hf]'") from error


def _open(path: str) -> Any:
    """A binary file, local or behind any address that fsspec knows."""
    if "://" in path and not path.startswith("gs://"):
        return _need("fsspec", path).open(path, "rb").open()
    return epath.Path(path).open("rb")


def decode_text(data: bytes, name: str) -> str:
    """UTF-8, or an error that names the file and the first byte that is not text."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text: byte {error.start}") from error
    if "\0" in text:
        raise ValueError(f"{name} is not text: NUL at byte {data.index(0)}")
    if not text.strip():
        raise ValueError(f"{name} is empty; allowed: a file with text")
    return text


def split_documents(text: str) -> list[str]:
    """Documents of a plain text: what two or more blank lines in a row separate."""
    return [part for part in re.split(r"\n[ \t]*\n(?:[ \t]*\n)+", text) if part.strip()]


def read_text(path: str, field: str) -> Iterator[str]:
    """A plain text file."""
    del field
    with _open(path) as file:
        yield from split_documents(decode_text(file.read(), path))


def read_code(path: str, field: str) -> Iterator[str]:
    """A source file: one document."""
    del field
    with _open(path) as file:
        data = file.read()
    if data.strip():
        yield decode_text(data, path)


def read_jsonl(path: str, field: str) -> Iterator[str]:
    """A JSON object a line, plain or compressed (.gz, .zst)."""
    with _open(path) as raw:
        stream: Any = raw
        if path.endswith(".gz"):
            stream = gzip.open(raw)
        elif path.endswith(".zst"):
            stream = _need("zstandard", path).ZstdDecompressor().stream_reader(raw)
        for number, line in enumerate(io.TextIOWrapper(stream, encoding="utf-8"), 1):
            if line.strip():
                try:
                    yield json.loads(line)[field]
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(
                        f"{path}, line {number}: no JSON object with a {field!r} field ({error!r})"
                    ) from error


def read_parquet(path: str, field: str) -> Iterator[str]:
    """A column of a Parquet file."""
    parquet = _need("pyarrow.parquet", path)
    with _open(path) as file:
        table = parquet.ParquetFile(file)
        if field not in table.schema_arrow.names:
            names = ", ".join(table.schema_arrow.names)
            raise ValueError(f"{path}: text_field={field!r}; allowed: {names}")
        for batch in table.iter_batches(columns=[field]):
            yield from batch.column(0).to_pylist()


def read_array_record(path: str, field: str) -> Iterator[str]:
    """An ArrayRecord file of UTF-8 texts."""
    del field
    reader = _need("array_record.python.array_record_module", path).ArrayRecordReader(path)
    try:
        for i in range(reader.num_records()):
            yield decode_text(reader.read([i])[0], f"{path}, record {i}")
    finally:
        reader.close()


def read_datasets(path: str, field: str) -> Iterator[str]:
    """A Hugging Face dataset that `save_to_disk` wrote."""
    data = _need("datasets", path).load_from_disk(path)
    if field not in data.column_names:
        raise ValueError(f"{path}: text_field={field!r}; allowed: {', '.join(data.column_names)}")
    for row in data:
        yield row[field]


FORMATS: dict[str, Callable[[str, str], Iterator[str]]] = {
    "text": read_text,
    "code": read_code,
    "jsonl": read_jsonl,
    "parquet": read_parquet,
    "array_record": read_array_record,
    "datasets": read_datasets,
}
SUFFIXES = {
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".jsonl.zst": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".array_record": "array_record",
    ".arrayrecord": "array_record",
    ".py": "code",
}


def _format(source: SourceConfig, path: str) -> str:
    if source.format != "auto":
        if source.format not in FORMATS:
            raise ValueError(f"format={source.format!r}; allowed: auto, {', '.join(FORMATS)}")
        return source.format
    for suffix, name in SUFFIXES.items():
        if path.lower().endswith(suffix):
            return name
    if "://" not in path and Path(path).is_dir():
        return "datasets"
    return "text"


def files(source: SourceConfig) -> list[tuple[str, str]]:
    """(path, format) of every file of a source, in a fixed order.

    Raises:
        ValueError: unknown builtin or format.
        FileNotFoundError: nothing matches.
    """
    path = source.path
    if path.startswith("builtin:"):
        name = path.removeprefix("builtin:")
        if name not in BUILTIN:
            raise ValueError(f"source {path!r}; allowed: {', '.join(BUILTIN)} after builtin:")
        if name == "python":
            library = Path(sysconfig.get_paths()["stdlib"])
            found = (p for p in library.rglob("*.py") if not _unusual(p.relative_to(library)))
            return [(str(p), "code") for p in sorted(found)]
        stem = "austen_train" if name == "austen" else name
        texts = importlib.resources.files("jaxlm.data") / "texts"
        return [(str(texts / f"{stem}.txt"), "text")]
    if any(c in path for c in "*?["):
        folder, _, pattern = path.rpartition("/")
        if "://" in path and not path.startswith("gs://"):
            file_system, inner = _need("fsspec", path).core.url_to_fs(path)
            found = [file_system.unstrip_protocol(p) for p in file_system.glob(inner)]
        else:
            found = [str(p) for p in epath.Path(folder or ".").glob(pattern)]
        paths = sorted(found)
    elif "://" in path and not path.startswith("gs://"):
        file_system, inner = _need("fsspec", path).core.url_to_fs(path)
        paths = [path] if file_system.exists(inner) else []
    else:
        paths = [path] if epath.Path(path).exists() else []
    if not paths:
        raise FileNotFoundError(f"source {path!r}: no such file; allowed: a path, a glob, builtin:…")
    return [(p, _format(source, p)) for p in paths]


def _unusual(path: Path) -> bool:
    """Installed packages and test data, some of it deliberately not UTF-8, are no library code."""
    return bool({"site-packages", "test", "tests", "lib2to3"} & set(path.parts))


def documents(source: SourceConfig) -> Iterator[str]:
    """All texts of a source, file by file.

    Raises:
        ValueError: a file that is empty, not text, or not of its format; its name is told.
    """
    for path, kind in files(source):
        yield from FORMATS[kind](path, source.text_field)
