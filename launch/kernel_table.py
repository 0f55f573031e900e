"""One row of `launch.compile kernels`: a case compiled, its peer at its best, and the ratio."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from launch.aot.chips import Chip, chip_of
from launch.aot.cost import StaticCost
from launch.aot.process import stop_children
from launch.aot.static_cost import measure
from launch.kernel_cases import Case, Kwargs

Started = Future[StaticCost]


class Figure(NamedTuple):
    """A number, and how it relates to the true static one: "", "≥ ", "≤ " or "≈ "."""

    value: float
    sign: str = ""


def time_of(cost: StaticCost, steps: int | None = None) -> Figure:
    """Microseconds to quote. Where how long it runs is data: its bundles as often as `steps` says,
    shared out over the cores; of kernels that also have a profile that is within 10 % of it.
    """
    if steps is None:
        sign = "" if cost.microseconds is not None else "≥ "
        return Figure(cost.at_least_microseconds, sign)
    chip = chip_of(cost.topology)
    walked = 1e6 * cost.bundles * steps / (chip.clock_hz * chip.cores_per_device)
    return Figure(max(walked, cost.hbm_microseconds or 0), "≈ ")


@dataclasses.dataclass(frozen=True)
class Row:
    """One case, compiled: ours, and the peer at each of its settings."""

    case: Case
    ours: StaticCost | None
    peers: tuple[tuple[Kwargs, StaticCost], ...]

    @property
    def peer(self) -> tuple[Kwargs, StaticCost] | None:
        """At its best settings: the least time, be it a bound only."""
        steps = self.case.peer_steps

        def rank(pair: tuple[Kwargs, StaticCost]) -> tuple[bool, float]:
            return not pair[1].compiles, time_of(pair[1], steps).value

        return min(self.peers, key=rank, default=None)

    @property
    def failed(self) -> bool:
        """What the case is about does not compile."""
        subject = self.ours or (self.peer and self.peer[1])
        return subject is None or not subject.compiles

    @property
    def ratio(self) -> Figure | None:
        """Our time to the peer's; where one of them is a lower bound, a bound too."""
        peer = self.peer[1] if self.peer else None
        if self.ours is None or peer is None or not (self.ours.compiles and peer.compiles):
            return None
        if self.ours.static_microseconds is None:  # its bytes alone say too little
            return None
        ours, time = time_of(self.ours), time_of(peer, self.case.peer_steps)
        if ours.sign:
            return None if time.sign else Figure(ours.value / time.value, ours.sign)
        return Figure(ours.value / time.value, {"≥ ": "≤ "}.get(time.sign, time.sign))

    def to_json(self) -> dict[str, Any]:
        """All figures."""
        peers = [{"kwargs": kwargs, **cost.to_json()} for kwargs, cost in self.peers]
        return {
            **dataclasses.asdict(self.case),
            "ours": self.ours.to_json() if self.ours else None,
            "peers": peers,
            "ratio": self.ratio.value if self.ratio else None,
            "ratio_sign": self.ratio.sign if self.ratio else None,
        }


def compile_cases(
    cases: Sequence[Case], topology: str, jobs: int, profiles: Path | None = None
) -> Iterator[Row]:
    """Each case's row, in their order.

    Args:
        jobs: programs that are compiled at a time; each has processes of its own.
        profiles: see `launch.aot.static_cost.measure`.
    """
    with ThreadPoolExecutor(jobs) as pool:

        @functools.cache  # several cases are compared with one program
        def start(function: str, kwargs: str, scale: str | None, profiled: bool) -> Started:
            given = (function, json.loads(kwargs), topology, scale, profiled)
            return pool.submit(measure, *given, profiles=profiles)

        started = [(case, _start_ours(case, start), _start_peers(case, start)) for case in cases]
        try:
            for case, ours, peers in started:
                known = tuple((kwargs, cost.result()) for kwargs, cost in peers)
                yield Row(case, ours.result() if ours else None, known)
        except BaseException:  # Ctrl-C, and a consumer that wants no more rows
            pool.shutdown(wait=False, cancel_futures=True)
            stop_children()
            raise


def _start_ours(case: Case, start: Callable[..., Started]) -> Started | None:
    if case.function is None:
        return None
    return start(case.function, _text(case.kwargs), case.scale, True)


def _start_peers(case: Case, start: Callable[..., Started]) -> list[tuple[Kwargs, Started]]:
    if case.peer is None:
        return []
    profiled = case.peer_steps is None
    return [(k, start(case.peer, _text(k), case.scale, profiled)) for k in case.peer_kwargs]


def _text(kwargs: Kwargs) -> str:
    return json.dumps(kwargs, sort_keys=True)


def table_of(rows: list[Row], chip: Chip, title: str) -> Table:
    """A line for ours and one for the peer."""
    table = Table(title=title)
    for name in ("kernel", "shape"):
        table.add_column(name)
    for name in ("memory MiB", "moved MiB", "static µs", "of peak"):
        table.add_column(name, justify="right")
    for name in ("bundles", "spills (inner)", "busiest unit", "ratio"):
        table.add_column(name, justify="right")
    for row in rows:
        case, peer = row.case, row.peer
        if row.ours is not None:
            name = (case.function or "").rpartition(":")[2]
            table.add_row(name, case.shape, *_figures(row.ours, case, chip, None), _ratio(row))
        if peer is not None:
            figures = _figures(peer[1], case, chip, case.peer_steps)
            table.add_row(f"peer: {_name(case, peer[0])}", case.shape, *figures, "")
    return table


def _name(case: Case, kwargs: Kwargs) -> str:
    block = f" {kwargs['block']}" if "block" in kwargs else ""
    return (case.peer or "").rpartition(":")[2] + block


def _figures(cost: StaticCost, case: Case, chip: Chip, steps: int | None) -> list[str]:
    if cost.memory is None:
        return ["does not compile", *[""] * 6]
    share, time = "–", time_of(cost, steps)
    if time.sign != "≥ ":
        reached = case.useful_flops / (time.value * 1e-6 * chip.device_bf16_flops)
        share = f"{time.sign}{reached:.0%}"
    largest = cost.largest
    unit = f"{largest.busiest} {largest.use[largest.busiest]:.0%}" if largest else "–"
    bundles = f"{cost.bundles:,}" if cost.kernels else "–"
    spills = f"{cost.spill_stores:,} ({cost.inner_spill_stores:,})" if cost.kernels else "–"
    memory = f"{cost.memory.total / 2**20:,.0f}"
    moved = "–" if cost.hbm_bytes is None else f"{cost.hbm_bytes / 2**20:,.0f}"
    return [memory, moved, _shown(time), share, bundles, spills, unit]


def _shown(time: Figure) -> str:
    return f"{time.sign}{time.value:,.1f}"


def _ratio(row: Row) -> str:
    ratio, target = row.ratio, row.case.target
    if ratio is None:
        return "–"
    text = f"{ratio.sign}{ratio.value:.2f}"
    if target is None:
        return text
    return f"{text} (target {target:.2g}{'' if ratio.value <= target else ', missed'})"


def in_short(row: Row) -> str:
    """A line, for whoever waits for the table."""
    subject, steps = row.ours, None
    if subject is None and row.peer:
        subject, steps = row.peer[1], row.case.peer_steps
    if subject is None or not subject.compiles:
        return f"{row.case.name}: does not compile"
    return f"{row.case.name}: {_shown(time_of(subject, steps))} µs, ratio {_ratio(row)}"


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
