"""The position encodings and RoPE scalings, by name and by their text form."""

from __future__ import annotations

from typing import Any

from jaxlm.positions.encoding import PositionEncoding
from jaxlm.registry import Registry

ENCODINGS = Registry("position_encoding", PositionEncoding)
register, available = ENCODINGS.register, ENCODINGS.available
kind, get = ENCODINGS.kind, ENCODINGS.get


def parse(text: str | PositionEncoding, **options: Any) -> PositionEncoding:
    """Reads the text form, see `Registry.parse`; an encoding is returned as it is."""
    return ENCODINGS.parse(text, **options)
