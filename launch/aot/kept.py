"""Cycles that were found before, by the program.

To profile takes up to half an hour, to compile does not take a minute.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.aot.cycles import Cycles

_METADATA = re.compile(r", metadata=\{[^{}]*\}")  # files and lines of the source


def digest(compiled: str, compiler: str, scale: str | None) -> str:
    """What cycles follow from.

    Args:
        compiled: text of the program.
        compiler: its version.
        scale: see `launch.aot.static_cost.measure`.
    """
    parts = json.dumps([_METADATA.sub("", compiled), compiler, scale])
    return hashlib.sha256(parts.encode()).hexdigest()


def kept_cycles(folder: Path, name: str, find: Callable[[], Cycles]) -> Cycles:
    """Those in the folder, else what is found, which is then there; but for unknown ones, which the
    next run looks for again.
    """
    path = folder / f"{name}.json"
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        found |= {name: tuple(found[name]) for name in ("kernels", "notes")}
        return Cycles(**found)
    cycles = find()
    if cycles.total is not None:
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{name}.{os.getpid()}.part"
        partial.write_text(json.dumps(dataclasses.asdict(cycles), indent=1) + "\n")
        partial.replace(path)  # whole or absent, whenever the run is stopped
    return cycles
