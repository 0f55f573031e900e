"""Perplexity, bits per byte and loss by position of a trained model.

python -m launch.evaluate --checkpoint=runs/quickstart --length=2048 \
    --position_encoding=rope --position_encoding='lm_infinite(num_sinks=4)'
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

import jaxlm
from jaxlm.data.documents import long_windows, longest_window
from jaxlm.data.loader import held_out_batches
from jaxlm.data.tokenizers import Tokenizer
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
    "Workdir of a training run, a Hugging Face folder, or a GGUF file.",
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


def main(argv: list[str]) -> None:
    """Prints two tables, writes evaluation.json, evaluation.png and evaluation.svg."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
    with console.clear_errors():
        folder = results_folder(CHECKPOINT.value, OUTPUT.value)
        model, params, tokenizer = jaxlm.load(CHECKPOINT.value, quantize=QUANTIZE.value)
        if not isinstance(model, Transformer):
            raise ValueError(f"checkpoint={CHECKPOINT.value!r}; allowed: no encoder–decoder")
        models = {e: model.with_position_encoding(e) for e in ENCODING.value}
        models = models or {str(model.config.encoding): model}
        length = LENGTH.value or possible_length(models.values(), tokenizer)
        count = WINDOWS.value or max(1, min(MOST_WINDOWS, MOST_TOKENS // length))
        windows = np.concatenate(
            [long_windows(text, tokenizer, length, count) for text in TEXT.value]
        )
        for one in models.values():  # before the first of them is measured, which may take hours
            check_windows(one, windows)
        folder.mkdir(parents=True, exist_ok=True)
        held_out = {}
        if HELD_OUT.value:
            held_out = measure_held_out(models, params, tokenizer, folder)
            console.print_held_out(held_out)
        curves: dict[str, LossByPosition] = {}
        for name, one in models.items():
            track = functools.partial(console.tracked, what=f"loss by position, {name}: windows")
            curves[name] = jaxlm.evaluate_loss_by_position(
                one, params, windows, BUCKET.value, track=track
            )
            # Each may have taken hours.
            write_results(folder / "evaluation.json", held_out, curves, CHECKPOINT.value)
        console.print_loss_by_position(curves, model.config.context_length)
        draw_loss_by_position(curves, model.config.context_length, folder / "evaluation.png")
        print(f"{folder}/evaluation.json, {folder}/evaluation.png")


if __name__ == "__main__":
    app.run(main)
