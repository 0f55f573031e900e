"""What a compiled program is made of: collectives and Pallas kernels, with how often each runs."""

from __future__ import annotations

import dataclasses
import math
import re

from launch.aot.hlo_text import Instruction, Module

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
# The three ways to write groups: by the axes of a mesh (of devices in another order, perhaps), as
# an iota, in full.
_MESH_GROUPS = re.compile(
    r"\breplica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^{]*\))? \{([^}]*)\}"
)
_IOTA_GROUPS = re.compile(r"\breplica_groups=\[\d+,(\d+)\]<=")
_LISTED_GROUPS = re.compile(r"\breplica_groups=\{\{([\d,]*)\}")
_COST_ESTIMATE = re.compile(r'"cost_estimate":\{[^}]*"bytes_accessed":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One place where devices talk.

    Attributes:
        kind: as in COLLECTIVES.
        name: of the instruction.
        nbytes: each time, of one device: what it puts in or gets out, whichever is larger.
        group_size: how many devices talk with each other, if the text says.
        runs: how often, loops counted.
    """

    kind: str
    name: str
    nbytes: int
    group_size: int | None
    runs: int


@dataclasses.dataclass(frozen=True)
class MosaicCall:
    """One call of a Pallas kernel.

    Attributes:
        op: name of the instruction, by which profiles and dumps know it.
        kernel: name= of the pallas_call.
        runs: how often, loops counted.
        estimated_bytes: of the kernel's own cost_estimate=, if it has one.
    """

    op: str
    kernel: str
    runs: int
    estimated_bytes: int | None


def collectives(module: Module) -> list[Collective]:
    """All of a program. One that overlaps with arithmetic stands in the text several times (its
    start, steps and end, each in a fusion), under one channel: it is one. Elsewhere a channel says
    nothing: all of a shard_map's collectives have the same. A fusion named all-reduce-scatter is a
    reduce-scatter, though an all-reduce and a slice stand in it.
    """
    found: dict[tuple[str, str, int], Collective] = {}
    for computation, instruction in module.instructions():
        kind = instruction.opcode.removesuffix("-start")
        runs = module.runs[computation]
        if kind not in COLLECTIVES or not runs:
            continue
        size = _group_size(instruction.attributes)
        nbytes = _payload(kind, instruction, size)
        kind = "reduce-scatter" if computation.startswith("all-reduce-scatter") else kind
        channel = _CHANNEL.search(instruction.attributes)
        named = channel[1] if channel and computation in module.fused else instruction.name
        found.setdefault(
            (kind, named, nbytes), Collective(kind, instruction.name, nbytes, size, runs)
        )
    return list(found.values())


def _payload(kind: str, instruction: Instruction, group_size: int | None) -> int:
    # Scalars are the context of a start.
    sizes = [array.nbytes for array in instruction.results if array.dims]
    if instruction.opcode.endswith("-start") and kind != "all-reduce":
        half = len(sizes) // 2
        return max(sum(sizes[:half]), sum(sizes[half:]))
    return sum(sizes) * (group_size or 1 if kind == "reduce-scatter" else 1)


def _group_size(attributes: str) -> int | None:
    mesh = _MESH_GROUPS.search(attributes)
    if mesh:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", mesh[2]))
    iota = _IOTA_GROUPS.search(attributes)
    if iota:
        return int(iota[1])
    listed = _LISTED_GROUPS.search(attributes)
    return len(listed[1].split(",")) if listed else None


def mosaic_calls(module: Module) -> list[MosaicCall]:
    """All calls of Pallas kernels."""
    calls = []
    for computation, instruction in module.instructions():
        if instruction.is_mosaic:
            kernel = re.sub(r"\.\d+$", "", instruction.name)
            runs = module.runs[computation]
            calls.append(MosaicCall(instruction.name, kernel, runs, estimated_bytes(instruction)))
    return calls


def estimated_bytes(instruction: Instruction) -> int | None:
    """Of a kernel's cost_estimate=."""
    found = _COST_ESTIMATE.search(instruction.attributes)
    return int(found[1]) if found else None
