"""Which programs XLA compiles: a training run compiles its step once, and nothing after it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"


@contextmanager
def count_compiles() -> Iterator[Counter[str]]:
    """Counts the programs compiled within the block, by the name of the jitted function.

    One that comes from the persistent cache counts too: the process did not have it yet.

        with count_compiles() as compiled:
            train(...)
        assert compiled["train_step"] == 1
    """
    compiled: Counter[str] = Counter()

    def listen(event: str, duration_secs: float, **details: Any) -> None:
        del duration_secs
        if event == _EVENT:
            name = str(details.get("fun_name", "?"))
            compiled[name.removeprefix("jit(").removesuffix(")")] += 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
