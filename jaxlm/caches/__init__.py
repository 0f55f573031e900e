"""KV caches by name: `caches.parse("ring(window=4096)")`."""

from typing import Any

from jaxlm.caches import dense, paged, quantized, razor, ring, staircase  # noqa: F401  each registers itself
from jaxlm.caches.kind import CACHES, CacheKind

available = CACHES.available


def parse(text: str | CacheKind, **options: Any) -> CacheKind:
    """Reads the text form, see `jaxlm.registry.Registry`; settings are returned as they are."""
    return CACHES.parse(text, **options)
