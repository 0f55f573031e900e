"""A cache of one's own: all tokens stay in memory, the last few are seen.

All that a new cache needs: settings under a name, and the verbs of `jaxlm.caches.kind.KVCache`.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax

from jaxlm.attention import mask as masks
from jaxlm.attention.cached import SlotLayer
from jaxlm.caches.dense import DenseCache
from jaxlm.caches.kind import CacheKind
from jaxlm.config import at_least, check


# In a file of jaxlm/caches, with @CACHES.register above this line:
@dataclasses.dataclass(frozen=True)
class Recent(CacheKind):
    """The last `window` tokens, the query's own included."""

    window: int
    name: ClassVar[str] = "recent"

    def __post_init__(self):
        check("recent", window=at_least(self.window, 1))

    def init(self, config, batch, capacity):
        """Empty."""
        return RecentCache(DenseCache.init(config, batch, capacity), self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RecentCache:
    """What is kept, and how much of it is seen."""

    kept: DenseCache
    kind: Recent = dataclasses.field(metadata={"static": True})

    @property
    def lengths(self):
        """Tokens of each row."""
        return self.kept.lengths

    @property
    def axes(self):
        """Where a mesh may cut it."""
        return self.kept.axes

    @property
    def mask(self):
        """What a query sees, in a prompt that is read at once too."""
        return masks.sliding_window(self.kind.window)

    @property
    def appendable(self):
        """What is kept never changes its form."""
        return None

    def layer(self, index):
        """What a layer attends to."""
        return SlotLayer(self.kept.layer(index).cached, self.mask)

    def commit(self, kv, positions, segment_ids):
        """With more tokens."""
        return dataclasses.replace(self, kept=self.kept.commit(kv, positions, segment_ids))

    def reorder(self, rows):
        """Row i becomes what row `rows[i]` was."""
        return dataclasses.replace(self, kept=self.kept.reorder(rows))

    @property
    def nbytes(self):
        """Of keys and values."""
        return self.kept.nbytes
