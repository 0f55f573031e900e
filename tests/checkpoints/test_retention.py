import os
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.checkpoints import Saver, available_steps
from jaxlm.checkpoints.retention import Retention


def test_steps_on_disk(tmp_path):
    with Saver(tmp_path, keep_last=2, keep_every=4) as saver:
        for step in range(1, 11):
            saver.save(step, {"a": step})
    assert available_steps(tmp_path) == [4, 8, 9, 10]


def test_deletion_that_stops_half_way_leaves_no_half_step(tmp_path, monkeypatch, caplog):
    remove = shutil.rmtree

    def fails(path, *args, **kwargs):
        if path.name.startswith("step_00000001"):
            (path / "COMMIT").unlink()
            raise OSError("half-way")
        remove(path, *args, **kwargs)

    with Saver(tmp_path, keep_last=1) as saver:
        saver.save(1, {"a": 1})
        saver.wait()
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "rmtree", fails)
            saver.save(2, {"a": 2})
            saver.wait()
        assert available_steps(tmp_path) == [2]
        assert "could not be deleted: half-way" in caplog.text
        saver.save(3, {"a": 3})
    assert os.listdir(tmp_path) == ["step_00000003"]


@given(
    st.sets(st.integers(0, 50), min_size=1),
    st.integers(1, 4),
    st.none() | st.integers(1, 6),
    st.integers(0, 20),
)
def test_what_goes(steps, keep_last, keep_every, go_back):
    for saved in steps:
        gone = Retention(keep_last, keep_every, go_back).superseded(steps, saved)
        far = max((step for step in steps if step <= saved - go_back), default=None)
        for step in steps:
            newer = sum(step < other <= saved for other in steps)
            kept = step == far or (keep_every is not None and step % keep_every == 0)
            assert (step in gone) == (step < saved and newer >= keep_last and not kept)


def test_a_bad_newer_step_never_pushes_out_the_good_one(tmp_path):
    (tmp_path / "step_00000009").mkdir()
    with Saver(tmp_path, keep_last=1) as saver:
        saver.save(3, {"a": 3})
    assert available_steps(tmp_path) == [3, 9]


@pytest.mark.parametrize("bad", [{"keep_last": 0}, {"keep_every": 0}, {"go_back": -1}])
def test_bad_numbers(tmp_path, bad):
    with pytest.raises(ValueError, match=r"=0; allowed: an integer >= 1|=-1; allowed: .* >= 0"):
        Saver(tmp_path, **bad)
