"""Sources that give nothing: a wait with an end, instead of one for ever."""

from __future__ import annotations

import contextlib
import contextvars
import io
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")
# Of `data.stall_seconds`, and of what is read without a run's config.
SECONDS = 300.0
BLOCK = 1 << 16
_seconds = contextvars.ContextVar("stall_seconds", default=SECONDS)


@contextlib.contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Within the block, what is opened may give nothing for so long, and no longer."""
    token = _seconds.set(seconds)
    try:
        yield
    finally:
        _seconds.reset(token)


def within(path: str, call: Callable[[], T]) -> T:
    """What a call gives that asks for a source.

    Raises:
        TimeoutError: it gave nothing for the seconds of `patience`.
    """
    return _within(_seconds.get(), path, call)


def open_patiently(path: str, open_file: Callable[[], Any]) -> io.BufferedReader:
    """The unbuffered file that `open_file` gives, to be read.

    Raises:
        TimeoutError: here or on reading: it gave nothing for the seconds of `patience`.
    """
    return io.BufferedReader(_Patient(within(path, open_file), path, _seconds.get()), BLOCK)


def _within(seconds: float, path: str, call: Callable[[], T]) -> T:
    """Runs it on a thread that nothing waits for: a read of a pipe, or of a network disk that is
    lost, can't be called back.
    """
    answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def answer() -> None:
        try:
            answers.put((call(), None))
        except BaseException as error:
            answers.put((None, error))

    threading.Thread(target=answer, name="source", daemon=True).start()
    try:
        value, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(
            f"source {path!r} gave no bytes for {seconds:g} s; allowed: one that goes on, or a "
            "larger data.stall_seconds"
        ) from None
    if error is not None:
        raise error
    return value


class _Patient(io.RawIOBase):
    """A file whose every read has an end."""

    def __init__(self, file: Any, path: str, seconds: float):
        self._file, self._path, self._seconds, self._stalled = file, path, seconds, False

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        def read() -> bytes:
            block = self._file.read(len(buffer))
            if self._stalled:
                self._file.close()
            return block

        try:
            block = _within(self._seconds, self._path, read)
        except TimeoutError:
            self._stalled = True
            raise
        buffer[: len(block)] = block
        return len(block)

    def readall(self) -> bytes:
        return b"".join(iter(lambda: self.read(BLOCK), b""))

    def close(self) -> None:
        # A thread that still reads closes the file when it is done; here that may be waited for.
        if not self.closed and not self._stalled:
            self._file.close()
        super().close()
