"""How much memory there is."""

import os
import resource

import pytest

from jaxlm.sharding import memory


@pytest.mark.parametrize(
    ("says", "limit"),
    [("max\n", None), ("4096\n", 4096), (f"{2**63 - 4096}\n", None), (None, None)],
)
def test_a_container_has_what_it_may_take(tmp_path, monkeypatch, says, limit):
    file = tmp_path / "memory.max"
    if says is not None:
        file.write_text(says)
    monkeypatch.setattr(memory, "CONTAINER_LIMITS", (file,))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert memory.host_memory() == (limit or whole)
