"""A comparison that is stopped early is a workdir all the same."""

import dataclasses

import pytest

import jaxlm
from jaxlm.training.train import train
from launch import compare
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


@pytest.mark.parametrize("text", ["{}", "garbage", "[1]"])
def test_a_damaged_default_run_is_named(tmp_path, text):
    (tmp_path / "default.json").write_text(text)
    with pytest.raises(ValueError, match=r"default\.json names no run \(.*\); allowed: \{\"run\":"):
        jaxlm.load(tmp_path)
