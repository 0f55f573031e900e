"""Steps that were skipped because their loss or gradient was not finite."""

from __future__ import annotations

import dataclasses

import jax
from absl import logging

from jaxlm.checkpoints import Saver, available_steps
from jaxlm.training.step import Metrics


class DivergedError(RuntimeError):
    """Too many steps in a row without a finite loss; the text says where the run can go on."""


@dataclasses.dataclass(frozen=True)
class FiniteCheck:
    """Says which steps were skipped, and ends the run after too many in a row.

    Attributes:
        most: `train.max_bad_steps`.
        data_seed: names the batch, together with the step.
        saver: knows the saved steps.
    """

    most: int
    data_seed: int
    saver: Saver

    def __call__(self, step: int, metrics: Metrics) -> int:
        """How many steps in a row, up to the `step`-th, were bad; waits for its metrics.

        Raises:
            DivergedError: it was the last of `most` bad steps in a row.
        """
        in_a_row = int(jax.device_get(metrics["bad_in_a_row"]))
        if not in_a_row:
            return 0
        batch = f"data seed {self.data_seed}, step {step - 1}"
        logging.warning("step %d: loss or gradient not finite, skipped (batch: %s)", step, batch)
        if in_a_row >= self.most:
            self.saver.wait()  # for the step that is being written, if any
            good = available_steps(self.saver.directory)
            raise DivergedError(
                f"step {step}: the loss or gradient of the last {in_a_row} steps is not finite "
                f"(last batch: {batch}); parameters are unchanged since step {step - in_a_row}; "
                f"last good checkpoint: {f'step {good[-1]}' if good else 'none'}. "
                "Try a lower learning rate or a longer warm-up."
            )
        return in_a_row
