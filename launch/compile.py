"""What our kernels cost on TPUs, by the compiler's own figures, and that they agree with plain jnp
in TPU interpret mode: no TPU is needed.

python -m launch.compile kernels --topology=v5e:2x2
python -m launch.compile kernels --topology=v5p:2x2x1 --only=forward --output=kernels.json

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

import jax
from absl import app, flags
from rich.console import Console

from jaxlm.data.optional import MissingPackageError
from launch import console
from launch.aot.chips import chip_of
from launch.aot.static_cost import describe
from launch.aot.topology import environment
from launch.kernel_cases import select
from launch.kernel_table import Row, compile_cases, in_short, print_notes, table_of

TOPOLOGY = flags.DEFINE_string("topology", "v5e:2x2", "Generation and grid of chips.")
ONLY = flags.DEFINE_string("only", None, "Cases whose name contains this.")
QUICK = flags.DEFINE_bool("quick", False, "The first case of each group.")
JOBS = flags.DEFINE_integer(
    "jobs", os.cpu_count() or 1, "Programs compiled at a time; each takes a core.", lower_bound=1
)
OUTPUT = flags.DEFINE_string("output", None, "File of all figures as JSON, as they come.")

HONEST = (
    "These are the compiler's static estimates, not measured times: scheduled cycles or the HBM "
    "traffic at full bandwidth, whichever takes longer."
)
WIDTH = 150  # where output is no terminal


def compile_kernels() -> bool:
    """Prints the tables and writes JSON; whether all kernels agree and all cases compile."""
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise MissingPackageError("compiling for TPUs needs libtpu: pip install -e '.[tpu]'")
    topology = TOPOLOGY.value
    chip, cases = chip_of(topology), select(ONLY.value, QUICK.value)
    agree = kernels_agree(sorted(set[str]().union(*(case.kernels for case in cases))))
    about = describe(topology)
    rows: list[Row] = []
    began = time.monotonic()
    for number, row in enumerate(compile_cases(cases, topology, JOBS.value), 1):
        rows.append(row)
        minutes = (time.monotonic() - began) / 60
        line = f"{number}/{len(cases)} {in_short(row)} [{minutes:.1f} min]"
        print(line, file=sys.stderr, flush=True)
        if OUTPUT.value is not None:  # after each: a stopped run keeps what it has found
            write(Path(OUTPUT.value), topology, about["compiler"], rows)
    terminal = Console()
    out = terminal if terminal.is_terminal else Console(width=WIDTH)
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


def main(argv: list[str]) -> None:
    """Exit status 1 if a kernel does not agree or a case does not compile."""
    if argv[1:] != ["kernels"]:
        raise app.UsageError("say what to compile: kernels")
    with console.clear_errors():
        good = compile_kernels()
    if not good:
        raise SystemExit(1)


if __name__ == "__main__":
    app.run(main)
