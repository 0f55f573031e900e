"""python -m launch.evaluate in real processes: figures, files, and what is impossible."""

import dataclasses
import json
import re
import subprocess
import sys

import numpy as np
import pytest

import jaxlm
from jaxlm import caches
from jaxlm.data.documents import long_windows, longest_window
from jaxlm.data.loader import held_out_batches
from tests.marks import slow_but
from tests.training.texts import tiny_run, train_tiny

LAMBDA = "lm_infinite(window=16, num_sinks=2)"
KINDS = ("held_out", "loss_by_position")


def run(launcher, *flags):
    text = f"--text={launcher.texts}/held_out.txt"
    command = [sys.executable, "-m", "launch.evaluate", text, *flags]
    with launcher.popen(command) as process:
        out, err = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def test_two_encodings_of_one_checkpoint(launcher, reference, tmp_path):
    """The text is shorter than the default length."""
    workdir, _ = reference
    before = sorted(workdir.iterdir())
    result = run(
        launcher,
        *(f"--checkpoint={workdir}", f"--output={tmp_path / 'out'}"),
        *("--bucket=50", "--windows=3", "--batch_size=5"),
        *("--position_encoding=rope", f"--position_encoding={LAMBDA}"),
    )
    assert result.returncode == 0, result.stderr
    for what in ("held-out text, rope: batches", f"loss by position, {LAMBDA}: windows"):
        told = [x.removeprefix(what) for x in result.stderr.splitlines() if x.startswith(what)]
        total = re.fullmatch(r": 0/(\d+)", told[0])[1]
        assert re.fullmatch(rf": {total}/{total}, \d+ s", told[-1])
    assert sorted(workdir.iterdir()) == before
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"data", "evaluation.json", "evaluation.png", "evaluation.svg"}
    assert (tmp_path / "out/evaluation.png").stat().st_size > 10_000
    results = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert list(results["held_out"]) == list(results["loss_by_position"]) == ["rope", LAMBDA]
    assert result.stdout.count(LAMBDA) == 2 and "…" not in result.stdout

    model, params, tokenizer = jaxlm.load(workdir)
    source = f"{launcher.texts}/held_out.txt"
    length = longest_window(source, tokenizer)
    assert 1000 < length < 2048
    windows = long_windows(source, tokenizer, length, 3)
    one = model.with_position_encoding(LAMBDA)
    batches, num_bytes = held_out_batches(source, tokenizer, 32, 5, tmp_path / "again")
    held_out = dataclasses.asdict(jaxlm.evaluate(one, params, batches, num_bytes))
    curve = jaxlm.evaluate_loss_by_position(one, params, windows, 50)
    # float32 sums, compiled in two processes
    assert results["held_out"][LAMBDA] == pytest.approx(held_out, rel=1e-5)
    np.testing.assert_allclose(results["loss_by_position"][LAMBDA]["loss"], curve.loss, rtol=1e-5)
    for held_out, by_position in zip(*(results[k].values() for k in KINDS), strict=True):
        assert (by_position["length"], by_position["start"]) == (length, list(curve.start))
        for x in (held_out["loss"], held_out["bits_per_byte"], by_position["loss"][-1]):
            assert f" {x:.3f} " in result.stdout
    assert len({str(one) for one in results["held_out"].values()}) == 2


RING = "ring(window=16, num_sinks=2)"


@pytest.mark.parametrize("kinds", [(RING,), pytest.param(("dense", RING), marks=pytest.mark.slow)])
def test_texts_are_read_through_caches(launcher, reference, tmp_path, kinds):
    """Loss by position and pass keys of each cache; a model of bytes finds none."""
    workdir, _ = reference
    result = run(
        launcher,
        *(f"--checkpoint={workdir}", f"--output={tmp_path}", "--noheld_out", "--bucket=50"),
        *("--length=200", "--windows=2", "--passkey=400", "--samples=2"),
        *(f"--cache={kind}" for kind in kinds),
    )
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "evaluation.json").read_text())
    names = [f"rope, {kind}" for kind in kinds]
    assert found["passkeys"] == {name: {"400": 0.0} for name in names}
    assert list(found["loss_by_position"]) == names
    model, params, tokenizer = jaxlm.load(workdir)
    windows = long_windows(f"{launcher.texts}/held_out.txt", tokenizer, 200, 2)
    for name, kind in zip(names, kinds, strict=True):
        cache = None if kind == "dense" else caches.parse(kind)
        curve = jaxlm.evaluate_loss_by_position(model, params, windows, 50, cache=cache)
        # float32 sums in another order
        np.testing.assert_allclose(found["loss_by_position"][name]["loss"], curve.loss, rtol=1e-4)
    assert result.stdout.count(names[-1]) == 2 and "Pass keys found, of 2" in result.stdout


IMPOSSIBLE = {
    "--cache=rind(window=16)": "cache='rind' (did you mean ring?); allowed: dense",
    "--cache=razor(heads=((9,),),window=64)": "razor: heads",
    "--passkey=40": "length=40; allowed: at least 3",
    "--passkey=400 --cache=paged(page=16,pages=9)": "cache='paged(page=16, pages=9)'; allow",
    "--noheld_out --noloss_by_position": "noloss_by_position and noheld_out; allowed: ",
    "--noloss_by_position --cache=dense": "cache='dense'; allowed: with loss_by_position or",
}
IN_EVERY_RUN = ("--passkey=40", "--noloss_by_position --cache=dense")


@pytest.mark.parametrize("flag", slow_but(IN_EVERY_RUN, IMPOSSIBLE))
def test_what_cannot_be_measured_is_told_at_once(launcher, reference, tmp_path, flag):
    workdir, _ = reference
    flags = [f"--output={tmp_path / 'new'}", *flag.split()]
    result = run(launcher, f"--checkpoint={workdir}", *flags)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith(f"error: {IMPOSSIBLE[flag]}")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_rows_are_no_longer_than_the_text(launcher, tmp_path):
    """Whatever context length a file claims."""
    run_of = tiny_run(launcher.texts, model__context_length=2_000_000_000, train__steps=6)
    train_tiny(run_of, tmp_path, tmp_path / "data")
    result = run(launcher, f"--checkpoint={tmp_path}", "--length=32", "--windows=1")
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found["checkpoint"] == str(tmp_path)
    (held_out,) = found["held_out"].values()
    text = (launcher.texts / "held_out.txt").read_bytes()
    assert held_out["tokens"] == len(text) + 1  # of bytes, with an end


@pytest.mark.slow
def test_a_table_of_positions_ends_the_default_length(launcher, tmp_path):
    short = tiny_run(launcher.texts, model__position_encoding="learned", train__steps=6)
    train_tiny(short, tmp_path, tmp_path / "data")
    (tmp_path / "loss_by_position.png").write_text("of a comparison")
    result = run(launcher, f"--checkpoint={tmp_path}", "--bucket=8")
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "evaluation.json").read_text())["loss_by_position"] == {
        "learned(table_length=32)": {
            "start": [0, 8, 16, 24],
            "loss": pytest.approx([5, 5, 5, 5], abs=3),
            "length": 32,
            "windows": 8,
        }
    }
    assert (tmp_path / "loss_by_position.png").read_text() == "of a comparison"
    asked = run(launcher, f"--checkpoint={tmp_path}", "--length=33")
    assert asked.returncode == 1
    assert asked.stdout == ""  # before anything is measured
    assert asked.stderr.startswith("error: length=33; allowed: at most 32 with position_encoding=l")
    assert asked.stderr.count("\n") == 1


PARSE = """
import sys
from absl import flags
import launch.evaluate
for flag in sys.argv[1:]:
    try:
        flags.FLAGS(["launch.evaluate", "--checkpoint=absent", flag])
    except flags.IllegalFlagValueError as error:
        print(error)
"""


def test_numbers_below_1_are_refused(launcher):
    result = run(launcher, "--checkpoint=absent", "--length=-5")
    assert result.returncode == 1 and result.stdout == ""
    assert "flag --length=-5: -5 is not a positive integer" in result.stderr.splitlines()[0]


@pytest.mark.slow
def test_no_number_may_be_below_1():
    bad = ["--length=0", "--bucket=0", "--windows=-1", "--batch_size=0"]
    parsed = subprocess.run(
        [sys.executable, "-c", PARSE, *bad], capture_output=True, text=True, check=True
    )
    errors = [f"flag {b}: {b.partition('=')[2]} is not a positive integer" for b in bad]
    assert parsed.stdout.splitlines() == errors
