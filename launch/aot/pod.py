"""What one program takes of each device of a pod that is not there, and no less time than what.

The bounds are of arithmetic, HBM and the links between chips, each as if it were alone and at its
public peak: a step takes at least the largest of them, and the sum if nothing overlapped.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.aot.chips import Chip, chip_of
from launch.aot.cost import Memory
from launch.aot.hlo import Collective, collectives
from launch.aot.hlo_text import parse
from launch.aot.process import AbortedError, run_child
from launch.aot.traffic import hbm_bytes

# Of what a device holds at the end, or puts in at the start, it takes this part in from others.
TAKEN_IN = {
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
    "collective-broadcast": lambda n: 1.0,
}


@dataclasses.dataclass(frozen=True)
class Exchange:
    """All collectives of one kind over groups of one size, of one device and one run.

    Attributes:
        count: how often one is run.
        nbytes: of all of them: what a device puts in or gets out, whichever is larger.
        taken_in: bytes that come from other devices, if each comes once.
    """

    kind: str
    group_size: int
    count: int
    nbytes: int
    taken_in: float


@dataclasses.dataclass(frozen=True)
class PodCost:
    """One program on a topology.

    Attributes:
        devices: of the topology.
        error: why it does not compile, or None; then the rest is empty.
        memory: of one device.
        held: bytes of one device's arguments, by their first two names.
        exchanges: between devices, by kind and size of the group.
        hbm_bytes: moved by one device.
        notes: what the figures leave out.
    """

    topology: str
    devices: int
    error: str | None = None
    memory: Memory | None = None
    held: Mapping[str, int] = dataclasses.field(default_factory=dict)
    exchanges: tuple[Exchange, ...] = ()
    hbm_bytes: int = 0
    notes: tuple[str, ...] = ()

    @property
    def chip(self) -> Chip:
        """Of the topology."""
        return chip_of(self.topology)

    @property
    def fits(self) -> bool:
        """Whether it compiles, and within HBM."""
        return self.memory is not None and self.memory.total <= self.chip.device_hbm_bytes

    def seconds(self, flops: float) -> dict[str, float]:
        """Of each bound.

        Args:
            flops: of all devices.
        """
        chip = self.chip
        taken_in = sum(e.taken_in for e in self.exchanges)
        return {
            "arithmetic": flops / self.devices / chip.device_bf16_flops,
            "HBM": self.hbm_bytes / chip.device_hbm_bytes_per_second,
            "links": taken_in / chip.device_ici_bytes_per_second,
        }


def exchanges_of(found: list[Collective]) -> tuple[Exchange, ...]:
    """Collectives of one kind and group size, together; the most bytes first."""
    groups: dict[tuple[str, int], list[Collective]] = {}
    for one in found:
        groups.setdefault((one.kind, one.group_size or 1), []).append(one)
    exchanges = []
    for (kind, size), members in groups.items():
        nbytes = sum(m.runs * m.nbytes for m in members)
        count = sum(m.runs for m in members)
        exchanges.append(Exchange(kind, size, count, nbytes, nbytes * TAKEN_IN[kind](size)))
    return tuple(sorted(exchanges, key=lambda e: -e.taken_in))


def measure_pod(
    function: str,
    kwargs: Mapping[str, Any],
    topology: str,
    mesh: Mapping[str, int],
    timeout: float = 3600.0,
) -> PodCost:
    """Compiles a program for all devices of a topology, in a process of its own.

    Args:
        function: "module:name", see `launch.aot.child`.
        kwargs: values that JSON knows.
        topology: such as v5e:16x16.
        mesh: size of each axis.
        timeout: in seconds.

    Raises:
        ValueError: an unknown topology.
    """
    chip_of(topology)
    devices = 1
    for size in mesh.values():
        devices *= size
    request = {"topology": topology, "function": function, "kwargs": dict(kwargs)}
    request["mesh"] = dict(mesh)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            result = run_child(request, folder, [], timeout)
        except AbortedError as error:
            result = {"error": f"the compiler aborted: {error}"}
        if "error" in result:
            return PodCost(topology, devices, result["error"])
        module = parse((folder / "hlo.txt").read_text())
    loops = module.loops_of_unknown_length()
    return PodCost(
        topology,
        devices,
        None,
        Memory(*result["memory"]),
        result["held"],
        exchanges_of(collectives(module)),
        hbm_bytes(module),
        tuple(f"{loop} has a length that is data: it counts once" for loop in loops),
    )
