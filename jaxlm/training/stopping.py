"""Ctrl-C and SIGTERM: asked to stop, a run finishes its step and saves."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax

from jaxlm.sharding.processes import Meeting, Once


class Interrupt:
    """A signal handler that raises KeyboardInterrupt, and remembers that it did: Python drops what
    is raised in the middle of a garbage collection.
    """

    name: str | None = None

    def __call__(self, number: int, frame: object) -> None:
        """As signal.default_int_handler."""
        self.name = signal.Signals(number).name
        raise KeyboardInterrupt


# Steps from a signal to the last one, if there are several processes. One that has dispatched step
# n knows that step n - 1 is done, so all have dispatched that: none is further than n + 1, and each
# hears of the signal at n + 2, before which n + 1 must be done, at the latest.
STEPS_TO_HEAR = 2


class StopRequest:
    """Whether a signal came, and which; of several processes, to any one of them."""

    def __init__(self):
        self.name: str | None = None
        self._agreed = Once() if jax.process_count() > 1 else None
        self._end = Meeting()

    def is_last(self, step: int) -> bool:
        """Whether the run stops after this step, which is dispatched; asked after each of them."""
        if self._agreed is None:
            return self.name is not None
        if self.name is not None:
            self._agreed.put([self.name, step + STEPS_TO_HEAR])
        told = self._agreed.get()
        if told is None:
            return False
        self.name, last = told
        return step >= last

    def at_the_end(self) -> str | None:
        """The signal that came to any of the processes, whether or not all of them heard of it
        before their last step; waits for all.
        """
        return next(filter(None, self._end.tell(self.name)), None)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Within the block the first SIGINT or SIGTERM is only noted; a second one acts as usual.

    Signals belong to the main thread: elsewhere the block changes nothing.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, _: object) -> None:
        request.name = signal.Signals(number).name
        restore()

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = earlier = signal.signal(number, note)
        if isinstance(earlier, Interrupt) and earlier.name is not None:
            request.name = earlier.name  # it came before, and was dropped
    try:
        yield request
    finally:
        restore()
