"""Methods that look for good texts, by name: `search.parse("beam(num_beams=8)")`."""

from typing import Any

from jaxlm.decoding.search import beam, contrastive  # noqa: F401  each registers itself
from jaxlm.decoding.search.method import METHODS, Method

available = METHODS.available


def parse(text: str | Method, **options: Any) -> Method:
    """Reads the text form, see `jaxlm.registry.Registry`; settings are returned as they are."""
    return METHODS.parse(text, **options)
