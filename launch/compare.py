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
from jaxlm.evaluation.loss import HeldOut, LossByPosition, evaluate_loss_by_position
from jaxlm.load import DEFAULT_RUN
from jaxlm.model.transformer import Transformer
from jaxlm.training.run import CompareConfig, RunConfig
from launch import console
from launch.session import Session, run_training


def run_comparison(run: RunConfig, workdir: str, allow_config_change: bool) -> None:
    """One run an encoding, then a table, two pictures and a sample."""
    compare, folder = run.compare, Path(workdir)
    assert compare is not None
    runs = {e: with_encoding(run, e) for e in compare.position_encodings}
    check_encodings(compare, runs)
    # Before the first run: a comparison that was stopped can be opened too.
    first = compare.position_encodings[0]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DEFAULT_RUN).write_text(json.dumps({"run": first}))
    sessions: dict[str, Session] = {}
    for encoding, one in runs.items():
        session = run_training(
            one, folder / encoding, encoding, allow_config_change, cache=folder / "data"
        )
        sessions[encoding] = session
        if session.result.stopped_by is not None:
            return
    curves = measure(compare, sessions)
    held_out = {n: s.result.held_out for n, s in sessions.items() if s.result.held_out}
    context = sessions[first].model.config.context_length
    write_results(folder, held_out, curves)
    draw_loss_by_position(curves, context, folder / "loss_by_position.png")
    console.print_held_out(held_out)
    console.print_loss_by_position(curves, context)
    sample(compare, sessions[first])
    say_what_next(folder)


def with_encoding(run: RunConfig, encoding: str) -> RunConfig:
    """The same run, with another position encoding."""
    return dataclasses.replace(run, model={**run.model, "position_encoding": encoding})


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


def measure(compare: CompareConfig, sessions: Mapping[str, Session]) -> dict[str, LossByPosition]:
    """Loss by position of every trained model, and of those put under another encoding."""
    cases: dict[str, tuple[str, Any]] = {n: (n, s.model) for n, s in sessions.items()}
    for label in compare.also:
        trained, encoding = label.split(" + ", 1)
        cases[label] = (trained, sessions[trained].model.with_position_encoding(encoding))
    curves = {}
    for label, (trained, model) in cases.items():
        session = sessions[trained]
        windows = long_windows(compare.text, session.tokenizer, compare.length, compare.windows)
        logging.info("loss by position: %s", label)
        curves[label] = evaluate_loss_by_position(
            model, session.result.state.averaged_params, windows, compare.bucket
        )
    return curves


def write_results(
    folder: Path, held_out: Mapping[str, HeldOut], curves: Mapping[str, LossByPosition]
) -> None:
    """results.json: all figures of the tables and the picture."""
    results = {
        "held_out": {n: dataclasses.asdict(r) for n, r in held_out.items()},
        "loss_by_position": {n: dataclasses.asdict(c) for n, c in curves.items()},
    }
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")


def sample(compare: CompareConfig, session: Session) -> None:
    """A few lines of the first model's prose."""
    (text,) = jaxlm.generate(
        session.model,
        session.result.state.averaged_params,
        session.tokenizer,
        [compare.prompt],
        max_new_tokens=80,
        temperature=0.8,
        top_p=0.95,
    )
    print(f"\nSample ({session.model.config.encoding}):\n{compare.prompt}{text}\n")


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
