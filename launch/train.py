"""Train a model, or several that differ in their position encoding, from one config.

python -m launch.train --config=configs/quickstart.py --workdir=runs/quickstart

The same command goes on where a stopped or killed run left off. Any field of the config can be set:
--config.model.num_layers=8 --config.train.optimizer.learning_rate=3e-4

On a TPU pod, under SLURM or Kubernetes, on all hosts, with a workdir that they share:

python -m launch.train --distributed --config=… --workdir=…
"""

from __future__ import annotations

import sys

from absl import app, flags, logging
from ml_collections import config_flags

from jaxlm.sharding.processes import is_first
from jaxlm.training.train import train
from launch import compare, console, determinism, processes
from launch.overrides import parse, run_of

CONFIG = config_flags.DEFINE_config_file("config", None, "Path of a config file: configs/….py")
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of checkpoints, metrics and results.", required=True
)
ALLOW_CHANGE = flags.DEFINE_bool(
    "allow_config_change", False, "Go on with another config than the workdir's."
)


def main(argv: list[str]) -> None:
    """Trains; a run stopped by a signal ends with status 0."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
    with processes.leaving_on_error(), console.clear_errors(goes_on=True):
        determinism.start()
        processes.start()
        run = run_of(CONFIG.value)
        if run.compare is not None:
            compare.run_comparison(run, WORKDIR.value, ALLOW_CHANGE.value)
        else:
            result = train(run, WORKDIR.value, allow_config_change=ALLOW_CHANGE.value).result
            if result.held_out is not None and is_first():
                console.print_held_out({"this run": result.held_out})


def entry() -> None:
    """The console's entry point."""
    flags.mark_flag_as_required("config")
    logging.set_verbosity(logging.INFO)
    app.run(main, sys.argv, flags_parser=parse)


if __name__ == "__main__":
    entry()
