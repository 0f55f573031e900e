"""The comparison of position encodings: stopped in its second run, started again, and again."""

import json
import signal

import pytest

import jaxlm
from jaxlm.checkpoints import available_steps
from tests.launch.processes import TINY, last_step, what_a_run_determines


def checkpoint_times(workdir):
    found = {p: p.stat().st_mtime_ns for p in workdir.glob("*/checkpoints/*/**/*")}
    assert len(found) > 100
    return found


def test_comparison(launcher, tmp_path):
    config = f"{TINY}:{launcher.texts},compare"
    stopped = launcher.stop(
        tmp_path, signal.SIGTERM, lambda: last_step(tmp_path / "alibi") >= 15, config
    )
    assert stopped.returncode == 0, stopped.stderr
    assert "stopped by SIGTERM at step " in stopped.stderr
    assert not (tmp_path / "results.json").exists()
    assert 15 <= available_steps(tmp_path / "alibi/checkpoints")[-1] < 40

    finished = launcher.train(tmp_path, config)
    assert finished.returncode == 0, finished.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["held_out"]) == ["rope", "alibi"]
    assert list(results["loss_by_position"]) == [
        "rope",
        "alibi",
        "rope + lm_infinite(num_sinks=2)",
    ]
    assert (tmp_path / "loss_by_position.png").stat().st_size > 10_000
    for name in results["held_out"]:
        records = what_a_run_determines(tmp_path / name)
        losses = [r["step"] for r in records if "loss" in r]
        assert losses == list(range(5, 41, 5))
        assert results["held_out"][name]["loss"] == records[-1]["held_out_loss"]
    model, _, _ = jaxlm.load(tmp_path)
    assert str(model.config.encoding).startswith("rope")

    # Again: nothing is trained, nothing is written twice, the results are the same.
    before = checkpoint_times(tmp_path)
    again = launcher.train(tmp_path, config)
    assert again.returncode == 0, again.stderr
    assert checkpoint_times(tmp_path) == before
    assert json.loads((tmp_path / "results.json").read_text()) == results
    for name in results["held_out"]:
        assert len(what_a_run_determines(tmp_path / name)) == 11


@pytest.mark.parametrize(
    ("encodings", "message"),
    [
        pytest.param("('rope','alibbi')", "alibbi", marks=pytest.mark.slow),
        ("('alibi','nope')", "'rope' is not trained; allowed: alibi, nope"),
    ],
)
def test_a_bad_encoding_is_refused_before_anything_is_trained(
    launcher, tmp_path, encodings, message
):
    config = f"{TINY}:{launcher.texts},compare"
    flag = f"--config.compare.position_encodings={encodings}"
    refused = launcher.train(tmp_path, config, flag)
    assert refused.returncode == 1
    assert message in refused.stderr and "Traceback" not in refused.stderr
    assert list(tmp_path.iterdir()) == []
