"""The tables: nothing is cut, and a heading is where its bucket ends."""

import sys
from pathlib import Path

import jax
import pytest

from jaxlm.evaluation.loss import HeldOut, LossByPosition
from launch import console
from launch.results import results_folder

NAME = "rope(base=500000.0, scaling=yarn(factor=8.0)) + lm_infinite(window=128, num_sinks=4)"


def curve(length, bucket):
    """The loss of a bucket is the position where it begins."""
    starts = tuple(range(0, length, bucket))
    return LossByPosition(starts, tuple(float(s) for s in starts), length, 1)


def cells(line):
    return [cell.strip() for cell in line.strip("┃│").replace("┃", "│").split("│")]


@pytest.mark.parametrize(
    ("length", "bucket", "ends"),
    [
        (2048, 64, [128, 256, 512, 1024, 2048]),
        (1000, 100, [100, 200, 500, 1000]),  # no bucket ends at 128: the one before it does
        (1000, 300, [300, 1000]),
        (100, 64, [100]),
        (128, 1, [16, 32, 64, 128]),  # an eighth of the trained length, and no less
        (300, 20, [60, 120, 240, 300]),  # half of a column's position at most is averaged
    ],
)
def test_a_column_is_headed_by_the_end_of_its_bucket(capsys, length, bucket, ends):
    console.print_loss_by_position({"rope": curve(length, bucket)}, 128)
    lines = capsys.readouterr().out.splitlines()
    heading = next(cells(x) for x in lines if "model" in x)
    row = next(cells(x) for x in lines if "rope" in x)
    assert heading == ["model", *map(str, ends)]
    begins = [end - (end % bucket or bucket) for end in ends]
    assert row == ["rope", *(f"{b:.3f}" for b in begins)]


@pytest.mark.parametrize(
    ("checkpoint", "output", "folder"),
    [
        ("hub/Qwen2.5-0.5B", None, "runs/Qwen2.5-0.5B"),
        ("files/Qwen2.5-0.5B-Q8_0.gguf", None, "runs/Qwen2.5-0.5B-Q8_0"),
        ("runs/quick", None, "runs/quick"),
        ("runs/quick", "runs/quick/", "runs/quick"),
        ("runs/quick", "out", "out"),
        ("hub/quick", None, None),
        ("hub/Qwen2.5-0.5B", "runs/quick", None),
    ],
)
def test_results_have_a_folder_of_their_own(tmp_path, monkeypatch, checkpoint, output, folder):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/quick/checkpoints").mkdir(parents=True)
    if folder is not None:
        assert results_folder(checkpoint, output) == Path(folder)
        return
    with pytest.raises(ValueError, match="output='runs/quick' is the workdir of another run"):
        results_folder(checkpoint, output)


def test_memory_that_is_not_there_is_one_line(capsys):
    with pytest.raises(SystemExit), console.clear_errors():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: allocating 9 bytes\nmore")
    said = capsys.readouterr().err
    assert said == "error: not enough memory: RESOURCE_EXHAUSTED: allocating 9 bytes\n"
    with pytest.raises(jax.errors.JaxRuntimeError), console.clear_errors():
        raise jax.errors.JaxRuntimeError("INTERNAL: ours to mend")


@pytest.mark.parametrize(
    ("goes_on", "said"),
    [(True, "interrupted; the same command goes on from what is saved"), (False, "interrupted")],
)
def test_what_is_said_of_an_interruption(capsys, goes_on, said):
    with pytest.raises(SystemExit) as stopped, console.clear_errors(goes_on):
        raise KeyboardInterrupt
    assert stopped.value.code == 130 and capsys.readouterr().err == f"\n{said}\n"


def test_nothing_is_cut(capsys, monkeypatch):
    held_out = {NAME: HeldOut(4.5678, 96.33, 0.25, 2.345, 1000)}
    curves = {NAME: curve(2**20, 64), "[alibi]": curve(2**20, 64)}
    monkeypatch.setenv("COLUMNS", "80")
    console.print_held_out(held_out)
    console.print_loss_by_position(curves, 128)
    out = capsys.readouterr().out
    assert "…" not in out and out.count(NAME) == 2 and "[alibi]" in out
    assert all(f" {2**p} " in out for p in range(7, 21))

    # A terminal's width is kept, and what is wider goes on below.
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "dumb")  # no colours
    console.print_held_out(held_out)
    out = capsys.readouterr().out
    assert "…" not in out and max(map(len, out.splitlines())) <= 80
    folded = "".join(cells(x)[0] for x in out.splitlines() if x.startswith("│"))
    assert folded.replace(" ", "") == NAME.replace(" ", "")
