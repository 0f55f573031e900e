"""Where a command leaves what it found."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxlm.evaluation.loss import HeldOut, LossByPosition
from jaxlm.load import is_workdir


def results_folder(checkpoint: str, output: str | None) -> Path:
    """`output`, which may be absent; without it the workdir that the checkpoint is, or runs/NAME:
    nothing is written into what other libraries made.

    Raises:
        ValueError: it is the workdir of another run.
    """
    own = Path(checkpoint)
    folder = Path(output) if output is not None else own
    if output is None and not is_workdir(own):
        folder = Path("runs") / own.name.removesuffix(".gguf")
    if is_workdir(folder) and folder.resolve() != own.resolve():
        raise ValueError(
            f"output={str(folder)!r} is the workdir of another run; allowed: with --output=FOLDER, "
            f"any other folder for the results of {checkpoint}"
        )
    return folder


def write_results(
    path: Path,
    held_out: Mapping[str, HeldOut],
    curves: Mapping[str, LossByPosition],
    checkpoint: str | None = None,
    passkeys: Mapping[str, Mapping[int, float]] | None = None,
) -> None:
    """All figures of the tables and the picture, as JSON, of what is measured so far.

    Args:
        path: of the file; its folder is made if need be.
        held_out, curves: by the name of what was measured.
        checkpoint: that all of them are of; None: they are of a comparison's runs.
        passkeys: the share that was found, by name and by length.
    """
    results: dict[str, Any] = {} if checkpoint is None else {"checkpoint": checkpoint}
    results |= {
        "held_out": {n: dataclasses.asdict(r) for n, r in held_out.items()},
        "loss_by_position": {n: dataclasses.asdict(c) for n, c in curves.items()},
    }
    if passkeys:
        results["passkeys"] = passkeys
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
