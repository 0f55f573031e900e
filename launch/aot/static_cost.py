"""The compiler's own estimate of what one program costs on a TPU that is not there.

None of these figures is a measured time. Operations are scheduled statically, so arithmetic is
right to a few percent; copies are modelled too fast, so the time to quote is never below what the
HBM traffic takes at full bandwidth. Loops whose length is data are taken to run once.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from launch.aot import profile
from launch.aot.chips import Chip, chip_of
from launch.aot.cost import KernelCost, Memory, StaticCost
from launch.aot.cycles import Cycles, profiled, scaled
from launch.aot.hlo import mosaic_calls
from launch.aot.hlo_text import Module, parse
from launch.aot.kept import digest, kept_cycles
from launch.aot.process import AbortedError, run_child
from launch.aot.traffic import hbm_bytes

# Profiling unrolls all loops: of two heads of 4096 tokens, backward too, it takes minutes.
TIMEOUT = 1800.0


def describe(topology: str) -> dict[str, Any]:
    """Its number of devices, and which compiler answers.

    Raises:
        ValueError: there is no such topology.
    """
    chip_of(topology)
    with tempfile.TemporaryDirectory() as name:
        try:
            result = run_child({"topology": topology}, Path(name), [], TIMEOUT)
        except AbortedError as error:
            raise ValueError(f"topology={topology!r}: libtpu failed: {error}") from error
    if "error" in result:
        raise ValueError(result["error"])
    return result


def measure(
    function: str,
    kwargs: Mapping[str, Any],
    topology: str,
    scale: str | None = None,
    profile_too: bool = True,
    timeout: float = TIMEOUT,
    profiles: Path | None = None,
) -> StaticCost:
    """Compiles a program in processes of their own: for memory, text and bundles, and again for
    the profile, which may abort.

    Args:
        function: "module:name" of what takes the mesh of one device and the kwargs, and returns a
            function and the shapes of its arguments.
        kwargs: values that JSON knows.
        topology: such as v5e:2x2.
        scale: the kwarg that says how often independent work is repeated, such as the heads. The
            profiler unrolls all loops, so it then sees one repetition a core, and two; cycles for
            all of them lie on the line through both.
        profile_too: False: there are no cycles, as for programs whose length is data.
        timeout: seconds of each process.
        profiles: folder of the cycles that were found before, see `launch.aot.kept`; None: none.
    """
    chip = chip_of(topology)
    request = {"topology": topology, "function": function, "kwargs": dict(kwargs)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            result = run_child(request, folder, profile.bundle_flags(folder / "dump"), timeout)
        except AbortedError as error:
            result = {"error": f"the compiler aborted: {error}"}
        if "error" in result:
            return StaticCost(topology, error=result["error"])
        text = (folder / "hlo.txt").read_text()
        bundles = profile.read_bundles(folder / "dump")
    module = parse(text)

    def find() -> Cycles:
        return _cycles(request, scale, chip, timeout)

    if not profile_too:
        cycles = Cycles(None, ())
    elif profiles is None:
        cycles = find()
    else:
        cycles = kept_cycles(profiles, digest(text, result["compiler"], scale), find)
    moved = hbm_bytes(module)
    return StaticCost(
        topology,
        memory=Memory(*result["memory"]),
        kernels=tuple(_kernels(module, cycles, bundles, chip)),
        static_microseconds=None if cycles.total is None else 1e6 * cycles.total / chip.clock_hz,
        is_lower_bound=cycles.is_lower_bound,
        hbm_bytes=moved,
        hbm_microseconds=1e6 * moved / chip.device_hbm_bytes_per_second,
        notes=tuple(_notes(module, cycles)),
    )


def _kernels(
    module: Module, cycles: Cycles, bundles: Mapping[str, profile.Bundles], chip: Chip
) -> Iterator[KernelCost]:
    calls = mosaic_calls(module)
    known = cycles.kernels if len(cycles.kernels) == len(calls) else (None,) * len(calls)
    for call, count in zip(calls, known, strict=True):
        time = None if count is None else 1e6 * count / chip.clock_hz
        yield KernelCost(call.op, call.kernel, call.runs, count, time, bundles.get(call.op))


def _cycles(request: dict[str, Any], scale: str | None, chip: Chip, timeout: float) -> Cycles:
    few = [chip.cores_per_device, 2 * chip.cores_per_device]
    if scale is not None and request["kwargs"][scale] > few[-1]:
        return scaled(request, scale, few, chip, timeout)
    return profiled(request, chip, timeout)


def _notes(module: Module, cycles: Cycles) -> Iterator[str]:
    yield from cycles.notes
    for call in mosaic_calls(module):
        if call.estimated_bytes is None:
            yield f"{call.kernel} has no cost_estimate: its operands and results are its bytes"
    for loop in module.loops_of_unknown_length():
        yield f"{loop} has a length that is data: it counts once"
