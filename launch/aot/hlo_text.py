"""The text of a compiled program, as instructions in computations, and how often each one runs."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_COMPUTATION = re.compile(r"(?:ENTRY )?%?([^\s(]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?(\S+) = (.*)")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition)=%?([^\s,}]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRUE_FALSE = re.compile(r"\b(?:true|false)_computation=%?([^\s,}]+)")
_TRIP_COUNT = re.compile(r'known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's result."""

    dtype: str
    dims: tuple[int, ...]
    layout: str = ""

    @property
    def in_hbm(self) -> bool:
        """Not in VMEM, SMEM, a semaphore, or the host's memory."""
        return "S(" not in self.layout

    @property
    def nbytes(self) -> int:
        """With the padding of the layout's tiles: 64 columns of T(8,128) take the room of 128."""
        dims = list(self.dims)
        order, _, tiles = self.layout.partition(":")
        tile = re.match(r"T\(([\d,]+)\)", tiles)
        if tile and order:
            sizes = zip(order.split(","), reversed(tile[1].split(",")), strict=False)
            for axis, size in sizes:
                dims[int(axis)] = math.ceil(dims[int(axis)] / int(size)) * int(size)
        return math.prod(dims) * _bits(self.dtype) // 8


def _bits(dtype: str) -> int:
    """32 of s32, 8 of f8e4m3fn; a token has none."""
    digits = re.match(r"[a-z]+(\d+)", dtype)
    return int(digits[1]) if digits else 8 * (dtype == "pred")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """name = results opcode(inside), attributes."""

    name: str
    results: tuple[Array, ...]
    opcode: str
    inside: str
    attributes: str

    @functools.cached_property
    def operands(self) -> list[str]:
        """Names of the instructions it uses."""
        return re.findall(r"%([^\s,]+)", self.inside)

    @property
    def is_mosaic(self) -> bool:
        """A Pallas kernel."""
        return 'custom_call_target="tpu_custom_call"' in self.attributes


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Module:
    """A program; callees stand before their callers, the entry is last."""

    computations: dict[str, Computation]

    @functools.cached_property
    def runs(self) -> dict[str, int]:
        """How often each computation runs; a conditional runs all its branches once."""
        runs = dict.fromkeys(self.computations, 0)
        runs[list(self.computations)[-1]] = 1
        for name in reversed(self.computations):
            for instruction in self.computations[name].values():
                for callee, times in self.callees(instruction):
                    runs[callee] += runs[name] * times
        return runs

    @functools.cached_property
    def fused(self) -> set[str]:
        """Computations inside a fusion: their instructions are no operations of their own."""
        fusions = (i for _, i in self.instructions() if i.opcode == "fusion")
        return {c for i in fusions for c, _ in self.callees(i)}

    def instructions(self) -> Iterator[tuple[str, Instruction]]:
        """(computation, instruction) of all."""
        for name, computation in self.computations.items():
            for instruction in computation.values():
                yield name, instruction

    def loops_of_unknown_length(self) -> list[str]:
        """Loops whose count is data: they are taken to run once."""
        loops = (i for _, i in self.instructions() if i.opcode == "while")
        return [i.name for i in loops if self._trip_count(i) is None]

    def callees(self, instruction: Instruction) -> Iterator[tuple[str, int]]:
        """(computation, how often) of what one run of an instruction runs."""
        attributes, opcode = instruction.attributes, instruction.opcode
        times = (self._trip_count(instruction) or 1) if opcode == "while" else 1
        for kind, callee in _CALLED.findall(attributes):
            # What a reduction or a scatter applies is no computation of its own.
            if callee in self.computations and (kind != "to_apply" or opcode == "call"):
                yield callee, times
        branches = _BRANCHES.search(attributes)
        names = branches[1].replace("%", "").split(", ") if branches else []
        for callee in [*names, *_TRUE_FALSE.findall(attributes)]:
            yield callee, 1

    def _trip_count(self, loop: Instruction) -> int | None:
        """As the compiler says, or the largest constant of the condition: exact for a loop that
        counts up from 0 by 1, as scan and fori_loop(0, n) do.
        """
        known = _TRIP_COUNT.search(loop.attributes)
        if known:
            return int(known[1])
        called = dict(_CALLED.findall(loop.attributes))
        constants: list[int] = []
        waiting = [called["condition"]]
        while waiting:
            for i in self.computations[waiting.pop()].values():
                if i.opcode == "constant" and i.inside.isdigit():
                    constants.append(int(i.inside))
                waiting += [callee for callee, _ in self.callees(i)]
        return max(constants, default=None)


def parse(text: str) -> Module:
    """What compiled.as_text() gives."""
    computations: dict[str, Computation] = {}
    current: Computation = {}
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            current = computations.setdefault(header[1], {})
        elif found := _INSTRUCTION.match(line):
            instruction = _instruction(found[1], found[2])
            current[instruction.name] = instruction
    if not computations:
        raise ValueError("no HLO module: the text has no computation")
    return Module(computations)


def arrays(shape: str) -> tuple[Array, ...]:
    """The arrays of a shape, which may be a tuple."""
    found = _ARRAY.findall(shape)
    return tuple(
        Array(d, tuple(int(n) for n in s.split(",") if n), layout) for d, s, layout in found
    )


def _instruction(name: str, rest: str) -> Instruction:
    shape_end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opcode_end = rest.index("(", shape_end)
    end = _closing(rest, opcode_end)
    return Instruction(
        name,
        results=arrays(rest[:shape_end]),
        opcode=rest[shape_end:opcode_end].strip(),
        inside=rest[opcode_end + 1 : end],
        attributes=rest[end + 1 :],
    )


def _closing(text: str, start: int) -> int:
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] == "(") - (text[position] == ")")
        if depth == 0:
            return position
    raise ValueError(f"unbalanced parentheses: {text[:80]!r}")
