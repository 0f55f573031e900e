"""Documents of one file: a registry of formats, each a function (path, text_field) → texts.

A reader holds a document in memory, or a block of them, never a whole file of many.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from jaxlm.data.chat import ASSISTANT
from jaxlm.data.files import open_binary
from jaxlm.data.optional import optional
from jaxlm.data.zstd import ZstdReader

RECORDS_AT_A_TIME = 256


def decode(data: bytes, where: str, offset: int = 0) -> str:
    """UTF-8 text, or an error that names the place and the first byte that is not text."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 text: byte {offset + error.start}") from error
    if "\0" in text:
        raise ValueError(f"{where} is not text: NUL at byte {offset + data.index(0)}")
    return text


@contextlib.contextmanager
def _unpacked(path: str) -> Iterator[Any]:
    """A file's bytes, decompressed if it is called .gz or .zst."""
    with open_binary(path) as file:
        if path.lower().endswith(".zst"):
            yield io.BufferedReader(ZstdReader(file, path))
        elif path.lower().endswith(".gz"):
            try:
                with gzip.open(file) as plain:
                    yield plain
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise ValueError(f"{path} is damaged: {error}") from error
        else:
            yield file


def split_documents(lines: Iterable[str]) -> Iterator[str]:
    """Documents of a plain text: what two or more blank lines in a row separate.

    A single blank line stays, as it is what separates paragraphs. Blank lines around a document and
    the end of its last line are left out; all else is as it was.
    """
    document: list[str] = []
    blank: list[str] = []
    for line in lines:
        if not line.strip():
            blank.append(line)
            continue
        if len(blank) >= 2 and document:
            yield "".join(document).rstrip("\r\n")
            document = []
        if document:
            document += blank
        document.append(line)
        blank = []
    if document:
        yield "".join(document).rstrip("\r\n")


def read_text(path: str, field: str) -> Iterator[str]:
    """A plain text file, also .gz or .zst; see split_documents."""
    del field

    def lines() -> Iterator[str]:
        offset = 0
        for line in file:
            yield decode(line, path, offset)
            offset += len(line)

    with _unpacked(path) as file:
        yield from split_documents(lines())


def read_code(path: str, field: str) -> Iterator[str]:
    """A source file: one document."""
    del field
    with open_binary(path) as file:
        yield decode(file.read(), path)


def _string(value: Any, where: str, field: str) -> str:
    """A field's value, if it is text."""
    if not isinstance(value, str):
        raise ValueError(f"{where}: {field} is {type(value).__name__}; allowed: a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: {field} is no text: half a character ({error})") from error
    return value


def _has_field(names: Iterable[str], where: str, field: str) -> None:
    if field not in names:
        raise ValueError(f"{where}: text_field={field!r}; allowed: {', '.join(names)}")


def json_objects(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it is, a JSON object) of every line."""
    with _unpacked(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            text = decode(line, where)
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where} is not JSON: {error}") from error
            if not isinstance(record, dict):
                raise ValueError(f"{where} is {type(record).__name__}; allowed: a JSON object")
            yield where, record


def read_jsonl(path: str, field: str) -> Iterator[str]:
    """A JSON object a line, also .gz or .zst."""
    for where, record in json_objects(path):
        _has_field(record, where, field)
        yield _string(record[field], where, field)


def _messages(record: dict[str, Any], where: str, field: str) -> list[dict[str, Any]]:
    """A field that holds a conversation."""
    messages = record.get(field)
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: {field}={messages!r}; allowed: a list of one or more")
    for message in messages:
        if not isinstance(message, dict):
            raise ValueError(f"{where}: a message is {message!r}; allowed: an object")
        for name in ("role", "content"):
            _string(message.get(name), where, f"a message's {name}")
    return messages


def _tools(record: dict[str, Any], where: str) -> dict[str, Any]:
    """What the assistant is told that it may call, for the template; None: it is told of none."""
    tools = record.get("tools")
    if not isinstance(tools, list | None):
        raise ValueError(f"{where}: tools={tools!r}; allowed: a list")
    return {"tools": tools}


def read_chat(path: str, field: str) -> Iterator[str]:
    """A conversation a line, {"messages": [{"role": "user", "content": "…"}, …]}, as JSON; it may
    have tools beside it.
    """
    del field
    for where, record in json_objects(path):
        found = {"messages": _messages(record, where, "messages")}
        yield json.dumps(found | _tools(record, where), ensure_ascii=False)


def read_preference(path: str, field: str) -> Iterator[str]:
    """A line {"prompt": […], "chosen": […], "rejected": […]}, messages each, as JSON; it may have
    tools beside them.
    """
    del field
    for where, record in json_objects(path):
        parts = ("prompt", "chosen", "rejected")
        found = {name: _messages(record, where, name) for name in parts}
        for name in ("chosen", "rejected"):
            last = found[name][-1]["role"]
            if last != ASSISTANT:
                raise ValueError(f"{where}: {name} ends with role={last!r}; allowed: {ASSISTANT!r}")
        yield json.dumps(found | _tools(record, where), ensure_ascii=False)


def read_parquet(path: str, field: str) -> Iterator[str]:
    """A column of a Parquet file."""
    parquet = optional("pyarrow.parquet", path)
    with open_binary(path) as file:
        try:
            table = parquet.ParquetFile(file)
        except ValueError as error:
            raise ValueError(f"{path} is no Parquet file: {error}") from error
        _has_field(table.schema_arrow.names, path, field)
        batches, number = table.iter_batches(RECORDS_AT_A_TIME, columns=[field]), 0
        while True:
            try:
                batch = next(batches, None)
            except (OSError, ValueError) as error:  # what pyarrow raises on reading
                raise ValueError(f"{path} is damaged: {error}") from error
            if batch is None:
                return
            for value in batch.column(0).to_pylist():
                yield _string(value, f"{path}, row {number}", field)
                number += 1


def read_array_record(path: str, field: str) -> Iterator[str]:
    """A local ArrayRecord file, each record a UTF-8 text."""
    del field
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        with contextlib.closing(ArrayRecordReader(path)) as reader:
            count = reader.num_records()
            if not count:
                raise ValueError(f"{path} is no ArrayRecord file, or one without records")
            for first in range(0, count, RECORDS_AT_A_TIME):
                numbers = list(range(first, min(first + RECORDS_AT_A_TIME, count)))
                for number, record in zip(numbers, reader.read(numbers), strict=True):
                    yield decode(record, f"{path}, record {number}")
    except RuntimeError as error:  # its own, on reading or closing
        raise ValueError(f"{path} is damaged: {error}") from error


def is_datasets_folder(path: str) -> bool:
    """Whether `save_to_disk` of Hugging Face datasets wrote it: one data set, or one a split."""
    return any((Path(path) / n).is_file() for n in ("state.json", "dataset_dict.json"))


def read_datasets(path: str, field: str) -> Iterator[str]:
    """A local folder that `save_to_disk` of Hugging Face datasets wrote."""
    data = optional("datasets", path).load_from_disk(path)
    if isinstance(data, dict):
        splits = ", ".join(f"{path}/{split}" for split in data)
        raise ValueError(f"{path} holds several splits; allowed: one of {splits}")
    _has_field(data.column_names, path, field)
    for number, row in enumerate(data.select_columns([field])):
        yield _string(row[field], f"{path}, row {number}", field)


FORMATS: dict[str, Callable[[str, str], Iterator[str]]] = {
    "text": read_text,
    "code": read_code,
    "jsonl": read_jsonl,
    "chat": read_chat,
    "preference": read_preference,
    "parquet": read_parquet,
    "array_record": read_array_record,
    "datasets": read_datasets,
}
# Their libraries read from this machine only.
LOCAL_FORMATS = ("array_record", "datasets")
SUFFIXES = {
    ".preference.jsonl": "preference",
    ".preference.jsonl.gz": "preference",
    ".preference.jsonl.zst": "preference",
    ".chat.jsonl": "chat",
    ".chat.jsonl.gz": "chat",
    ".chat.jsonl.zst": "chat",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".jsonl.zst": "jsonl",
    ".json": "jsonl",
    ".json.gz": "jsonl",
    ".json.zst": "jsonl",
    ".ndjson": "jsonl",
    ".ndjson.gz": "jsonl",
    ".ndjson.zst": "jsonl",
    ".parquet": "parquet",
    ".array_record": "array_record",
    ".arrayrecord": "array_record",
    ".py": "code",
}
