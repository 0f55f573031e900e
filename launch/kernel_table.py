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
    """One case, compiled: ours, and the peer at each of its settings."""

    case: Case
    ours: StaticCost | None
    peers: tuple[tuple[Kwargs, StaticCost], ...]

    @property
    def peer(self) -> tuple[Kwargs, StaticCost] | None:
        """At its best settings: the least time, be it a bound only."""
        return min(self.peers, key=lambda pair: _rank(pair[1]), default=None)

    @property
    def failed(self) -> bool:
        """What the case is about does not compile."""
        subject = self.ours or (self.peer and self.peer[1])
        return subject is None or not subject.compiles

    @property
    def ratio(self) -> float | None:
        """Our time to the peer's; the largest that it can be if the peer's is a lower bound."""
        ours = self.ours.microseconds if self.ours else None
        peer = self.peer[1] if self.peer else None
        if ours is None or peer is None or not peer.compiles:
            return None
        return ours / peer.at_least_microseconds

    @property
    def ratio_is_upper_bound(self) -> bool:
        """The peer takes longer than its figure."""
        peer = self.peer[1] if self.peer else None
        return self.case.peer_is_lower_bound or (peer is not None and peer.microseconds is None)

    def to_json(self) -> dict[str, Any]:
        """All figures."""
        peers = [{"kwargs": kwargs, **cost.to_json()} for kwargs, cost in self.peers]
        return {
            **dataclasses.asdict(self.case),
            "ours": self.ours.to_json() if self.ours else None,
            "peers": peers,
            "ratio": self.ratio,
            "ratio_is_upper_bound": self.ratio_is_upper_bound,
        }


def compile_case(case: Case, topology: str) -> Row:
    """Ours, and the peer at all of its settings."""
    ours = None
    if case.function is not None:
        ours = measure(case.function, case.kwargs, topology, case.scale)
    peers = []
    if case.peer is not None:
        for kwargs in case.peer_kwargs:
            peers.append((kwargs, measure(case.peer, kwargs, topology, case.scale)))
    return Row(case, ours, tuple(peers))


def _rank(cost: StaticCost) -> tuple[bool, float]:
    return not cost.compiles, cost.at_least_microseconds


def table_of(rows: list[Row], chip: Chip, title: str) -> Table:
    """A line for ours and one for the peer."""
    table = Table(title=title)
    for name in ("kernel", "shape"):
        table.add_column(name)
    for name in ("HBM MiB", "static µs", "of peak", "bundles", "spills (inner)", "busiest unit"):
        table.add_column(name, justify="right")
    for name in ("peer µs", "ratio"):
        table.add_column(name, justify="right")
    for row in rows:
        case, peer = row.case, row.peer
        if row.ours is not None:
            name = (case.function or "").rpartition(":")[2]
            against = [_time(peer[1], case.peer_is_lower_bound) if peer else "", _ratio(row)]
            table.add_row(name, case.shape, *_figures(row.ours, case, chip, False), *against)
        if peer is not None:
            figures = _figures(peer[1], case, chip, case.peer_is_lower_bound)
            table.add_row(f"peer: {_name(case, peer[0])}", case.shape, *figures, "", "")
    return table


def _name(case: Case, kwargs: Kwargs) -> str:
    block = f" {kwargs['block']}" if "block" in kwargs else ""
    return (case.peer or "").rpartition(":")[2] + block


def _figures(cost: StaticCost, case: Case, chip: Chip, lower_bound: bool) -> list[str]:
    if cost.memory is None:
        return ["does not compile", *[""] * 5]
    share, time = "–", cost.microseconds
    if time is not None and not lower_bound:
        share = f"{case.useful_flops / (time * 1e-6 * chip.device_bf16_flops):.0%}"
    largest = cost.largest
    unit = f"{largest.busiest} {largest.use[largest.busiest]:.0%}" if largest else "–"
    bundles = f"{cost.bundles:,}" if cost.kernels else "–"
    spills = f"{cost.spill_stores:,} ({cost.inner_spill_stores:,})" if cost.kernels else "–"
    memory = f"{cost.memory.total / 2**20:,.0f}"
    return [memory, _time(cost, lower_bound), share, bundles, spills, unit]


def _time(cost: StaticCost, lower_bound: bool) -> str:
    sign = "≥ " if lower_bound or cost.microseconds is None else ""
    return f"{sign}{cost.at_least_microseconds:,.1f}"


def _ratio(row: Row) -> str:
    ratio, target = row.ratio, row.case.target
    if ratio is None:
        return "–"
    text = f"{'≤ ' if row.ratio_is_upper_bound else ''}{ratio:.2f}"
    if target is None:
        return text
    return f"{text} (target {target:.2g}{'' if ratio <= target else ', missed'})"


def in_short(row: Row) -> str:
    """A line, for whoever waits for the table."""
    subject = row.ours or (row.peer and row.peer[1])
    if subject is None or not subject.compiles:
        return f"{row.case.name}: does not compile"
    lower_bound = row.ours is None and row.case.peer_is_lower_bound
    return f"{row.case.name}: {_time(subject, lower_bound)} µs, ratio {_ratio(row)}"


def print_notes(rows: list[Row], out: Console) -> None:
    """Errors, and what the figures leave out: each once, with the cases that it is about."""
    notes: dict[str, list[str]] = {}
    for row in rows:
        costs = [(row.case.name, row.ours)] if row.ours else []
        costs += [(f"peer {_name(row.case, k)} of {row.case.name}", cost) for k, cost in row.peers]
        for name, cost in costs:
            for note in filter(None, (cost.error, *cost.notes)):
                notes.setdefault(note, []).append(name)
    for note, names in notes.items():
        out.print(f"{note}\n    {', '.join(names)}", markup=False, highlight=False)
