"""What programs cost on TPUs that are not there, by the compiler's own figures: our kernels, which
are also held to plain jnp in TPU interpret mode, and the training step and the decoding of a config
on a pod.

python -m launch.compile kernels --topology=v5e:2x2
python -m launch.compile kernels --topology=v5p:2x2x1 --only=forward --output=kernels.json
python -m launch.compile kernels --topology=v6e:2x2 --profiles=runs/profiles    # hours: goes on
python -m launch.compile train --topology=v5e:16x16 --config=configs/llama3_8b.py \
    --config.mesh.fsdp=256
python -m launch.compile decode --topology=v5e:2x4 --config=configs/llama3_8b.py \
    --config.mesh.tensor=8 --rows=16 --length=8192 --cache='quantized(bits=8)'

Needs libtpu: pip install -e '.[tpu]', or '.[tpu,peers]' to compare with tokamax too. Another build
of libtpu than the installed one is used if TPU_LIBRARY_PATH names its libtpu.so.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from ml_collections import config_flags
from rich.console import Console

from jaxlm.data.optional import MissingPackageError
from jaxlm.training.run import RunConfig
from launch import console
from launch.aot.chips import chip_of
from launch.aot.pod import PodCost
from launch.aot.static_cost import describe
from launch.aot.topology import environment
from launch.compile_decode import Batch, compile_decode, print_decode
from launch.compile_train import compile_train, print_train
from launch.kernel_cases import select
from launch.kernel_table import Row, compile_cases, in_short, print_notes, table_of
from launch.overrides import parse, run_of

TOPOLOGY = flags.DEFINE_string("topology", "v5e:2x2", "Generation and grid of chips.")
ONLY = flags.DEFINE_string("only", None, "Cases whose name contains this.")
QUICK = flags.DEFINE_bool("quick", False, "The first case of each group.")
JOBS = flags.DEFINE_integer(
    "jobs", os.cpu_count() or 1, "Programs compiled at a time; each takes a core.", lower_bound=1
)
OUTPUT = flags.DEFINE_string("output", None, "File of all figures as JSON, as they come.")
PROFILES = flags.DEFINE_string(
    "profiles",
    None,
    "With kernels: folder of the cycles that are found. What is there is not profiled again.",
)
CONFIG = config_flags.DEFINE_config_file(
    "config", None, "With train and decode: a config, configs/….py"
)

ROWS = flags.DEFINE_integer("rows", 8, "With decode: prompts.", lower_bound=1)
LENGTH = flags.DEFINE_integer(
    "length", None, "With decode: tokens of a prompt; else the config's.", lower_bound=1
)
CACHE = flags.DEFINE_string("cache", "dense", "With decode: a KV cache.")

HONEST = (
    "These are the compiler's static estimates, not measured times: scheduled cycles or the HBM "
    "traffic at full bandwidth, whichever takes longer."
)
BOUNDS = (
    "Memory and exchanges are the compiler's; times are bounds from them and from public peaks, "
    "not measured. What is computed anew in the backward pass is not in the arithmetic."
)
WIDTH = 150  # where output is no terminal


def compile_kernels() -> bool:
    """Prints the tables and writes JSON; whether all kernels agree and all cases compile."""
    topology = TOPOLOGY.value
    chip, cases = chip_of(topology), select(ONLY.value, QUICK.value)
    agree = kernels_agree(sorted(set[str]().union(*(case.kernels for case in cases))))
    about = describe(topology)
    rows: list[Row] = []
    began = time.monotonic()
    profiles = None if PROFILES.value is None else Path(PROFILES.value)
    for number, row in enumerate(compile_cases(cases, topology, JOBS.value, profiles), 1):
        rows.append(row)
        minutes = (time.monotonic() - began) / 60
        line = f"{number}/{len(cases)} {in_short(row)} [{minutes:.1f} min]"
        print(line, file=sys.stderr, flush=True)
        if OUTPUT.value is not None:  # after each: a stopped run keeps what it has found
            write(Path(OUTPUT.value), topology, about["compiler"], rows)
    out = console_of_tables()
    out.print(table_of(rows, chip, f"{topology}, libtpu: {about['compiler']}"))
    print_notes(rows, out)
    out.print(HONEST, highlight=False)
    return agree and not any(row.failed for row in rows)


def kernels_agree(kernels: Sequence[str]) -> bool:
    """Prints the table of agreement of these kernels."""
    if not kernels:  # all cases are others' alone
        return True
    # XLA takes longer to optimize programs as small as these than they take to run.
    flags = "--xla_backend_optimization_level=0 --xla_disable_hlo_passes=constant_folding"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    env = environment({**os.environ, "XLA_FLAGS": flags})
    command = [sys.executable, "-m", "launch.kernel_agreement", *kernels]
    return subprocess.run(command, env=env, check=False).returncode == 0


def write(path: Path, topology: str, compiler: str, rows: list[Row]) -> None:
    """All figures as JSON."""
    chip = chip_of(topology)
    results = {
        "topology": topology,
        "compiler": compiler,
        "jax": jax.__version__,
        "chip": {**dataclasses.asdict(chip), "clock_hz": chip.clock_hz},
        "note": HONEST,
        "cases": [row.to_json() for row in rows],
    }
    path.write_text(json.dumps(results, indent=1) + "\n")


def run_of_config() -> RunConfig:
    """Of --config."""
    if CONFIG.value is None:
        raise ValueError("config is absent; allowed: a config file: configs/….py")
    return run_of(CONFIG.value)


def compile_training() -> bool:
    """Prints what a training step takes on a pod and writes JSON; whether it fits."""
    run = run_of_config()
    cost, found = compile_train(run, TOPOLOGY.value)
    out = console_of_tables()
    print_train(run, cost, found, out)
    return close_run(found, [cost], out)


def compile_decoding() -> bool:
    """The same of reading prompts and of a step of decoding."""
    run = run_of_config()
    batch = Batch(ROWS.value, LENGTH.value or run.data.sequence_length, CACHE.value)
    costs, found = compile_decode(run, TOPOLOGY.value, batch)
    out = console_of_tables()
    print_decode(costs, found, out)
    return close_run(found, list(costs.values()), out)


def console_of_tables() -> Console:
    """As wide as they are, where output is no terminal."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=WIDTH)


def close_run(found: dict[str, Any], costs: list[PodCost], out: Console) -> bool:
    """Says what the figures are, writes them; whether all fit."""
    out.print(BOUNDS, highlight=False)
    if OUTPUT.value is not None:
        Path(OUTPUT.value).write_text(json.dumps(found, indent=1) + "\n")
    return all(cost.fits for cost in costs)


COMMANDS = {"kernels": compile_kernels, "train": compile_training, "decode": compile_decoding}


def main(argv: list[str]) -> None:
    """Exit status 1 if a kernel does not agree, or what is compiled does not, or does not fit."""
    if len(argv) != 2 or argv[1] not in COMMANDS:
        raise app.UsageError(f"say what to compile: {' or '.join(COMMANDS)}")
    with console.clear_errors():
        if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
            raise MissingPackageError("compiling for TPUs needs libtpu: pip install -e '.[tpu]'")
        good = COMMANDS[argv[1]]()
    if not good:
        raise SystemExit(1)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
