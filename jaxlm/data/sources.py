"""Where documents come from: texts that come with the library, files, globs, addresses."""

from __future__ import annotations

import hashlib
import importlib.resources
import itertools
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from jaxlm.data.config import SourceConfig
from jaxlm.data.files import file_digest, find, is_address
from jaxlm.data.formats import FORMATS, LOCAL_FORMATS, SUFFIXES, is_datasets_folder, json_objects
from jaxlm.data.locks import exclusive

BUILTIN = {
    "austen": "five novels of Jane Austen (3.5 MB, public domain)",
    "austen_valid": "the first half of her Persuasion",
    "austen_test": "its second half",
    "python": "the running Python's own standard library",
}


def _builtin(path: str) -> list[tuple[str, str]]:
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


def _unusual(path: Path) -> bool:
    """Installed packages and test data, some of it deliberately not UTF-8, are no library code."""
    return bool({"site-packages", "test", "tests", "lib2to3"} & set(path.parts))


def _format(source: SourceConfig, path: str) -> str:
    kind = source.format
    if kind == "auto":
        is_folder = not is_address(path) and Path(path).is_dir()
        suffixes = (name for suffix, name in SUFFIXES.items() if path.lower().endswith(suffix))
        kind = "datasets" if is_folder else next(suffixes, "text")
    if kind in LOCAL_FORMATS and is_address(path):
        raise ValueError(f"source {path!r}: format={kind!r} at an address; allowed: a local path")
    if kind == "datasets" and not is_datasets_folder(path):
        raise ValueError(
            f"source {path!r} is no folder of Hugging Face datasets' save_to_disk; allowed: such a "
            f"folder, or files in one, as in {path}/*.txt"
        )
    return kind


def files(source: SourceConfig) -> list[tuple[str, str]]:
    """(path, format) of every file of a source, in a fixed order.

    Folders that a glob matches are passed over, but for Hugging Face datasets folders.

    Raises:
        ValueError: unknown builtin, a folder or address that the format can't be read from.
        FileNotFoundError: nothing matches.
    """
    if source.path.startswith("builtin:"):
        return _builtin(source.path)
    paths = find(source.path)
    if paths != [source.path]:
        paths = [p for p in paths if not Path(p).is_dir() or is_datasets_folder(p)]
    if not paths:
        raise FileNotFoundError(
            f"source {source.path!r}: no such file; allowed: a path, a glob, builtin:…"
        )
    return [(p, _format(source, p)) for p in paths]


def kind_of(source: SourceConfig) -> str:
    """What the documents of a source are: "text", or as JSON "chat" or "preference".

    Raises:
        ValueError: several kinds in one.
    """
    formats = {kind for _, kind in files(source)}
    kinds = {kind if kind in ("chat", "preference") else "text" for kind in formats}
    if len(kinds) > 1:
        raise ValueError(
            f"source {source.path!r} holds {', '.join(sorted(kinds))}; allowed: one kind a source"
        )
    return kinds.pop()


def documents(source: SourceConfig) -> Iterator[str]:
    """All texts of a source, file by file; blank ones are left out.

    Raises:
        ValueError: a file that is empty, not text, or not of its format; its name is told.
    """
    found = False
    for path, kind in files(source):
        empty = kind != "code"  # an empty module is nothing unusual
        for text in FORMATS[kind](path, source.text_field):
            if text.strip():
                empty, found = False, True
                yield text
        if empty:
            raise ValueError(f"{path} is empty; allowed: a file with text")
    if not found:
        raise ValueError(f"source {source.path!r} is empty; allowed: at least one file with text")


def line_of(source: SourceConfig, number: int) -> str:
    """File and line of a conversation, or of a pair of answers, by its number in `documents`."""
    lines = (where for path, _ in files(source) for where, _ in json_objects(path))
    return next(itertools.islice(lines, number, None))


def source_digest(source: SourceConfig, cache: Path) -> str:
    """SHA-256 of a source's contents, whatever its files are called.

    Digests of files are kept in `cache`, so that a file which has not changed is read once.
    """
    path = cache / "digests.json"
    with exclusive(cache / "digests.lock"):
        known = _known_digests(path)
        before = len(known)
        lines = [f"{kind} {file_digest(p, known)}" for p, kind in files(source)]
        if len(known) > before:
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(known))
            temporary.replace(path)
    return hashlib.sha256("\n".join([source.text_field, *lines]).encode()).hexdigest()


def _known_digests(path: Path) -> dict[str, str]:
    """What the cache holds; a damaged one holds nothing."""
    try:
        known = json.loads(path.read_text()) if path.exists() else {}
    except ValueError:
        return {}
    return known if isinstance(known, dict) else {}
