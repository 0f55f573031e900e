"""Ctrl-C and SIGTERM: asked to stop, a run finishes its step and saves."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Interrupt:
    """A signal handler that raises KeyboardInterrupt, and remembers that it did: Python drops what
    is raised in the middle of a garbage collection.
    """

    name: str | None = None

    def __call__(self, number: int, frame: object) -> None:
        """As signal.default_int_handler."""
        self.name = signal.Signals(number).name
        raise KeyboardInterrupt


class StopRequest:
    """Whether a signal came, and which."""

    name: str | None = None


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
