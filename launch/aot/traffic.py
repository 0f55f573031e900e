"""HBM bytes that a compiled program moves, counted from its text.

XLA's own cost_analysis() counts a loop's body once, what stays in VMEM as if it went to HBM, and
the insides of fusions (five times too much for decoding against a cache, seen with libtpu 0.0.42).
Here an operation reads each of its operands once and writes its results once, unless they lie in
VMEM; of an operand that is only sliced it reads the slice; a kernel moves what its cost_estimate=
says, or else its operands and results.
"""

from __future__ import annotations

from collections.abc import Iterable

from launch.aot.hlo import estimated_bytes
from launch.aot.hlo_text import Array, Computation, Instruction, Module

FREE = {
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all"),
    *("while", "conditional", "call", "opt-barrier", "async-start"),
}
SLICES = {"dynamic-slice", "slice", "gather"}


def bytes_by_operation(module: Module) -> dict[str, int]:
    """HBM bytes of one run of each operation of one device."""
    moved: dict[str, int] = {}
    for name, computation in module.computations.items():
        if name not in module.fused:
            moved |= {i.name: _moved(module, computation, i) for i in computation.values()}
    return moved


def hbm_bytes(module: Module) -> int:
    """Of one device, loops counted."""
    moved = bytes_by_operation(module)
    operations = ((i.name, module.runs[c]) for c, i in module.instructions())
    return sum(runs * moved.get(name, 0) for name, runs in operations)


def _in_hbm(arrays: Iterable[Array]) -> int:
    return sum(array.nbytes for array in arrays if array.in_hbm)


def _moved(module: Module, computation: Computation, instruction: Instruction) -> int:
    opcode = instruction.opcode
    if opcode in FREE or opcode.endswith(("-done", "-update")):
        return 0
    if instruction.is_mosaic:
        estimate = estimated_bytes(instruction)
        if estimate is not None:
            return estimate
    elif opcode == "custom-call" and not instruction.operands:
        return 0  # it allocates
    if opcode.endswith("-start"):
        # Two ends of the way, of which one is read and one written, then words of context.
        return _in_hbm(instruction.results[:2])
    operands = [computation[name].results for name in instruction.operands]
    if opcode == "dynamic-update-slice":
        return 2 * _in_hbm(operands[1])
    if opcode in SLICES:
        return 2 * _in_hbm(instruction.results)
    if opcode == "fusion":
        body = _body(module, instruction)
        read = sum(
            min(_read(module, body, number), _in_hbm(arrays))
            for number, arrays in enumerate(operands)
        )
        return read + max(_in_hbm(instruction.results) - _untouched(module, body), 0)
    return _in_hbm(instruction.results) + sum(map(_in_hbm, operands))


def _body(module: Module, fusion: Instruction) -> Computation:
    return next(module.computations[name] for name, _ in module.callees(fusion))


def _read(module: Module, body: Computation, number: int) -> int:
    """Bytes that a fusion reads of a parameter: slices of it, if all its uses are slices."""
    (parameter,) = (i for i in body.values() if i.opcode == "parameter" and i.inside == str(number))
    whole = sum(array.nbytes for array in parameter.results)
    total, waiting = 0, [parameter]
    while waiting:
        source = waiting.pop()
        uses = [
            (use, n)
            for use in body.values()
            for n, o in enumerate(use.operands)
            if o == source.name
        ]
        if not uses:
            return whole  # it is the result
        for use, position in uses:
            if use.opcode == "fusion":
                total += _read(module, _body(module, use), position)
            elif use.opcode == "bitcast":
                waiting.append(use)
            elif use.opcode in SLICES and position == 0:
                total += sum(array.nbytes for array in use.results)
            elif use.opcode != "dynamic-update-slice" or position > 0:
                return whole
    return min(total, whole)


def _untouched(module: Module, body: Computation) -> int:
    """Bytes of a fusion's results that updates in place leave as they are."""
    total = 0
    for instruction in body.values():
        if instruction.opcode == "dynamic-update-slice":
            update = body[instruction.operands[1]]
            total += instruction.results[0].nbytes - update.results[0].nbytes
        elif instruction.opcode == "fusion":
            total += _untouched(module, _body(module, instruction))
    return total
