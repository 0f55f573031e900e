"""Spikes of the loss: a run goes back before them and on without their batches, killed or not."""

import contextlib
import itertools
import random

import jax.numpy as jnp
import pytest

from jaxlm.checkpoints import Saver, available_steps, restore
from jaxlm.data.loader import Loader
from jaxlm.training.config import RollbackConfig
from jaxlm.training.divergence import DivergedError
from jaxlm.training.metrics import read_metrics
from jaxlm.training.rollback import ROLLBACK, SpikeCheck, SpikeError
from jaxlm.training.stopping import StopRequest
from tests.training.texts import tiny_run, train_tiny, write_texts


def metrics(loss, bad=0):
    return {"loss": jnp.asarray(loss), "bad_in_a_row": jnp.asarray(float(bad))}


def check(spikes, first, *losses):
    for step, loss in enumerate(losses, first):
        spikes(step, metrics(loss))


def test_a_spike_is_a_multiple_of_the_median_of_the_last_losses():
    spikes = SpikeCheck(RollbackConfig(factor=2, window=3, skip=2), {})
    check(spikes, 1, 5.0, 50.0, 5.0)  # not before there are three
    check(spikes, 4, 10.0, 6.0)
    spikes(6, metrics(float("nan"), bad=1))  # is skipped by the step itself
    with pytest.raises(SpikeError) as spike:
        spikes(7, metrics(12.1))
    assert (spike.value.back_to, spike.value.skipped) == (5, [(5, 2)])


def test_what_is_saved_is_all_that_counts():
    config = RollbackConfig(factor=2, window=3, skip=2)
    spikes = SpikeCheck(config, {}, [(5, 2)])
    check(spikes, 6, 1.0, 2.0, 3.0, 1.5)
    again = SpikeCheck(config, {ROLLBACK: spikes.to_dict()[ROLLBACK]})
    for one in (spikes, again):
        with pytest.raises(SpikeError) as spike:
            one(6, metrics(4.1))
        # Not to before the last spike, whose batches would come again.
        assert spike.value.skipped == [(5, 2), (5, 1)]
    off = SpikeCheck(None, spikes.to_dict())  # switched off, it still skips what was skipped
    off(10, metrics(1e9))
    assert off.batch_of(5) == 7 and off.to_dict()[ROLLBACK]["skipped"] == [(5, 2)]
    assert SpikeCheck(None, {}).to_dict() == {}


def test_batches_of_skipped_steps_are_left_out():
    spikes = SpikeCheck(None, {}, [(5, 2), (5, 1), (8, 4)])
    assert [spikes.batch_of(n) for n in (0, 4, 5, 7, 8, 9)] == [0, 4, 8, 10, 15, 16]
    assert [spikes.next_skip(n) for n in (0, 5, 8)] == [5, 8, None]


def test_most():
    spikes = SpikeCheck(RollbackConfig(factor=2, window=1, most=1), {}, [(0, 1)])
    with pytest.raises(
        DivergedError, match=r"step 2: a loss of 9, where .* median 1; 1 such spike"
    ):
        check(spikes, 1, 1.0, 9.0)


WORDS = ["it", "was", "the", "best", "of", "times", "and", "she", "had", "not", "been", "there"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A text with a passage of noise, which the loss of a row in it jumps at."""
    folder = write_texts(tmp_path_factory.mktemp("texts"))
    generator = random.Random(0)
    noise = bytes(generator.choices(range(33, 127), k=300)).decode()
    text = (folder / "one.txt").read_text()
    (folder / "one.txt").write_text(text[:5000] + noise + text[5000:])
    return folder


def spiky(texts, **changes):
    options = {
        "train__rollback__factor": 1.25,
        "train__rollback__window": 5,
        "train__rollback__skip": 3,
        "train__evaluate_every": None,
        "train__log_every": 1,
        "checkpoint__every": 10,
    }
    return tiny_run(texts, **{**options, **changes})


def determined(workdir):
    records = [{k: v for k, v in r.items() if k != "speed"} for r in read_metrics(workdir)]
    return restore(workdir / "checkpoints"), records


@pytest.fixture(scope="module")
def undisturbed(texts, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    train_tiny(spiky(texts), workdir, texts / "cache")
    return determined(workdir)


def test_a_run_goes_back_and_on_without_the_batches(undisturbed, texts):
    restored, records = undisturbed
    assert restored.metadata[ROLLBACK]["skipped"], [r.get("loss") for r in records]
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 41))


@pytest.mark.parametrize("every", [4, pytest.param(10, marks=pytest.mark.slow)])
def test_stopped_and_killed_and_gone_on_is_the_same_run(
    undisturbed, texts, tmp_path, monkeypatch, every
):
    """Whatever steps were saved when the run went back: its history is the same."""
    save, saves = Saver.save, itertools.count()

    class KilledError(Exception):
        pass

    def save_and_perhaps_die(self, step, *arguments, **options):
        save(self, step, *arguments, **options)
        self.wait()
        if next(saves) % 2:
            raise KilledError

    monkeypatch.setattr(Saver, "save", save_and_perhaps_die)
    run, deaths = spiky(texts, checkpoint__every=every, checkpoint__keep_last=3), 0
    while True:
        with contextlib.suppress(KilledError):
            train_tiny(run, tmp_path, texts / "cache")
            break
        deaths += 1
    assert deaths > 1
    (ours, our_records), (theirs, their_records) = determined(tmp_path), undisturbed
    assert ours.digest == theirs.digest and our_records == their_records
    assert ours.metadata[ROLLBACK] == theirs.metadata[ROLLBACK]


def test_stops_shortly_before_a_spike(undisturbed, texts, tmp_path, monkeypatch):
    """What is saved then pushes no step out that the run has to go back to."""
    run = spiky(texts, checkpoint__keep_last=2)
    for last in (16, 17):

        def is_last(self, step, last=last):
            self.name = "SIGTERM" if step == last else None
            return step == last

        with monkeypatch.context() as patch:
            patch.setattr(StopRequest, "is_last", is_last)
            train_tiny(run, tmp_path, texts / "cache")
    assert available_steps(tmp_path / "checkpoints") == [10, 16, 17]
    train_tiny(run, tmp_path, texts / "cache")
    (ours, our_records), (theirs, their_records) = determined(tmp_path), undisturbed
    assert ours.digest == theirs.digest and our_records == their_records


def test_the_batches_read_are_all_but_the_skipped_ones(undisturbed, texts, tmp_path, monkeypatch):
    """The last state is that of a run whose loader never had them."""
    iterate = Loader.iterate
    left_out = SpikeCheck(None, undisturbed[0].metadata)

    def without(self, start=0):
        for step in itertools.count(start):
            yield next(iterate(self, left_out.batch_of(step)))

    monkeypatch.setattr(Loader, "iterate", without)
    run = spiky(texts, train__rollback=None)
    train_tiny(run, tmp_path, texts / "cache")
    assert restore(tmp_path / "checkpoints").digest == undisturbed[0].digest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__rollback__factor": 1.0}, "rollback: factor=1.0; allowed: a finite number > 1"),
        (
            {"train__rollback__skip": 11},
            "train.rollback: skip=11; allowed: at most check",
        ),
        ({"checkpoint__keep_last": 1}, "checkpoint: keep_last=1; allowed: at least 2"),
    ],
)
def test_bad_settings(texts, changes, message):
    with pytest.raises(ValueError, match=message):
        spiky(texts, **changes)
