"""A reader beside a run that saves, and deletes old steps, as fast as it can."""

import threading

import pytest

from jaxlm.checkpoints import Saver, restore
from jaxlm.checkpoints.survey import survey
from tests.checkpoints.states import assert_same_bytes, state_at

# Where a file is gone, TensorStore still answers what was asked of the others, which nobody awaits.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def saved_into(tmp_path):
    """A folder that a thread saves into, each time in place of the step before."""
    done = threading.Event()

    def save():
        with Saver(tmp_path, keep_last=1) as saver:
            for step in range(1, 10_000):
                saver.save(step, state_at(step))
                saver.wait()
                begun.set()
                if done.is_set():
                    return

    begun, writer = threading.Event(), threading.Thread(target=save)
    writer.start()
    assert begun.wait(60)
    yield tmp_path
    done.set()
    writer.join()


def test_every_restore_gives_a_whole_step_and_none_an_older_one(saved_into):
    steps = [0]
    for _ in range(20):
        restored = restore(saved_into, state_at(0))
        assert_same_bytes(restored.state, state_at(restored.step))
        steps.append(restored.step)
    assert steps == sorted(steps) and steps[-1] > 2


def test_a_survey_says_of_each_step_what_it_is(saved_into):
    for _ in range(40):
        for found in survey(saved_into, arrays=True):
            assert found.nbytes >= 0 and (found.problem or found.manifest)
