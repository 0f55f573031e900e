"""Static cycles of a program: from the profiler, which may abort, and needs gigabytes."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.aot import profile
from launch.aot.hlo import mosaic_calls
from launch.aot.hlo_text import Module, parse
from launch.aot.process import AbortedError, run_child


@dataclasses.dataclass(frozen=True)
class Cycles:
    """Of one program on one device.

    Attributes:
        total: of all operations, one after the other; None if a kernel's are unknown.
        kernels: of one run of each call of a Pallas kernel, in the order of the text.
        note: what the figures leave out, or None.
    """

    total: float | None
    kernels: tuple[float | None, ...]
    note: str | None = None


def profiled(request: dict[str, Any], module: Module, timeout: float) -> Cycles:
    """Of the program that `module` is the text of."""
    with tempfile.TemporaryDirectory() as name:
        known, note = _profile(request, Path(name), timeout)
    return _cycles(module, known, note)


def scaled(request: dict[str, Any], scale: str, counts: list[int], timeout: float) -> Cycles:
    """A straight line through two smaller programs, whose kwarg `scale` is one of `counts`."""
    few = []
    for count in counts:
        smaller = {**request, "kwargs": {**request["kwargs"], scale: count}}
        with tempfile.TemporaryDirectory() as name:
            known, note = _profile(smaller, Path(name), timeout)
            text = Path(name, "hlo.txt")
            cycles = _cycles(parse(text.read_text()), known, note) if text.exists() else None
        if cycles is None or note is not None:
            return Cycles(None, (), f"{note} ({scale}={count})")
        few.append(cycles)
    position = (request["kwargs"][scale] - counts[0]) / (counts[1] - counts[0])

    def line(a: float | None, b: float | None) -> float | None:
        return None if a is None or b is None else a + position * (b - a)

    return Cycles(
        line(few[0].total, few[1].total),
        tuple(map(line, few[0].kernels, few[1].kernels)),
        f"cycles are extrapolated from {scale}={counts[0]} and {scale}={counts[1]}",
    )


def _profile(
    request: dict[str, Any], folder: Path, timeout: float
) -> tuple[dict[str, int], str | None]:
    """Cycles by operation, and what went wrong. What was profiled before an abort is good."""
    note, cycles = None, folder / "cycles"
    cycles.mkdir()
    try:
        result = run_child(request, folder, profile.cycle_flags(cycles), timeout)
        note = result.get("error")
    except AbortedError as error:
        note = f"the profiler aborted: {error}"
    return profile.read_cycles(cycles), note


def _cycles(module: Module, known: Mapping[str, int], note: str | None) -> Cycles:
    kernels = tuple(known.get(call.op) for call in mosaic_calls(module))
    if None in kernels:
        return Cycles(None, kernels, note)
    total = 0
    for computation, instruction in module.instructions():
        if computation not in module.fused:
            cycles = known.get(instruction.name) or instruction.estimated_cycles or 0
            total += module.runs[computation] * cycles
    if note is not None:
        note = f"{note}; XLA's rough estimates stand for what it had not reached"
    return Cycles(total, kernels, note)
