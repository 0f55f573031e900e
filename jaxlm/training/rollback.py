"""Spikes of the loss: back to before them, and on without their batches.

A run's history is then that of one whose texts lack these batches, and so it is a pure function of
its config: whichever checkpoint a process goes back to or on from, killed or not, it finds the same
spikes at the same steps. What that takes is saved with each step: the latest losses, and after
which steps how many batches were skipped.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

import jax
from absl import logging

from jaxlm.training.config import RollbackConfig
from jaxlm.training.divergence import DivergedError
from jaxlm.training.step import Metrics

ROLLBACK = "rollback"  # in a checkpoint's metadata


class SpikeError(Exception):
    """The loss of a step is a spike.

    Attributes:
        back_to: the step to go on after.
        skipped: as of `SpikeCheck`, this one's batches included.
    """

    def __init__(self, back_to: int, skipped: list[tuple[int, int]]):
        super().__init__(f"back to step {back_to}")
        self.back_to, self.skipped = back_to, skipped


class SpikeCheck:
    """Looks at the loss of each step in turn.

    Args:
        config: None: no loss is a spike.
        saved: metadata of the step that the run goes on from.
        skipped: instead of the saved ones, of a run that has just gone back.

    Attributes:
        skipped: (step, number of batches left out after it), in the order of the spikes.
    """

    def __init__(
        self,
        config: RollbackConfig | None,
        saved: Mapping[str, Any],
        skipped: list[tuple[int, int]] | None = None,
    ):
        found = saved.get(ROLLBACK, {"skipped": [], "losses": []})
        self.skipped = [(s, n) for s, n in found["skipped"]] if skipped is None else skipped
        self._config = config
        self._losses = deque(found["losses"], config.window if config else 0)

    def __call__(self, step: int, metrics: Metrics) -> None:
        """Waits for the metrics of the `step`-th step, and keeps its loss if it is none.

        Raises:
            SpikeError: it is one.
            DivergedError: it is one, and `most` have been before.
        """
        c = self._config
        if c is None or int(jax.device_get(metrics["bad_in_a_row"])):
            return
        loss = float(jax.device_get(metrics["loss"]))
        usual = statistics.median(self._losses) if len(self._losses) == c.window else None
        if usual is None or loss <= c.factor * usual:
            self._losses.append(loss)
            return
        told = (
            f"step {step}: a loss of {loss:.4g}, where the last {c.window} have median {usual:.4g}"
        )
        if len(self.skipped) >= c.most:
            raise DivergedError(
                f"{told}; {len(self.skipped)} such spikes came before (train.rollback.most)."
                " Try a lower learning rate or a longer warm-up."
            )
        # Not to before the last spike: its batches would come again.
        back_to = max(step - c.skip, self.skipped[-1][0] if self.skipped else 0)
        logging.warning("%s; going on after step %d without its batches", told, back_to)
        raise SpikeError(back_to, [*self.skipped, (back_to, step - back_to)])

    def to_dict(self) -> dict[str, Any]:
        """What a step's metadata needs of it; nothing where there are no rollbacks."""
        if self._config is None and not self.skipped:
            return {}
        return {ROLLBACK: {"skipped": self.skipped, "losses": list(self._losses)}}

    def batch_of(self, step: int) -> int:
        """Number of the batch that the step after `step` reads."""
        return step + sum(count for after, count in self.skipped if after <= step)

    def next_skip(self, step: int) -> int | None:
        """The first step from `step` on after which batches are left out; None: there is none."""
        return min((after for after, _ in self.skipped if after > step), default=None)
