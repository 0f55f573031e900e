"""launch.checkpoint: what a person sees of saved steps, and the exit status."""

import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from safetensors.numpy import load_file

from jaxlm.checkpoints import Saver, tree_digest
from jaxlm.checkpoints.difference import distance
from jaxlm.checkpoints.layout import step_folder
from launch import checkpoint
from tests.checkpoints.states import state_at


@pytest.fixture
def said(capsys):
    """Runs a command: its exit status, and what it said."""
    flags.FLAGS.mark_as_parsed()

    def run(*arguments, prefix=""):
        with flagsaver.flagsaver(prefix=prefix), pytest.raises(SystemExit) as end:
            checkpoint.main(["checkpoint", *map(str, arguments)])
        out, err = capsys.readouterr()
        return end.value.code, out + err

    return run


@pytest.fixture
def workdir(tmp_path):
    """Steps 1 and 2, and a save of step 3 that was killed."""
    directory = tmp_path / "run" / "checkpoints"
    with Saver(directory) as saver:
        for step in (1, 2):
            saver.save(step, state_at(step), metadata={"seed": step, "of": "a test"})
    step_folder(directory, 3).with_suffix(".tmp").mkdir()
    return directory.parent


def damage(workdir, step, leaf="params.dense.kernel"):
    """Flips a bit of an array."""
    (chunk,) = step_folder(workdir / "checkpoints", step).glob(f"state/{leaf}/0*")
    content = bytearray(chunk.read_bytes())
    content[5] ^= 1
    chunk.write_bytes(bytes(content))


def test_ls_has_a_row_a_step_and_says_what_is_bad(said, workdir):
    (step_folder(workdir / "checkpoints", 1) / "COMMIT").unlink()
    status, text = said("ls", workdir)
    first, second, third = [line for line in text.splitlines() if line.startswith("│")]
    assert status == 0
    assert "no COMMIT marker" in first and "whole" in second and "unfinished" in third
    assert said("ls", workdir / "checkpoints") == (0, text)


def test_show_has_every_leaf_with_its_digest(said, workdir):
    status, text = said("show", f"{workdir}@1")
    assert status == 0 and '"seed": 1' in text
    digests = tree_digest(state_at(1))
    assert digests["whole"] in text
    for name, digest in digests["leaves"].items():
        (line,) = [line for line in text.splitlines() if f" {name} " in line]
        assert digest[:12] in line


def test_verify_reads_every_step_or_one(said, workdir):
    assert said("verify", workdir)[0] == 0
    damage(workdir, 1)
    status, text = said("verify", workdir)
    assert status == 1
    bad, good = text.splitlines()
    assert bad == "step 1: bad: params/dense/kernel: SHA-256 differs"
    assert good.startswith("step 2: good")
    assert said("verify", f"{workdir}@2")[0] == 0


def test_diff_names_what_differs_by_how_much(said, workdir):
    assert said("diff", f"{workdir}@2", workdir)[0] == 0  # the newest good one
    status, text = said("diff", f"{workdir}@1", f"{workdir}@2")
    assert status == 1
    assert "metadata.seed: 1 in the first, 2 in the second" in text
    assert "step: 1 of 1 numbers differ, by up to 1\n" in text
    assert "keys" in text and "minus_zero" not in text and "metadata.of" not in text


def test_diff_of_two_models(said, workdir, tmp_path):
    other = tmp_path / "other"
    with Saver(other) as saver:
        saver.save(2, state_at(2, width=32) | {"more": jnp.zeros(3)})
    _, text = said("diff", workdir, other)
    assert "params/dense/kernel: float32[4, 64] in the first, float32[4, 32] in the second" in text
    assert "more: absent in the first, float32[3] in the second" in text


def test_diff_names_other_files_and_refuses_damage(said, workdir, tmp_path):
    other, state = tmp_path / "other", state_at(2)
    state["params"]["dense"]["kernel"] += 1
    with Saver(other / "checkpoints") as saver:
        saver.save(2, state, files={"tokenizer/more.json": b"{}"})
    status, text = said("diff", workdir, other)
    assert status == 1 and "tokenizer/more.json: absent in the first, 44136fa3" in text
    damage(other, 2)
    status, text = said("diff", workdir, other)
    assert status == 2 and "one of them is damaged" in text


def test_verify_of_no_step(said, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    status, text = said("verify", tmp_path)
    assert status == 2 and "has no step" in text


def test_distance_is_by_bits():
    left = np.array([1, np.nan, 0.0, np.inf], np.float32)
    right = np.array([1, np.nan, -0.0, 2], np.float32)
    assert distance(left, right) == "2 of 4 numbers differ, by up to 0"
    bits = [x.astype(jnp.bfloat16) for x in (left, left + 1)]
    assert distance(*bits) == "2 of 4 numbers differ, by up to 1"


def test_export_is_the_same_bytes(said, workdir, tmp_path):
    target = tmp_path / "params.safetensors"
    assert said("export", f"{workdir}@1", target, prefix="params")[0] == 0
    arrays = load_file(target)
    want = state_at(1)["params"]
    assert arrays.keys() == {"dense/kernel", "dense/bias", "minus_zero", "nan"}
    np.testing.assert_array_equal(arrays["dense/bias"], want["dense"]["bias"])
    assert arrays["dense/kernel"].tobytes() == np.asarray(want["dense"]["kernel"]).tobytes()
    status, text = said("export", workdir, target)
    assert status == 2 and "allowed: a new file" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "RUN@7"), r"has no step 7; allowed: [1, 2]"),
        (("verify", "RUN@7"), r"has no step 7; allowed: [1, 2]"),
        (("ls", "RUN/absent"), "is absent; allowed:"),
        (("export", "RUN", "RUN/x.npz"), "allowed: a new file NAME.safetensors"),
    ],
)
def test_what_is_not_there(said, workdir, arguments, message):
    status, text = said(*(a.replace("RUN", str(workdir)) for a in arguments))
    assert status == 2 and message in text and text.count("\n") == 1


def test_no_good_step_lists_each(said, workdir):
    for step in (1, 2):
        (step_folder(workdir / "checkpoints", step) / "COMMIT").unlink()
    status, text = said("show", workdir)
    assert status == 2 and "step 1: no COMMIT" in text and "step 2: no COMMIT" in text


def test_a_flag_that_would_do_nothing(said, workdir):
    status, text = said("ls", workdir, prefix="params")
    assert (status, text) == (2, "error: prefix='params'; allowed: with export alone\n")
