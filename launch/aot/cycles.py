"""Static cycles of a program: from the profiler, which may abort, and needs gigabytes."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.aot import profile
from launch.aot.chips import Chip
from launch.aot.hlo import mosaic_calls
from launch.aot.hlo_text import Module, parse
from launch.aot.process import AbortedError, run_child
from launch.aot.traffic import bytes_by_operation


@dataclasses.dataclass(frozen=True)
class Cycles:
    """Of one program on one device.

    Attributes:
        total: of all operations, one after the other; None if a kernel's are unknown.
        kernels: of one run of each call of a Pallas kernel, in the order of the text.
        is_lower_bound: the total counts some operations only as fast as HBM can be.
        notes: what the figures leave out.
    """

    total: float | None
    kernels: tuple[float | None, ...]
    is_lower_bound: bool = False
    notes: tuple[str, ...] = ()


def profiled(request: dict[str, Any], chip: Chip, timeout: float) -> Cycles:
    """Of one program. If the profiler aborts, each kernel that it had not reached is profiled in a
    process of its own: often the trouble is with another operation.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        known, note = _profile(request, folder, None, timeout)
        text = folder / "hlo.txt"
        if note is None:
            return _cycles(parse(text.read_text()), chip, known, [])
        notes = [note]
        try:
            result = run_child(request, folder, [], timeout)
        except AbortedError as error:
            result = {"error": str(error)}
        if "error" in result:
            return Cycles(None, (), notes=(*notes, result["error"]))
        module = parse(text.read_text())
        for call in mosaic_calls(module):
            if call.op not in known:
                more, note = _profile(request, folder, call.op, timeout)
                known |= more
                notes += [note] if note and note not in notes else []
    return _cycles(module, chip, known, notes)


def scaled(
    request: dict[str, Any], scale: str, counts: list[int], chip: Chip, timeout: float
) -> Cycles:
    """A straight line through two smaller programs, whose kwarg `scale` is one of `counts`."""
    few = []
    for count in counts:
        smaller = {**request, "kwargs": {**request["kwargs"], scale: count}}
        few.append(profiled(smaller, chip, timeout))
        if few[-1].total is None:
            return dataclasses.replace(few[-1], kernels=())
    position = (request["kwargs"][scale] - counts[0]) / (counts[1] - counts[0])

    def line(a: float | None, b: float | None) -> float | None:
        return None if a is None or b is None else a + position * (b - a)

    note = f"cycles are extrapolated from {scale}={counts[0]} and {scale}={counts[1]}"
    return Cycles(
        line(few[0].total, few[1].total),
        tuple(map(line, few[0].kernels, few[1].kernels)),
        few[0].is_lower_bound or few[1].is_lower_bound,
        tuple(dict.fromkeys((note, *few[0].notes, *few[1].notes))),
    )


def _profile(
    request: dict[str, Any], folder: Path, only: str | None, timeout: float
) -> tuple[dict[str, int], str | None]:
    """Cycles by operation, and what went wrong. What was profiled before an abort is good."""
    note = None
    with tempfile.TemporaryDirectory(dir=folder) as cycles:
        try:
            flags = profile.cycle_flags(Path(cycles), only)
            note = run_child(request, folder, flags, timeout).get("error")
        except AbortedError as error:
            note = f"the profiler aborted: {error}"
        return profile.read_cycles(Path(cycles)), note


def _cycles(module: Module, chip: Chip, known: Mapping[str, int], notes: list[str]) -> Cycles:
    kernels = tuple(known.get(call.op) for call in mosaic_calls(module))
    if None in kernels:
        return Cycles(None, kernels, notes=tuple(notes))
    moved = bytes_by_operation(module)
    per_byte = chip.clock_hz / chip.device_hbm_bytes_per_second
    total, unknown = 0.0, []
    for computation, instruction in module.instructions():
        name, runs = instruction.name, module.runs[computation]
        if name in known:
            total += runs * known[name]
        elif notes and moved.get(name) and not instruction.opcode.endswith("-start"):
            total += runs * moved[name] * per_byte
            unknown.append(name)
    if unknown:
        notes = [*notes, f"as fast as HBM, for want of a profile: {', '.join(unknown)}"]
    return Cycles(total, kernels, bool(unknown), tuple(notes))
