"""What a program takes of a pod, as tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rich.table import Table

from launch.aot.pod import PodCost

MIB = 2**20


def memory_table(cost: PodCost, part_of: Callable[[str], str]) -> Table:
    """Of one device, by kind.

    Args:
        part_of: the kind of an argument, by its first two names.
    """
    memory = cost.memory
    assert memory is not None
    table = Table("of one device", "MiB", "of its HBM", title="Memory")
    parts: dict[str, int] = {}
    for name, nbytes in cost.held.items():
        part = part_of(name)
        parts[part] = parts.get(part, 0) + nbytes
    parts["activations and other temporaries"] = memory.temporaries
    parts["all that is needed at once"] = memory.total
    room = cost.chip.device_hbm_bytes
    for name, nbytes in parts.items():
        table.add_row(name, f"{nbytes / MIB:,.0f}", f"{nbytes / room:.1%}")
    verdict = "fits" if cost.fits else f"does not fit, by {(memory.total - room) / MIB:,.0f} MiB"
    table.add_row("its HBM", f"{room / MIB:,.0f}", verdict)
    return table


def exchange_table(cost: PodCost) -> Table:
    """Collectives by kind."""
    table = Table("collective", "devices a group", "times", "MiB", "MiB from others")
    table.title = "Between devices, a step"
    for e in cost.exchanges:
        sizes = (f"{e.nbytes / MIB:,.1f}", f"{e.taken_in / MIB:,.1f}")
        table.add_row(e.kind, str(e.group_size), f"{e.count:,}", *sizes)
    return table


def bound_table(seconds: Mapping[str, float], about: Mapping[str, str]) -> Table:
    """Of one step.

    Args:
        seconds: by what bounds it.
        about: what follows from them.
    """
    table = Table("bound by", "ms a step", title="A step takes at least")
    for name, each in {**seconds, "the largest": max(seconds.values())}.items():
        table.add_row(name, f"{1e3 * each:,.1f}")
    table.add_section()
    for name, told in about.items():
        table.add_row(name, told)
    return table
