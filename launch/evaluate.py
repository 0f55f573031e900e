"""Perplexity, bits per byte and loss by position of a trained model.

python -m launch.evaluate --checkpoint=runs/quickstart --length=2048 \
    --position_encoding=rope --position_encoding='lm_infinite(num_sinks=4)'
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

from absl import app, flags

import jaxlm
from jaxlm.data.documents import long_windows, longest_window
from jaxlm.data.loader import held_out_batches
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.evaluation.charts import draw_loss_by_position
from jaxlm.load import is_workdir
from jaxlm.model.transformer import Transformer
from launch import console

DEFAULT_LENGTH = 2048

CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    None,
    "Workdir of a training run, a Hugging Face folder, or a GGUF file.",
    required=True,
)
TEXT = flags.DEFINE_string("text", "builtin:austen_valid", "One source of held-out text.")
ENCODING = flags.DEFINE_multi_string(
    "position_encoding",
    [],
    "Encodings to evaluate the parameters under; may be given several times. Default: its own.",
)
LENGTH = flags.DEFINE_integer(
    "length",
    None,
    f"Context length of loss by position. Default: {DEFAULT_LENGTH}, or less where the text or an "
    "encoding's table ends before.",
    lower_bound=1,
)
BUCKET = flags.DEFINE_integer("bucket", 64, "Positions averaged into one point.", lower_bound=1)
WINDOWS = flags.DEFINE_integer("windows", 8, "Texts of that length.", lower_bound=1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Rows evaluated at a time.", lower_bound=1)
OUTPUT = flags.DEFINE_string(
    "output",
    None,
    "Folder of the JSON and the picture. Default: the workdir, or runs/NAME for the checkpoint "
    "NAME of another library.",
)


def possible_length(models: Iterable[Transformer], tokenizer: Tokenizer) -> int:
    """The default length, or as much of it as the text and every encoding's table allow."""
    tables = (model.config.encoding.max_length for model in models)
    ends = (longest_window(TEXT.value, tokenizer), *tables)
    return min(DEFAULT_LENGTH, *(end for end in ends if end is not None))


def output_folder() -> Path:
    """Where results go: nothing is written into what other libraries made."""
    checkpoint = Path(CHECKPOINT.value)
    if OUTPUT.value is not None:
        return Path(OUTPUT.value)
    return checkpoint if is_workdir(checkpoint) else Path("runs") / checkpoint.stem


def main(argv: list[str]) -> None:
    """Prints two tables, writes evaluation.json, evaluation.png and evaluation.svg."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
    with console.clear_errors():
        model, params, tokenizer = jaxlm.load(CHECKPOINT.value)
        if not isinstance(model, Transformer):
            raise ValueError(f"checkpoint={CHECKPOINT.value!r}; allowed: no encoder–decoder")
        folder = output_folder()
        folder.mkdir(parents=True, exist_ok=True)
        context = model.config.context_length
        models = {e: model.with_position_encoding(e) for e in ENCODING.value}
        models = models or {str(model.config.encoding): model}
        held_out, curves = {}, {}
        for name, one in models.items():
            batches, num_bytes = held_out_batches(
                TEXT.value, tokenizer, context, BATCH_SIZE.value, folder / "data"
            )
            held_out[name] = jaxlm.evaluate(one, params, batches, num_bytes)
        console.print_held_out(held_out)
        length = LENGTH.value or possible_length(models.values(), tokenizer)
        windows = long_windows(TEXT.value, tokenizer, length, WINDOWS.value)
        for name, one in models.items():
            curves[name] = jaxlm.evaluate_loss_by_position(one, params, windows, BUCKET.value)
        console.print_loss_by_position(curves, context)
        results = {
            "held_out": {n: dataclasses.asdict(r) for n, r in held_out.items()},
            "loss_by_position": {n: dataclasses.asdict(c) for n, c in curves.items()},
        }
        (folder / "evaluation.json").write_text(json.dumps(results, indent=1) + "\n")
        draw_loss_by_position(curves, context, folder / "evaluation.png")
        print(f"{folder}/evaluation.json, {folder}/evaluation.png")


if __name__ == "__main__":
    app.run(main)
