import json

import pytest

from jaxlm.checkpoints import (
    ConfigMismatchError,
    check_config,
    check_known_config,
    write_config,
)

CONFIG = {"train": {"learning_rate": 0.001, "steps": 10, "betas": (0.9, 0.99)}, "seed": 0}


def test_first_and_same_config(tmp_path):
    check_config(tmp_path / "run", CONFIG)
    write_config(tmp_path / "run", CONFIG)
    check_config(tmp_path / "run", dict(reversed(CONFIG.items())))
    saved = json.loads((tmp_path / "run/config.json").read_text())
    assert saved["train"]["betas"] == [0.9, 0.99]


def test_another_config_is_shown_field_by_field(tmp_path, caplog):
    write_config(tmp_path, CONFIG)
    changed = {"train": {"learning_rate": 0.002, "steps": 10.0, "new": None}, "seed": 0}
    with pytest.raises(ConfigMismatchError) as caught:
        check_config(tmp_path, changed)
    assert str(caught.value).splitlines()[1:] == [
        "train.betas: absent here, [0.9, 0.99] in the workdir",
        "train.learning_rate: 0.002 here, 0.001 in the workdir",
        "train.new: null here, absent in the workdir",
        "train.steps: 10.0 here, 10 in the workdir",
    ]
    check_config(tmp_path, CONFIG)

    check_config(tmp_path, changed, allow_change=True)
    assert "train.learning_rate: 0.002 here, 0.001 in the workdir" in caplog.text
    check_config(tmp_path, CONFIG)
    write_config(tmp_path, changed)
    check_config(tmp_path, changed)


def test_a_field_that_an_older_version_did_not_know_has_its_default(tmp_path):
    write_config(tmp_path, CONFIG)
    defaults = {"train": {"steps": 5, "rollback": None}, "mesh": {"data": 1}}
    new = {"train": {**CONFIG["train"], "rollback": None}, "mesh": {"data": 1}, "seed": 0}
    check_config(tmp_path, new, defaults=defaults)
    check_known_config(tmp_path, {"train": new["train"]}, defaults)
    new["train"]["rollback"] = 2
    for compare in (check_config, check_known_config):
        with pytest.raises(ConfigMismatchError) as caught:
            compare(tmp_path, new, defaults=defaults)
        assert str(caught.value).splitlines()[1:] == ["train.rollback: 2 here, null in the workdir"]


def test_what_is_no_json_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_config(tmp_path, {"rate": float("inf")})


def test_unreadable_config(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        check_config(tmp_path, CONFIG, allow_change=True)
