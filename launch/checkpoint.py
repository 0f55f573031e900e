"""What a run has saved: its steps, their contents, whether they are whole, and how two differ.

python -m launch.checkpoint ls runs/mine
python -m launch.checkpoint show runs/mine@1000
python -m launch.checkpoint verify runs/mine
python -m launch.checkpoint diff runs/mine@1000 runs/other@1000
python -m launch.checkpoint export runs/mine state.safetensors --prefix=params

A path is a workdir, or a folder of steps; without @STEP the newest good step is meant, by `verify`
every step. Exit status: 1 where `verify` finds a bad step or `diff` a difference, 2 for an error.
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import app, flags
from rich.console import Console
from rich.table import Table

from jaxlm.checkpoints.difference import step_differences
from jaxlm.checkpoints.layout import step_folders
from jaxlm.checkpoints.leaves import named_leaves
from jaxlm.checkpoints.manifest import BadStepError
from jaxlm.checkpoints.restore import restore
from jaxlm.checkpoints.survey import Survey, survey, survey_step
from jaxlm.interop.write import write_tensors
from jaxlm.load import run_folder
from jaxlm.training.workdir import CHECKPOINTS
from launch import console

PREFIX = flags.DEFINE_string(
    "prefix", "", "With export: the part of the state below this path, such as params."
)
OUT = Console(width=console.WIDEST, markup=False, emoji=False)


def steps_folder(path: Path) -> Path:
    """The folder of steps that `path` is, or that its run has.

    Raises:
        FileNotFoundError: it is neither.
    """
    if step_folders(path):
        return path
    return run_folder(path) / CHECKPOINTS


def split_step(text: str) -> tuple[Path, int | None]:
    """PATH@STEP as both; a path that is there is taken as it is."""
    path, _, step = text.rpartition("@")
    if path and step.isdecimal() and not Path(text).exists():
        return Path(path), int(step)
    return Path(text), None


def good_step(text: str) -> Survey:
    """The step that PATH@STEP names, or the newest good one of PATH.

    Raises:
        FileNotFoundError: there is none; with a line for each that is bad.
    """
    path, step = split_step(text)
    directory = steps_folder(path)
    folders = step_folders(directory)
    if step is not None:
        if step not in folders:
            raise FileNotFoundError(f"{directory} has no step {step}; allowed: {list(folders)}")
        folders = {step: folders[step]}
    bad = []
    for number in sorted(folders, reverse=True):
        found = survey_step(number, folders[number], arrays=False)
        if found.problem is None:
            return found
        bad.append(f"step {number}: {found.problem}")
    raise FileNotFoundError("\n".join([f"{directory} has no good step", *bad]))


def list_steps(path: str) -> int:
    """A row a step; arrays are not read."""
    directory = steps_folder(Path(path))
    table = Table("step", "saved", "MiB", "leaves", "state", title=str(directory))
    for found in survey(directory, arrays=False):
        leaves = "" if found.manifest is None else str(len(found.manifest.leaves))
        state = found.problem or "whole, by its files' sizes"
        size = f"{found.nbytes / 2**20:,.1f}"
        table.add_row(str(found.step), _when(found.saved_at), size, leaves, state)
    OUT.print(table)
    return 0


def show(text: str) -> int:
    """Leaves, versions and metadata of one step."""
    found = good_step(text)
    manifest = found.manifest
    assert manifest is not None
    table = Table("leaf", "dtype", "shape", "MiB", "SHA-256", title=str(found.folder))
    for name, spec in sorted(manifest.leaves.items()):
        digest = manifest.leaf_digests[name][:12]
        size = f"{spec.nbytes / 2**20:,.3f}"
        table.add_row(name, spec.prng or spec.dtype, str(list(spec.shape)), size, digest)
    OUT.print(table)
    OUT.print(f"step {found.step}, saved {_when(found.saved_at)}, SHA-256 {manifest.digest}")
    OUT.print("written with " + ", ".join(f"{k} {v}" for k, v in manifest.versions.items()))
    OUT.print(json.dumps(manifest.metadata, indent=1, sort_keys=True))
    return 0


def verify(text: str) -> int:
    """Reads all arrays of one step or of every one, and checks each SHA-256."""
    path, step = split_step(text)
    directory = steps_folder(path)
    folders = step_folders(directory)
    if step is not None and step not in folders:
        raise FileNotFoundError(f"{directory} has no step {step}; allowed: {list(folders)}")
    if not folders:
        raise FileNotFoundError(f"{directory} has no step")
    bad = 0
    for number in sorted(folders) if step is None else [step]:
        began = time.perf_counter()
        found = survey_step(number, folders[number], arrays=True)
        took = time.perf_counter() - began
        if found.problem is not None:
            gone = not folders[number].is_dir()  # by a run that goes on
            bad += not gone
            OUT.print(f"step {number}: {'deleted meanwhile' if gone else 'bad: ' + found.problem}")
            continue
        rate = found.nbytes / 2**20 / took
        size = f"{found.nbytes / 2**20:,.1f} MiB in {took:.2f} s ({rate:,.0f} MiB/s)"
        OUT.print(f"step {number}: good, every SHA-256 as saved, {size}")
    return int(bad > 0)


def diff(first: str, second: str) -> int:
    """A line a difference of two steps."""
    steps = [good_step(text) for text in (first, second)]
    pairs = []
    for found in steps:
        assert found.manifest is not None
        pairs.append((found.folder, found.manifest))
        OUT.print(f"{found.folder}: SHA-256 {found.manifest.digest}")
    different = 0
    try:
        for line in step_differences(*pairs):
            different += 1
            OUT.print(line)
    except BadStepError as error:
        raise ValueError(f"one of them is damaged (`verify` says which): {error}") from error
    if not different:
        OUT.print("equal, to the bit, by the SHA-256s that were saved")
    return int(different > 0)


def export(text: str, output: str) -> int:
    """One step's arrays as one safetensors file, each under its path."""
    target = Path(output)
    if target.exists() or target.suffix != ".safetensors":
        raise ValueError(f"output={output!r}; allowed: a new file NAME.safetensors")
    found = good_step(text)
    restored = restore(found.folder.parent, step=found.step, prefix=PREFIX.value)
    arrays = named_leaves(restored.state)
    try:
        write_tensors(target, arrays)
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    size = sum(array.nbytes for array in arrays.values()) / 2**20
    OUT.print(f"{output}: {len(arrays)} arrays of step {found.step}, {size:,.1f} MiB")
    return 0


COMMANDS: dict[str, tuple[Callable[..., int], Sequence[str]]] = {
    "ls": (list_steps, ["PATH"]),
    "show": (show, ["PATH[@STEP]"]),
    "verify": (verify, ["PATH[@STEP]"]),
    "diff": (diff, ["PATH[@STEP]", "PATH[@STEP]"]),
    "export": (export, ["PATH[@STEP]", "FILE.safetensors"]),
}


def _when(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return datetime.datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")


def main(argv: list[str]) -> None:
    """Runs one of the commands."""
    command, arguments = COMMANDS.get(argv[1] if len(argv) > 1 else ""), argv[2:]
    if command is None or len(arguments) != len(command[1]):
        usage = "; ".join(" ".join([name, *wanted]) for name, (_, wanted) in COMMANDS.items())
        raise app.UsageError(f"allowed: {usage}")
    try:
        with console.clear_errors():
            if PREFIX.value and argv[1] != "export":
                raise ValueError(f"prefix={PREFIX.value!r}; allowed: with export alone")
            status = command[0](*arguments)
    except SystemExit as error:  # as diff(1): 1 is an answer, not a failure
        raise SystemExit(2 if error.code == 1 else error.code) from error
    raise SystemExit(status)


if __name__ == "__main__":
    app.run(main)
