"""Train alike, differ in the position encoding, measure far beyond the training length."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import logging

import jaxlm
from jaxlm.data.documents import long_windows
from jaxlm.evaluation.charts import draw_loss_by_position
from jaxlm.evaluation.loss import LossByPosition, evaluate_loss_by_position
from jaxlm.model.transformer import Transformer
from jaxlm.training.run import CompareConfig, RunConfig
from jaxlm.training.train import TrainedRun, train
from jaxlm.training.workdir import CHECKPOINTS, DEFAULT_RUN
from launch import console
from launch.results import write_results


def run_comparison(run: RunConfig, workdir: str | Path, allow_config_change: bool) -> None:
    """One run an encoding, then a table, two pictures and a sample."""
    compare, folder = run.compare, Path(workdir)
    assert compare is not None
    runs = {e: with_encoding(run, e) for e in compare.position_encodings}
    check_encodings(compare, runs)
    # Before the first run: a comparison that was stopped can be opened too.
    first = compare.position_encodings[0]
    if (folder / CHECKPOINTS).exists():
        raise ValueError(f"workdir={folder} holds a run; allowed: a comparison's, or a new one")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DEFAULT_RUN).write_text(json.dumps({"run": first}))
    trained: dict[str, TrainedRun] = {}
    for encoding, one in runs.items():
        trained[encoding] = train(
            one,
            folder / encoding,
            description=encoding,
            allow_config_change=allow_config_change,
            cache=folder / "data",
        )
        if trained[encoding].result.stopped_by is not None:
            return
    curves = measure(compare, trained)
    held_out = {n: s.result.held_out for n, s in trained.items() if s.result.held_out}
    context = trained[first].model.config.context_length
    write_results(folder / "results.json", held_out, curves)
    draw_loss_by_position(curves, context, folder / "loss_by_position.png")
    console.print_held_out(held_out)
    console.print_loss_by_position(curves, context)
    sample(compare, trained[first])
    say_what_next(folder)


def with_encoding(run: RunConfig, encoding: str) -> RunConfig:
    """The same run, with another position encoding, for itself."""
    model = {**run.model, "position_encoding": encoding}
    return dataclasses.replace(run, model=model, compare=None)


def check_encodings(compare: CompareConfig, runs: Mapping[str, RunConfig]) -> None:
    """Raises ValueError for an encoding that won't work, before the first run is trained."""
    for run in runs.values():
        run.check_model()
    for label in compare.also:
        trained, encoding = label.split(" + ", 1)
        if trained not in runs:
            raise ValueError(
                f"compare.also: {label!r}: {trained!r} is not trained; allowed: {', '.join(runs)}"
            )
        Transformer(runs[trained].model_config(1)).with_position_encoding(encoding)


def measure(compare: CompareConfig, runs: Mapping[str, TrainedRun]) -> dict[str, LossByPosition]:
    """Loss by position of every trained model, and of those put under another encoding."""
    cases: dict[str, tuple[str, Any]] = {n: (n, s.model) for n, s in runs.items()}
    for label in compare.also:
        trained, encoding = label.split(" + ", 1)
        cases[label] = (trained, runs[trained].model.with_position_encoding(encoding))
    curves = {}
    for label, (trained, model) in cases.items():
        run = runs[trained]
        windows = long_windows(compare.text, run.tokenizer, compare.length, compare.windows)
        logging.info("loss by position: %s", label)
        curves[label] = evaluate_loss_by_position(model, run.params, windows, compare.bucket)
    return curves


def sample(compare: CompareConfig, run: TrainedRun) -> None:
    """A few lines of the first model's prose."""
    (text,) = jaxlm.generate(
        run.model,
        run.params,
        run.tokenizer,
        [compare.prompt],
        max_new_tokens=80,
        temperature=0.8,
        top_p=0.95,
    )
    print(f"\nSample ({run.model.config.encoding}):\n{compare.prompt}{text}\n")


def say_what_next(folder: Path) -> None:
    """Three commands to go on with."""
    print(
        f"Picture: {folder}/loss_by_position.png   Figures: {folder}/results.json\n"
        "Next:\n"
        f"  python -m launch.generate --checkpoint={folder} --prompt='It is a truth' "
        "--max_new_tokens=100 --temperature=0.8\n"
        f"  python -m launch.evaluate --checkpoint={folder} --length=4096 "
        "--position_encoding=rope --position_encoding='lm_infinite(num_sinks=4)'\n"
        "  python -m launch.train --config=configs/tiny.py --workdir=runs/tiny "
        "--config.model.position_encoding=fire"
    )
