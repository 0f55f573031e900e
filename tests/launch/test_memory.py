"""Runs that do not fit into memory end in one line, with the bytes that there are not."""

import re

import pytest

# Absurd ones: what is asked for is refused at once, and nothing of the machine's memory is taken.
TOO_LARGE = {
    "a state": ("--config.model.d_model=4194304",),
    "a step": (
        "--config.data.sequence_length=200000",
        "--config.model.attention.implementation=reference",
    ),
}
# With room for the state, and none for making it.
GIBIBYTES_OF_ADDRESSES = 2.5


@pytest.mark.parametrize("what", TOO_LARGE)
def test_too_large_for_the_machine(launcher, tmp_path, what):
    refused = launcher.train(tmp_path, *TOO_LARGE[what])
    (line,) = refused.stderr.splitlines()
    assert refused.returncode == 1
    numbers = [int(n.replace(",", "")) for n in re.findall(r"[\d,]+\d", line)]
    assert line.startswith("error: not enough memory: ") and max(numbers) > 10**12
    assert list((tmp_path / "checkpoints").glob("*")) == []


@pytest.mark.slow
def test_too_large_for_a_limit(launcher, tmp_path):
    """The kernel refuses the memory, and JAX finds out where nobody waits for it."""
    flags = ("--config.model.d_model=4096", "--config.train.ema_decay=None")
    refused = launcher.train(tmp_path, *flags, most_memory=int(GIBIBYTES_OF_ADDRESSES * 2**30))
    assert refused.returncode == 1, refused.stderr
    (line,) = refused.stderr.splitlines()
    assert re.fullmatch(
        r"error: not enough memory: RESOURCE_EXHAUSTED: .*allocating \d+ bytes.*", line
    )
