"""Signals by real signals."""

import os
import signal

import pytest

from jaxlm.training.stopping import Interrupt, stop_on_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_that_was_dropped_is_remembered(number):
    """Python drops an exception that a handler raises within a garbage collection."""
    before = signal.signal(number, Interrupt())
    try:
        with stop_on_signals() as request:
            assert request.name is None
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
        with stop_on_signals() as request:
            assert request.name == signal.Signals(number).name
    finally:
        signal.signal(number, before)
