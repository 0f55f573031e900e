"""One row of `launch.compile kernels`: a case compiled, its peer at its best, and the ratio."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.console import Console
from rich.table import Table

from launch.aot.chips import Chip
from launch.aot.cost import StaticCost
from launch.aot.static_cost import measure
from launch.kernel_cases import Case, Kwargs


@dataclasses.dataclass(frozen=True)
class Row:
    """One case, compiled."""

    case: Case
    ours: StaticCost | None
    peer: StaticCost | None
    peer_kwargs: Kwargs | None

    @property
    def failed(self) -> bool:
        """What the case is about does not compile."""
        subject = self.ours or self.peer
        return subject is None or not subject.compiles

    @property
    def ratio(self) -> float | None:
        """Our time to the peer's."""
        ours = self.ours.microseconds if self.ours else None
        peer = self.peer.microseconds if self.peer else None
        if ours is None or peer is None or self.case.peer_is_lower_bound:
            return None
        return ours / peer

    def to_json(self) -> dict[str, Any]:
        """All figures."""
        return {
            **dataclasses.asdict(self.case),
            "ours": self.ours.to_json() if self.ours else None,
            "best_peer": self.peer.to_json() if self.peer else None,
            "best_peer_kwargs": self.peer_kwargs,
            "ratio": self.ratio,
        }


def compile_case(case: Case, topology: str) -> Row:
    """Ours, and the peer at its best settings."""
    ours = None
    if case.function is not None:
        ours = measure(case.function, case.kwargs, topology, case.scale)
    if case.peer is None:
        return Row(case, ours, None, None)
    peers = [(measure(case.peer, k, topology, case.scale), k) for k in case.peer_kwargs]
    peer, kwargs = min(peers, key=lambda pair: _rank(pair[0]))
    return Row(case, ours, peer, kwargs)


def _rank(cost: StaticCost) -> tuple[bool, bool, float, int]:
    known = cost.microseconds is not None
    return not cost.compiles, not known, cost.at_least_microseconds, cost.bundles


def table_of(rows: list[Row], chip: Chip, title: str) -> Table:
    """A line for ours and one for the peer."""
    table = Table(title=title)
    for name in ("kernel", "shape"):
        table.add_column(name)
    for name in ("HBM MiB", "static µs", "of peak", "bundles", "spills", "busiest unit"):
        table.add_column(name, justify="right")
    for name in ("peer µs", "ratio"):
        table.add_column(name, justify="right")
    for row in rows:
        case, peer = row.case, row.peer
        if row.ours is not None:
            name = (case.function or "").rpartition(":")[2]
            against = [_time(peer, case.peer_is_lower_bound) if peer else "", _ratio(row)]
            table.add_row(name, case.shape, *_figures(row.ours, case, chip, False), *against)
        if peer is not None:
            block = (row.peer_kwargs or {}).get("block")
            name = (case.peer or "").rpartition(":")[2] + (f" {block}" if block else "")
            figures = _figures(peer, case, chip, case.peer_is_lower_bound)
            table.add_row(f"peer: {name}", case.shape, *figures, "", "")
    return table


def _figures(cost: StaticCost, case: Case, chip: Chip, lower_bound: bool) -> list[str]:
    if cost.memory is None:
        return ["does not compile", *[""] * 5]
    share, time = "–", cost.microseconds
    if time is not None and not lower_bound:
        share = f"{case.useful_flops / (time * 1e-6 * chip.device_bf16_flops):.0%}"
    largest = cost.largest
    unit = f"{largest.busiest} {largest.use[largest.busiest]:.0%}" if largest else "–"
    counts = [f"{n:,}" if cost.kernels else "–" for n in (cost.bundles, cost.spill_stores)]
    memory = f"{cost.memory.total / 2**20:,.0f}"
    return [memory, _time(cost, lower_bound), share, *counts, unit]


def _time(cost: StaticCost, lower_bound: bool) -> str:
    sign = "≥ " if lower_bound or cost.microseconds is None else ""
    return f"{sign}{cost.at_least_microseconds:,.1f}"


def _ratio(row: Row) -> str:
    if row.ratio is None:
        return "–"
    target = row.case.target
    sign = "" if target is None else f" ({'≤' if row.ratio <= target else '> '} {target:g})"
    return f"{row.ratio:.2f}{sign}"


def print_notes(rows: list[Row], out: Console) -> None:
    """Errors, and what the figures leave out: each once, with the cases that it is about."""
    notes: dict[str, list[str]] = {}
    for row in rows:
        for cost in filter(None, (row.ours, row.peer)):
            for note in filter(None, (cost.error, *cost.notes)):
                notes.setdefault(note, []).append(row.case.name)
    for note, names in notes.items():
        out.print(f"{', '.join(dict.fromkeys(names))}: {note}", markup=False, highlight=False)
