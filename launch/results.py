"""Where a command leaves what it found."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from jaxlm.evaluation.loss import HeldOut, LossByPosition
from jaxlm.load import is_workdir


def results_folder(checkpoint: str, output: str | None) -> Path:
    """`output`, made if need be; without it the workdir that the checkpoint is, or runs/NAME:
    nothing is written into what other libraries made.
    """
    own = Path(checkpoint)
    folder = Path(output) if output is not None else own
    if output is None and not is_workdir(own):
        folder = Path("runs") / own.stem
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_results(
    path: Path, held_out: Mapping[str, HeldOut], curves: Mapping[str, LossByPosition]
) -> None:
    """All figures of the tables and the picture, as JSON, of what is measured so far."""
    results = {
        "held_out": {n: dataclasses.asdict(r) for n, r in held_out.items()},
        "loss_by_position": {n: dataclasses.asdict(c) for n, c in curves.items()},
    }
    path.write_text(json.dumps(results, indent=1) + "\n")
