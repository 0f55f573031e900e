"""A cache is one file and its name in the registry: the worked example decodes by every method."""

import pytest

from jaxlm.caches.kind import CACHES, KVCache
from jaxlm.decoding.generate import generate
from tests.decoding import tiny
from tests.decoding.example_cache import Recent
from tests.decoding.test_methods import PROMPTS
from tests.decoding.test_methods import SETTINGS as METHODS
from tests.marks import slow_but


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(CACHES, "_classes", dict(CACHES._classes))
    CACHES.register(Recent)


@pytest.mark.parametrize("method", slow_but([None], [None, *METHODS.values()]))
def test_it_says_what_a_ring_as_large_says(registered, method):
    assert isinstance(Recent(8).init(tiny.model().config, 1, 4), KVCache)
    given = (tiny.model(), tiny.params(), tiny.TOKENIZER, PROMPTS, 12)
    ours, ring = (
        generate(*given, cache=cache, method=method)
        for cache in ("recent(window=8)", "ring(window=8, num_sinks=0)")
    )
    assert ours == ring


def test_its_settings_are_checked_as_others_are(registered):
    given = (tiny.model(), tiny.params(), tiny.TOKENIZER, PROMPTS, 12)
    for cache, told in (("recent", "window missing"), ("recent(window=0)", "window=0; allowed")):
        with pytest.raises(ValueError, match=told):
            generate(*given, cache=cache)
    with pytest.raises(ValueError, match="did you mean recent"):
        generate(*given, cache="recant(window=8)")
