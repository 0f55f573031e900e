"""A comparison within this process: what it refuses, leaves when it is stopped, and says."""

import dataclasses
import json
from types import SimpleNamespace

import pytest

import jaxlm
from jaxlm.evaluation.loss import HeldOut
from jaxlm.training.train import train
from launch import compare
from tests.decoding import tiny
from tests.training.texts import tiny_run


def test_it_opens_as_soon_as_its_first_run_has_a_checkpoint(launcher, tmp_path, monkeypatch):
    def stopped(run, workdir, **options):
        with pytest.raises(FileNotFoundError, match=r"rope is the comparison's first run and has"):
            jaxlm.load(tmp_path / "new")
        trained = train(run, workdir, **options)
        result = dataclasses.replace(trained.result, stopped_by="SIGTERM")
        return dataclasses.replace(trained, result=result)

    monkeypatch.setattr(compare, "train", stopped)
    run = tiny_run(f"{launcher.texts},compare", train__steps=6)
    compare.run_comparison(run, str(tmp_path / "new"), allow_config_change=False)
    model, _, _ = jaxlm.load(tmp_path / "new")
    assert str(model.config.encoding) == "rope" and not (tmp_path / "new/alibi").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"compare__position_encodings": ("rope", "learned")},
            "compare: length=64; allowed: at most 32 with position_encoding=learned(table_length=",
        ),
        ({"compare__text": "absent.txt"}, "source 'absent.txt': no such file"),
        ({"compare__length": 5000}, "held_out.txt' has "),
    ],
)
def test_what_can_not_be_measured_is_refused_before_anything_is_trained(
    launcher, tmp_path, monkeypatch, changes, message
):
    monkeypatch.setattr(compare, "train", pytest.fail)
    run = tiny_run(f"{launcher.texts},compare", **changes)
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        compare.run_comparison(run, tmp_path / "new", allow_config_change=False)
    assert message in str(refused.value) and not (tmp_path / "new/default.json").exists()


def test_held_out_figures_are_there_whatever_becomes_of_the_rest(
    launcher, tmp_path, monkeypatch, capsys
):
    def trained(run, workdir, **options):
        held_out = HeldOut(4.567, 96.33, 0.25, 2.345, 1000)
        return SimpleNamespace(result=SimpleNamespace(held_out=held_out, stopped_by=None))

    def broken(*arguments):
        raise ValueError("not measured")

    monkeypatch.setattr(compare, "train", trained)
    monkeypatch.setattr(compare, "measure", broken)
    run = tiny_run(f"{launcher.texts},compare")
    with pytest.raises(ValueError, match="not measured"):
        compare.run_comparison(run, tmp_path, allow_config_change=False)
    found = json.loads((tmp_path / "results.json").read_text())
    assert list(found["held_out"]) == ["rope", "alibi"] and not found["loss_by_position"]
    assert capsys.readouterr().out.count(" 4.567 ") == 2


@pytest.mark.parametrize(
    ("encoding", "flags"),
    [
        (
            "alibi",
            "--length=4096 --position_encoding=alibi "
            "--position_encoding='lm_infinite(num_sinks=4)'",
        ),
        ("learned", "--position_encoding=learned"),
        ("sinusoidal", "--length=4096 --position_encoding=sinusoidal"),
    ],
)
def test_what_is_proposed_fits_the_run_that_opens(tmp_path, capsys, encoding, flags):
    compare.say_what_next(tmp_path, tiny.model(encoding))
    command = f"  python -m launch.evaluate --checkpoint={tmp_path} {flags}"
    assert command in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("text", ["{}", "garbage", "[1]", '{"run": "../x"}', '{"run": "/x"}'])
def test_a_damaged_default_run_is_named(tmp_path, text):
    (tmp_path / "default.json").write_text(text)
    with pytest.raises(ValueError, match=r"default\.json names no run \(.*\); allowed: \{\"run\":"):
        jaxlm.load(tmp_path)


def test_its_folder_is_a_local_one(launcher):
    run = tiny_run(f"{launcher.texts},compare")
    with pytest.raises(ValueError, match="workdir='gs://bucket/runs'; allowed: a local folder"):
        compare.run_comparison(run, "gs://bucket/runs", allow_config_change=False)
