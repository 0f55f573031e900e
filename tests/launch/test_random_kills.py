"""Training killed at random instants: as it starts, restores, trains, saves, and deletes old steps.

pytest -m slow -n 0 tests/launch/test_random_kills.py

makes 200 kills, in some twenty minutes on 2 CPU cores, and prints how many of them were where.
"""

from __future__ import annotations

import dataclasses
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxlm.checkpoints import available_steps
from jaxlm.checkpoints.survey import survey
from tests.launch.processes import Launcher, last_step
from tests.launch.test_train import same_run

# Seconds that a save takes, about.
SAVING = 0.1


def after(begun: Callable[[], bool], seconds: float) -> Callable[[], bool]:
    """Holds from so many seconds after `begun` first held."""
    since: list[float] = []

    def holds() -> bool:
        if not since and begun():
            since.append(time.monotonic())
        return bool(since) and time.monotonic() >= since[0] + seconds

    return holds


def starts(workdir: Path) -> int:
    """How often training began, which writes a file each time after all is restored."""
    return len(list(workdir.glob("tensorboard/*")))


def half_saved(workdir: Path) -> set[int]:
    """Folders that a save, or a deletion, was at work in; they may be gone at any time."""
    if not (workdir / "checkpoints").is_dir():
        return set()
    with os.scandir(workdir / "checkpoints") as found:
        return {entry.inode() for entry in found if entry.name.endswith((".tmp", ".old"))}


@dataclasses.dataclass
class Campaign:
    """Kills one run after the other, each until it is finished.

    A kill falls at a random instant of training, of a save, and of what comes before (the start of
    Python, the restore, the first steps), in turn.

    Attributes:
        training: seconds from the first record of a start within which a kill of the first kind
            falls; `starting`: those before it, as they were last.
        finished: runs that came to their end, each compared with `reference`.
        before, within, kills: that came before training began, within a save, and in all.
    """

    launcher: Launcher
    reference: tuple
    folder: Path
    generator: random.Random
    training: float
    starting: float = 0.0
    finished: int = 0
    before: int = 0
    within: int = 0
    kills: int = 0

    @property
    def workdir(self) -> Path:
        return self.folder / str(self.finished)

    def moment(self, began: int, saved: int, halves: set[int]) -> Callable[[], bool]:
        """When the next kill is due."""
        workdir, begun = self.workdir, time.monotonic()

        def trains() -> bool:
            if starts(workdir) == began or last_step(workdir) <= saved:
                return False
            self.starting = time.monotonic() - begun
            return True

        def saves() -> bool:
            return bool(half_saved(workdir) - halves)

        kinds = (trains, self.training), (saves, SAVING), (lambda: True, self.starting)
        what, seconds = kinds[self.kills % 3]
        return after(what, self.generator.uniform(0, seconds))

    def life(self) -> None:
        """One process, killed unless it is at its end before."""
        workdir = self.workdir
        began, halves = starts(workdir), half_saved(workdir)
        saved = (available_steps(workdir / "checkpoints") or [0])[-1]
        when = self.moment(began, saved, halves)
        ended = self.launcher.stop(workdir, 9, when)
        if ended.returncode == 0:
            self.end()
            return
        assert ended.returncode == -9, ended.stderr
        self.kills += 1
        self.before += starts(workdir) == began
        self.within += bool(half_saved(workdir) - halves)
        # Nothing that was saved is lost, and whatever has a step's name is whole.
        found = [s for s in survey(workdir / "checkpoints", arrays=True) if not s.is_unfinished]
        assert [s.problem for s in found] == [None] * len(found)
        assert saved <= max((s.step for s in found), default=0)

    def end(self) -> None:
        """A finished run is the one that nothing happened to."""
        same_run(self.workdir, self.reference)
        self.finished += 1


@pytest.mark.parametrize("kills", [3, pytest.param(200, marks=pytest.mark.slow)])
def test_the_run_is_the_same(launcher, reference, tmp_path, capsys, kills):
    marks = [reference[0] / f"checkpoints/step_{n:08d}/COMMIT" for n in (30, 40)]
    ten_steps = marks[1].stat().st_mtime - marks[0].stat().st_mtime
    campaign = Campaign(launcher, reference, tmp_path, random.Random(0), 4 * ten_steps)
    began = time.monotonic()
    while campaign.kills < kills:
        campaign.life()
    finished = launcher.train(campaign.workdir)
    assert finished.returncode == 0, finished.stderr
    campaign.end()
    with capsys.disabled():
        print(
            f"\n{kills} kills in {time.monotonic() - began:.0f} s: {campaign.before} before "
            f"training began, {campaign.within} within a save; {campaign.finished} runs finished, "
            "each the same to the bit"
        )
    assert kills < 10 or (campaign.before and campaign.within)
