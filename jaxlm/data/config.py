"""What a run reads, and how it is cut into batches."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from jaxlm.config import at_least, build, check, check_types, one_of
from jaxlm.data.formats import FORMATS
from jaxlm.data.stall import SECONDS

# Between two weights. Beyond it the rarer source's next row is a whole run away.
LARGEST_RATIO = 10**6
# A day.
LONGEST_STALL = 86_400


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One source of documents.

    A plain text file holds one document or more: two or more blank lines in a row separate them, a
    single one only paragraphs. A code file is one document; all other formats have one a record.

    Attributes:
        path: "builtin:NAME" (see jaxlm.data.sources.BUILTIN), a file, a glob (** for any depth), a
            Hugging Face `datasets` folder, or an address such as gs://bucket/*.jsonl.zst.
        format: "auto" goes by the file name; else a name in jaxlm.data.formats.FORMATS. Of a "chat"
            (FILE.chat.jsonl) only the assistant's turns are learned; a "preference"
            (FILE.preference.jsonl) is a pair of answers. For both the tokenizer must have a chat
            template.
        weight: share of the batches' rows, relative to the other sources: at most LARGEST_RATIO
            times the smallest one, and rounded to a hundredth of it.
        text_field: the field that holds the text, in records that have fields.
    """

    path: str
    format: str = "auto"
    weight: float = 1.0
    text_field: str = "text"

    def __post_init__(self):
        owner = f"source {self.path!r}"
        check_types(SourceConfig, vars(self), owner)
        check(
            owner,
            path=(self.path, bool(self.path), "a non-empty path"),
            format=one_of(self.format, "auto", *FORMATS),
            weight=(self.weight, 0 < self.weight < math.inf, "a finite number > 0"),
        )


def as_sources(values: str | Iterable[Any]) -> tuple[SourceConfig, ...]:
    """From paths, several of them with commas between, mappings, or SourceConfigs."""
    values = [values] if isinstance(values, str) else values
    parts = (v.split(",") if isinstance(v, str) else [v] for v in values)
    return tuple(as_source(value) for part in parts for value in part)


def as_source(value: Any) -> SourceConfig:
    """From a path, a mapping of SourceConfig's fields, or a SourceConfig."""
    if isinstance(value, SourceConfig):
        return value
    if isinstance(value, Mapping):
        return build(SourceConfig, value, "data.sources")
    return SourceConfig(value)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The data of a run.

    Attributes:
        sources: trained on; paths (also several in one string, with commas between), mappings of
            SourceConfig's fields, or SourceConfigs.
        held_out: evaluated on; () for none.
        tokenizer: "bytes"; "bpe:4096", a byte-level BPE of that size trained on `sources`; or the
            path of a tokenizer.json, a SentencePiece .model, a .tiktoken file or a folder that a
            tokenizer was saved to.
        sequence_length: tokens a row.
        batch_size: rows a step, over all processes.
        seed: of the order of rows.
        num_threads: that read and assemble rows ahead of the training step.
        stall_seconds: without a byte of a source that is read, before that is an error.
    """

    sources: Any = ("builtin:austen",)
    held_out: Any = ("builtin:austen_valid",)
    tokenizer: str = "bytes"
    sequence_length: int = 512
    batch_size: int = 8
    seed: int = 0
    num_threads: int = 2
    stall_seconds: float = SECONDS

    def __post_init__(self):
        for name in ("sources", "held_out"):
            value = getattr(self, name)
            allowed = "a path, or a list of paths, mappings or SourceConfigs"
            check("data", **{name: (value, isinstance(value, Iterable), allowed)})
            object.__setattr__(self, name, as_sources(value))
        check_types(type(self), vars(self), "data")
        stall = self.stall_seconds
        check(
            "data",
            sources=(self.sources, len(self.sources) >= 1, "at least one source"),
            sequence_length=at_least(self.sequence_length, 1),
            batch_size=at_least(self.batch_size, 1),
            num_threads=at_least(self.num_threads, 0),
            seed=(self.seed, 0 <= self.seed < 2**31, "an integer in [0, 2**31)"),
            stall_seconds=(stall, 0 < stall <= LONGEST_STALL, f"in (0, {LONGEST_STALL}]"),
        )
        least = min(self.sources, key=lambda source: source.weight)
        for source in self.sources:
            most = LARGEST_RATIO * least.weight
            allowed = f"at most {LARGEST_RATIO} times the weight={least.weight} of {least.path!r}"
            check(f"source {source.path!r}", weight=(source.weight, source.weight <= most, allowed))
