"""Perplexity, bits per byte and loss by position of a trained model.

python -m launch.evaluate --checkpoint=runs/quickstart --length=2048 \
    --position_encoding=rope --position_encoding='lm_infinite(num_sinks=4)'
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from absl import app, flags

import jaxlm
from jaxlm.data.documents import long_windows
from jaxlm.data.loader import held_out_batches
from jaxlm.evaluation.charts import draw_loss_by_position
from launch import console

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Workdir of a training run.", required=True)
TEXT = flags.DEFINE_string("text", "builtin:austen_valid", "A source of held-out text.")
ENCODING = flags.DEFINE_multi_string(
    "position_encoding",
    [],
    "Encodings to evaluate the parameters under; may be given several times. Default: its own.",
)
LENGTH = flags.DEFINE_integer("length", 2048, "Context length of loss by position.")
BUCKET = flags.DEFINE_integer("bucket", 64, "Positions averaged into one point.")
WINDOWS = flags.DEFINE_integer("windows", 8, "Texts of that length.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Rows evaluated at a time.")
OUTPUT = flags.DEFINE_string("output", None, "Folder of the JSON and the picture.")


def main(argv: list[str]) -> None:
    """Prints two tables, writes evaluation.json and loss_by_position.png."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
    with console.clear_errors():
        model, params, tokenizer = jaxlm.load(CHECKPOINT.value)
        folder = Path(OUTPUT.value or CHECKPOINT.value)
        folder.mkdir(parents=True, exist_ok=True)
        context = model.config.context_length
        models = {e: model.with_position_encoding(e) for e in ENCODING.value}
        models = models or {str(model.config.encoding): model}
        windows = long_windows(TEXT.value, tokenizer, LENGTH.value, WINDOWS.value)
        held_out, curves = {}, {}
        for name, one in models.items():
            batches, num_bytes = held_out_batches(
                TEXT.value, tokenizer, context, BATCH_SIZE.value, folder / "data"
            )
            held_out[name] = jaxlm.evaluate(one, params, batches, num_bytes)
            curves[name] = jaxlm.evaluate_loss_by_position(one, params, windows, BUCKET.value)
        results = {
            "held_out": {n: dataclasses.asdict(r) for n, r in held_out.items()},
            "loss_by_position": {n: dataclasses.asdict(c) for n, c in curves.items()},
        }
        (folder / "evaluation.json").write_text(json.dumps(results, indent=1) + "\n")
        draw_loss_by_position(curves, context, folder / "loss_by_position.png")
        console.print_held_out(held_out)
        console.print_loss_by_position(curves, context)
        print(f"{folder}/evaluation.json, {folder}/loss_by_position.png")


if __name__ == "__main__":
    app.run(main)
