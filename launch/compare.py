"""Train alike, differ in the position encoding, measure far beyond the training length."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jaxtyping import Int

import jaxlm
from jaxlm.checkpoints import local_folder
from jaxlm.data.config import as_source
from jaxlm.data.documents import long_windows
from jaxlm.data.loader import open_tokenizer
from jaxlm.data.sources import files
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
    compare, folder = run.compare, local_folder(workdir)
    assert compare is not None
    if jax.process_count() > 1:
        raise ValueError("compare is set; allowed with several processes: None")
    runs = {e: with_encoding(run, e) for e in compare.position_encodings}
    check_encodings(compare, runs)
    files(as_source(compare.text))  # is it there?
    # Before the first run: a comparison that was stopped can be opened too.
    first = compare.position_encodings[0]
    if (folder / CHECKPOINTS).exists():
        raise ValueError(f"workdir={folder} holds a run; allowed: a comparison's, or a new one")
    cache = folder / "data"
    tokenizer = open_tokenizer(run.data, cache)  # the runs will find it in the cache
    windows = long_windows(compare.text, tokenizer, compare.length, compare.windows)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DEFAULT_RUN).write_text(json.dumps({"run": first}))
    trained: dict[str, TrainedRun] = {}
    for encoding, one in runs.items():
        trained[encoding] = train(
            one,
            folder / encoding,
            description=encoding,
            allow_config_change=allow_config_change,
            cache=cache,
        )
        if trained[encoding].result.stopped_by is not None:
            return
    held_out = {n: s.result.held_out for n, s in trained.items() if s.result.held_out}
    write_results(folder / "results.json", held_out, {})
    console.print_held_out(held_out)
    curves = measure(compare, trained, windows)
    context = trained[first].model.config.context_length
    write_results(folder / "results.json", held_out, curves)
    console.print_loss_by_position(curves, context)
    draw_loss_by_position(curves, context, folder / "loss_by_position.png")
    sample(compare, trained[first])
    say_what_next(folder, trained[first].model)


def with_encoding(run: RunConfig, encoding: str) -> RunConfig:
    """The same run, with another position encoding, for itself."""
    model = {**run.model, "position_encoding": encoding}
    return dataclasses.replace(run, model=model, compare=None)


def check_encodings(compare: CompareConfig, runs: Mapping[str, RunConfig]) -> None:
    """Raises ValueError for an encoding that won't work, before the first run is trained."""
    models = {name: Transformer(run.model_config(1)) for name, run in runs.items()}
    for label in compare.also:
        trained, encoding = label.split(" + ", 1)
        if trained not in runs:
            raise ValueError(
                f"compare.also: {label!r}: {trained!r} is not trained; allowed: {', '.join(runs)}"
            )
        models[label] = models[trained].with_position_encoding(encoding)
    for model in models.values():
        limit = model.config.encoding.max_length
        if limit is not None and compare.length > limit:
            raise ValueError(
                f"compare: length={compare.length}; allowed: at most {limit} with "
                f"position_encoding={model.config.encoding}"
            )


def measure(
    compare: CompareConfig, runs: Mapping[str, TrainedRun], windows: Int[np.ndarray, "W S"]
) -> dict[str, LossByPosition]:
    """Loss by position of every trained model, and of those put under another encoding."""
    cases: dict[str, tuple[str, Any]] = {n: (n, s.model) for n, s in runs.items()}
    for label in compare.also:
        trained, encoding = label.split(" + ", 1)
        cases[label] = (trained, runs[trained].model.with_position_encoding(encoding))
    curves = {}
    for label, (trained, model) in cases.items():
        logging.info("loss by position: %s", label)
        params = runs[trained].params
        curves[label] = evaluate_loss_by_position(model, params, windows, compare.bucket)
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


def say_what_next(folder: Path, model: Transformer) -> None:
    """Three commands to go on with, for the run that `jaxlm.load(folder)` opens."""
    others = ["lm_infinite(num_sinks=4)"]
    length = "" if model.config.encoding.max_length else " --length=4096"
    try:
        model.with_position_encoding(others[0])
    except ValueError:  # it is not relative
        others = []
    given = (model.config.position_encoding, *others)
    encodings = " ".join(f"--position_encoding={shlex.quote(str(e))}" for e in given)
    print(
        f"Picture: {folder}/loss_by_position.png   Figures: {folder}/results.json\n"
        "Next:\n"
        f"  python -m launch.generate --checkpoint={folder} --prompt='It is a truth' "
        "--max_new_tokens=100 --temperature=0.8\n"
        f"  python -m launch.evaluate --checkpoint={folder}{length} {encodings}\n"
        "  python -m launch.train --config=configs/tiny.py --workdir=runs/tiny "
        "--config.model.position_encoding=fire"
    )
