"""Perplexity, bits per byte and loss by position of a trained model.

python -m launch.evaluate --checkpoint=runs/quickstart --length=2048 \
    --position_encoding=rope --position_encoding='lm_infinite(num_sinks=4)'

Through KV caches, as decoding meets the text, and whether a number in it is found again:

python -m launch.evaluate --checkpoint=MODEL.gguf --length=4096 --noheld_out --passkey=2048 \
    --passkey=4096 --cache=dense --cache='quantized(bits=4)' --cache='ring(window=1024)'
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

import jaxlm
from jaxlm import caches
from jaxlm.caches.kind import CacheKind
from jaxlm.data.documents import long_windows, longest_window
from jaxlm.data.loader import held_out_batches
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.decoding.request import make_request
from jaxlm.evaluation import passkey
from jaxlm.evaluation.charts import draw_loss_by_position
from jaxlm.evaluation.loss import HeldOut, LossByPosition, check_windows
from jaxlm.model.transformer import Transformer
from launch import console
from launch.results import results_folder, write_results

DEFAULT_LENGTH = 2048
# Unless more is asked for: a batch of long rows takes gigabytes, and many long windows hours.
MOST_ROWS, MOST_WINDOWS, MOST_TOKENS = 16, 8, 16_384

CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    None,
    "Workdir of a training run, a Hugging Face folder or the hub's owner/name, or a GGUF file.",
    required=True,
)
TEXT = flags.DEFINE_multi_string(
    "text",
    ["builtin:austen_valid"],
    "A source of held-out text; may be given several times: figures are over all of them.",
)
ENCODING = flags.DEFINE_multi_string(
    "position_encoding",
    [],
    "Encodings to evaluate the parameters under; may be given several times. Default: its own.",
)
CACHE = flags.DEFINE_multi_string(
    "cache",
    [],
    "KV caches, see jaxlm.caches, to read long texts through; may be given several times. Default: "
    "none, one forward pass (and dense for pass keys).",
)
QUANTIZE = flags.DEFINE_enum(
    "quantize", None, ["int8", "int4"], "Matrices, embedding and head in so many bits."
)
LENGTH = flags.DEFINE_integer(
    "length",
    None,
    f"Context length of loss by position. Default: {DEFAULT_LENGTH}, or less where the text or an "
    "encoding's table ends before.",
    lower_bound=1,
)
BUCKET = flags.DEFINE_integer("bucket", 64, "Positions averaged into one point.", lower_bound=1)
WINDOWS = flags.DEFINE_integer(
    "windows",
    None,
    f"Windows of that length a text. Default: at most {MOST_WINDOWS}, and at most {MOST_TOKENS} "
    "tokens, but one.",
    lower_bound=1,
)
UNROLL = flags.DEFINE_bool(
    "unroll", False, "Layers apart, which a razor with other heads in each of them needs."
)
BY_POSITION = flags.DEFINE_bool("loss_by_position", True, "Measure long windows of the text.")
PASSKEY = flags.DEFINE_multi_integer(
    "passkey",
    [],
    "Length in tokens of texts in which a number is to be found; may be given several times.",
    lower_bound=1,
)
SAMPLES = flags.DEFINE_integer("samples", 20, "Pass keys a length.", lower_bound=1)
HELD_OUT = flags.DEFINE_bool(
    "held_out",
    True,
    "Measure the whole text too, in rows of the model's context length, at most "
    f"{MOST_TOKENS} tokens.",
)
BATCH_SIZE = flags.DEFINE_integer(
    "batch_size",
    None,
    f"Rows of the whole text evaluated at a time. Default: at most {MOST_ROWS}, and at most "
    f"{MOST_TOKENS} tokens.",
    lower_bound=1,
)
OUTPUT = flags.DEFINE_string(
    "output",
    None,
    "Folder of the JSON and the picture. Default: the workdir, or runs/NAME for the checkpoint "
    "NAME of another library.",
)


def possible_length(models: Iterable[Transformer], tokenizer: Tokenizer) -> int:
    """The default length, or as much of it as the texts and every encoding's table allow."""
    tables = (model.config.encoding.max_length for model in models)
    ends = (*(longest_window(text, tokenizer) for text in TEXT.value), *tables)
    return min(DEFAULT_LENGTH, *(end for end in ends if end is not None))


def measure_held_out(
    models: Mapping[str, Transformer], params: Any, tokenizer: Tokenizer, folder: Path
) -> dict[str, HeldOut]:
    """Loss on all of the texts, in rows of the context length, or of less that holds the longest.

    A context length is what a file says: rows of 2,000,000,000 tokens would not be made.
    """
    context = next(iter(models.values())).config.context_length
    # A start and an end token come to a text.
    holds = max(longest_window(text, tokenizer) for text in TEXT.value) + 2
    context = min(context, holds, MOST_TOKENS)
    rows = BATCH_SIZE.value or max(1, min(MOST_ROWS, MOST_TOKENS // context))
    packed = [
        held_out_batches(text, tokenizer, context, rows, folder / "data") for text in TEXT.value
    ]
    batches = [batch for each, _ in packed for batch in each]
    num_bytes = sum(size for _, size in packed)
    held_out = {}
    for name, model in models.items():
        loop = console.tracked(batches, f"held-out text, {name}: batches")
        held_out[name] = jaxlm.evaluate(model, params, loop, num_bytes)
    return held_out


@dataclasses.dataclass(frozen=True)
class Reader:
    """A model under one encoding, and what it reads long texts through; None: nothing."""

    encoding: str
    model: Transformer
    cache: CacheKind | None

    @property
    def name(self) -> str:
        """In tables."""
        return self.encoding if self.cache is None else f"{self.encoding}, {self.cache}"

    def check(self, windows: np.ndarray | None, tokenizer: Tokenizer) -> None:
        """Raises ValueError for what cannot be measured: that may come after hours otherwise."""
        if windows is not None:
            check_windows(self.model, windows)
            if self.cache is not None:
                self.cache.nbytes_of(self.model.config, 1, windows.shape[1] - 1)
        for length in PASSKEY.value:
            prompts = [one.prompt for one in passkey.make(length, tokenizer, SAMPLES.value)]
            longest = [max(prompts, key=len)]
            cache = self.cache or "dense"
            make_request(self.model, tokenizer, longest, passkey.NEW_TOKENS, {}, cache)


def measure_passkeys(reader: Reader, params: Any, tokenizer: Tokenizer) -> dict[int, float]:
    """The share that is found, by length of the text."""
    found = {}
    for length in PASSKEY.value:
        track = functools.partial(console.tracked, what=f"pass keys in {length}, {reader.name}")
        given = (reader.model, params, tokenizer, length, SAMPLES.value)
        found[length] = passkey.evaluate_passkey(*given, cache=reader.cache or "dense", track=track)
    return found


def check_flags() -> None:
    """Raises ValueError where they leave nothing to measure, or nothing to read through a cache."""
    by_cache = BY_POSITION.value or bool(PASSKEY.value)
    if not (by_cache or HELD_OUT.value):
        told = "loss_by_position or held_out, or a passkey"
        raise ValueError(f"noloss_by_position and noheld_out; allowed: {told}")
    if CACHE.value and not by_cache:
        raise ValueError(f"cache={CACHE.value[0]!r}; allowed: with loss_by_position or passkey")


def windows_of(models: Iterable[Transformer], tokenizer: Tokenizer) -> np.ndarray:
    """Of all texts."""
    length = LENGTH.value or possible_length(models, tokenizer)
    count = WINDOWS.value or max(1, min(MOST_WINDOWS, MOST_TOKENS // length))
    return np.concatenate([long_windows(text, tokenizer, length, count) for text in TEXT.value])


def main(argv: list[str]) -> None:
    """Prints tables, writes evaluation.json, evaluation.png and evaluation.svg."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
    with console.clear_errors():
        check_flags()
        folder = results_folder(CHECKPOINT.value, OUTPUT.value)
        kinds: list[CacheKind | None] = [caches.parse(text) for text in CACHE.value] or [None]
        model, params, tokenizer = jaxlm.load(
            CHECKPOINT.value, unroll=UNROLL.value, quantize=QUANTIZE.value
        )
        if not isinstance(model, Transformer) or model.config.sees_ahead:
            raise ValueError(f"checkpoint={CHECKPOINT.value!r}; allowed: a decoder")
        models = {e: model.with_position_encoding(e) for e in ENCODING.value}
        models = models or {str(model.config.encoding): model}
        readers = [Reader(*of, kind) for of in models.items() for kind in kinds]
        windows = windows_of(models.values(), tokenizer) if BY_POSITION.value else None
        for reader in readers:
            reader.check(windows, tokenizer)
        folder.mkdir(parents=True, exist_ok=True)
        held_out = {}
        if HELD_OUT.value:
            held_out = measure_held_out(models, params, tokenizer, folder)
            console.print_held_out(held_out)
        measure_readers(readers, params, tokenizer, windows, held_out, folder)


def measure_readers(
    readers: list[Reader],
    params: Any,
    tokenizer: Tokenizer,
    windows: np.ndarray | None,
    held_out: Mapping[str, HeldOut],
    folder: Path,
) -> None:
    """Loss by position and pass keys of each; what is found is written as it comes: each may take
    hours.
    """
    curves: dict[str, LossByPosition] = {}
    found: dict[str, dict[int, float]] = {}
    context = readers[0].model.config.context_length
    for reader in readers:
        name = reader.name
        if windows is not None:
            track = functools.partial(console.tracked, what=f"loss by position, {name}: windows")
            curves[name] = jaxlm.evaluate_loss_by_position(
                reader.model, params, windows, BUCKET.value, track=track, cache=reader.cache
            )
        if PASSKEY.value:
            found[name] = measure_passkeys(reader, params, tokenizer)
        write_results(folder / "evaluation.json", held_out, curves, CHECKPOINT.value, found)
    made = [f"{folder}/evaluation.json"]
    if curves:
        console.print_loss_by_position(curves, context)
        draw_loss_by_position(curves, context, folder / "evaluation.png")
        made.append(f"{folder}/evaluation.png")
    if found:
        console.print_passkeys(found, SAMPLES.value)
    print(", ".join(made))


if __name__ == "__main__":
    app.run(main)
