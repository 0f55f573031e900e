"""Train a byte-level BPE tokenizer on any sources of text.

python -m launch.tokenizer --sources=builtin:austen --vocab_size=4096 --output=runs/austen.json

The file is read by --config.data.tokenizer=runs/austen.json, and by any other program that knows
tokenizer.json. A config's data.tokenizer = "bpe:4096" does the same by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from absl import app, flags

from jaxlm.data.config import SourceConfig
from jaxlm.data.sources import documents
from jaxlm.data.tokenizers import Tokenizer, load_tokenizer
from jaxlm.data.train_bpe import train_bpe
from launch import console

SOURCES = flags.DEFINE_list(
    "sources", None, "Files, globs, folders, addresses or builtin:NAME.", required=True
)
TEXT_FIELD = flags.DEFINE_string("text_field", "text", "Field of a record that is its text.")
VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 4096, "Ids, with the 256 bytes and two specials.")
OUTPUT = flags.DEFINE_string(
    "output", None, "The tokenizer.json to write, not there yet.", required=True
)

# Of the text that the bytes per token are counted on: enough for three digits.
MEASURED_BYTES = 4_000_000


def texts() -> Iterator[str]:
    """All documents of all sources."""
    for path in SOURCES.value:
        yield from documents(SourceConfig(path, text_field=TEXT_FIELD.value))


def checked_output() -> Path:
    """The file to write, if that is possible without harm."""
    path = Path(OUTPUT.value)
    if path.suffix != ".json":
        raise ValueError(f"output={OUTPUT.value!r}; allowed: a name that ends in .json")
    if path.exists():
        raise ValueError(f"output={OUTPUT.value!r} is there already; allowed: a new file")
    return path


def bytes_per_token(tokenizer: Tokenizer, texts: Iterable[str]) -> float:
    """On the first few megabytes."""
    num_bytes = num_tokens = 0
    for text in texts:
        num_bytes += len(text.encode())
        num_tokens += len(tokenizer.encode(text))
        if num_bytes >= MEASURED_BYTES:
            break
    return num_bytes / num_tokens


def main(argv: list[str]) -> None:
    """Writes the file and prints one line."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
    with console.clear_errors():
        if not SOURCES.value:
            raise ValueError("sources is empty; allowed: at least one")
        path = checked_output()
        train_bpe(texts(), VOCAB_SIZE.value, path)
        tokenizer = load_tokenizer(str(path))
        print(
            f"{path}: {tokenizer.vocab_size} ids, {bytes_per_token(tokenizer, texts()):.2f} bytes "
            f"per token; use it with --config.data.tokenizer={path}"
        )


if __name__ == "__main__":
    app.run(main)
