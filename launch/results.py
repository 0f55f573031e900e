"""Where a command leaves what it found."""

from __future__ import annotations

from pathlib import Path

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
