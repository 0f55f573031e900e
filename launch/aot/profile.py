"""What libtpu writes about its own schedule: static cycles of operations, bundles of kernels."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

_ESTIMATE = re.compile(r'hlo_op_name: "([^"]+)"\s+estimated_cycles: (\d+)')
_UTILIZATION_FILE = re.compile(r"(\d+-(.+)-)\d+-.*static-per-bundle-utilization\.txt")
_BUNDLE = re.compile(r" *(?:0x[0-9a-f]+|0) +(?:[A-Z]{2})? *: *(>*) *\{", re.MULTILINE)
# Parts of VLOAD and VSTORE: registers that did not suffice.
FILL, SPILL = "VLOAD:FILL", "VSTORE:SPILL"


def cycle_flags(folder: Path, only: str | None = None) -> list[str]:
    """Of libtpu, to have it profile its schedule: of all operations, or of one. It aborts on some
    kernels, and knows no v4.
    """
    flags = [f"--xla_jf_dump_static_llo_profile_to={folder}"]
    return flags if only is None else [*flags, f"--xla_jf_dump_only_matching_hlo={only}"]


def bundle_flags(folder: Path) -> list[str]:
    """Of libtpu, to have it dump the use of its units."""
    return [
        f"--xla_jf_dump_to={folder}",
        "--xla_jf_dump_llo_text=true",
        "--xla_jf_dump_llo_pass_label_regex=.*final.*",
    ]


@dataclasses.dataclass(frozen=True)
class Bundles:
    """The instruction words of one operation, each counted once however often it runs.

    Attributes:
        count: how many.
        spill_stores: vector registers stored because there are too few.
        spill_fills: the same, loaded back.
        inner_spill_stores: those of the innermost loops.
        use: share of a unit's slots that are filled, by unit.
    """

    count: int
    spill_stores: int
    spill_fills: int
    inner_spill_stores: int
    use: dict[str, float]

    @property
    def busiest(self) -> str:
        """The unit with the largest share."""
        return max(self.use, key=lambda unit: self.use[unit])


def read_cycles(folder: Path) -> dict[str, int]:
    """Cycles of each operation that has been profiled."""
    cycles: dict[str, int] = {}
    for path in sorted(folder.glob("*static_llo_profile.textproto")):
        cycles |= parse_cycles(path.read_text())
    return cycles


def parse_cycles(text: str) -> dict[str, int]:
    """Of one profile."""
    return {name: int(cycles) for name, cycles in _ESTIMATE.findall(text)}


def read_bundles(folder: Path) -> dict[str, Bundles]:
    """Bundles of each operation that has been dumped."""
    bundles = {}
    for path in sorted(folder.iterdir()):
        name = _UTILIZATION_FILE.fullmatch(path.name)
        if name:
            (text,) = (p for p in folder.glob(f"{name[1]}*_bundles.txt") if _is_schedule(p))
            bundles[name[2]] = parse_utilization(path.read_text(), parse_depths(text.read_text()))
    return bundles


def _is_schedule(path: Path) -> bool:
    return re.fullmatch(r".*-\d+-final_bundles\.txt", path.name) is not None


def parse_depths(text: str) -> list[int]:
    """How many loops are around each bundle of a schedule; the grid of a kernel is one."""
    return [len(marks) for marks in _BUNDLE.findall(text)]


def parse_utilization(text: str, depths: list[int]) -> Bundles:
    """Of a file with one row a bundle: how many slots of each unit it fills."""
    lines = [line.split() for line in text.replace(",", " ").splitlines() if line.strip()]
    units, capacity = lines[1], [int(slots) for slots in lines[2]]
    rows = [[int(filled) for filled in line] for line in lines[4:]]
    filled = dict(zip(units, map(sum, zip(*rows, strict=True)), strict=True))
    slots = {unit: n * len(rows) for unit, n in zip(units, capacity, strict=True)}
    use = {u: filled[u] / slots[u] for u in units if u not in (FILL, SPILL)}
    spills = [row[units.index(SPILL)] for row in rows]
    inner = sum(n for n, depth in zip(spills, depths, strict=True) if depth == max(depths))
    return Bundles(len(rows), filled[SPILL], filled[FILL], inner, use)
