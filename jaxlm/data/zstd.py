"""Zstandard files as streams that tell a cut-off file from a whole one."""

from __future__ import annotations

import io
from typing import Any

from jaxlm.data.optional import optional

BLOCK = 1 << 15


class ZstdReader(io.RawIOBase):
    """The bytes within a .zst file of one frame or more.

    The zstandard package's own reader ends in silence where a file was cut off.

    Args:
        file: compressed bytes.
        name: of the file, for errors.

    Raises:
        ValueError: on reading: the file is cut off or damaged.
    """

    def __init__(self, file: Any, name: str):
        self._file, self._name = file, name
        self._zstandard = optional("zstandard", name)
        self._frame: Any = None
        self._compressed = b""
        self._plain = memoryview(b"")

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills some of a buffer; 0 at the end."""
        while not self._plain and self._next():
            pass
        n = min(len(buffer), len(self._plain))
        buffer[:n] = self._plain[:n]
        self._plain = self._plain[n:]
        return n

    def _next(self) -> bool:
        """Decompresses a block; False at the end of the file."""
        block = self._compressed or self._file.read(BLOCK)
        if not block:
            if self._frame is not None:
                raise ValueError(f"{self._name} is damaged: it ends within a frame")
            return False
        frame = self._frame or self._zstandard.ZstdDecompressor().decompressobj()
        try:
            self._plain = memoryview(frame.decompress(block))
        except self._zstandard.ZstdError as error:
            raise ValueError(f"{self._name} is damaged: {error}") from error
        self._frame, self._compressed = (None, frame.unused_data) if frame.eof else (frame, b"")
        return True
