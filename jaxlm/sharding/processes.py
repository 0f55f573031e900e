"""Several processes of one run: which is the first, what they tell one another, when they wait.

It all goes from host to host through JAX's coordination service. A collective of devices would not
do: a checkpoint is written on a thread beside the training step, and the collectives of both would
come in another order on each process.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
from jax._src import distributed  # the service's client has no public name; Orbax takes it here too

T = TypeVar("T")
# A process that dies is noticed by JAX itself, by its heartbeats; this only ends what would wait
# for ever on one that lives.
SECONDS = 3600.0
_CALLS = itertools.count()


class OtherProcessError(RuntimeError):
    """What went wrong on another process of the run."""


def is_first() -> bool:
    """Whether this process is the one that writes for all."""
    return jax.process_index() == 0


def from_first(make: Callable[[], T]) -> T:
    """What `make` gives on the first process, on all of them; they wait for it. To be called by
    all processes, from their main threads, in the same order.

    Args:
        make: runs on the first process alone; gives what JSON knows.

    Raises:
        OtherProcessError: it failed there, where the error itself is raised.
    """
    if jax.process_count() == 1:
        return make()
    key = f"jaxlm/first/{next(_CALLS)}"
    if not is_first():
        told = json.loads(_client().blocking_key_value_get(key, int(1e3 * SECONDS)))
        if "error" in told:
            raise OtherProcessError(f"the first process: {told['error']}")
        return told["value"]
    try:
        value = make()
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        _client().key_value_set(key, json.dumps({"error": text}))
        raise
    _client().key_value_set(key, json.dumps({"value": value}))
    return value


def meet(seconds: float) -> bool:
    """Waits for all processes, so long at most, and says whether they came: once in a run."""
    try:
        _client().wait_at_barrier("jaxlm/meet", int(1e3 * seconds))
    except jax.errors.JaxRuntimeError:  # late, or gone
        return False
    return True


class Meeting:
    """Where all processes tell the others something, again and again. To be made by all of them,
    from their main threads, in the same order; one thread of each uses it.
    """

    def __init__(self):
        self._name = f"jaxlm/meeting/{next(_CALLS)}" if jax.process_count() > 1 else ""
        self._round = 0

    def tell(self, value: T) -> list[T]:
        """What each process told at this round, by its index; waits for all.

        Args:
            value: what JSON knows.
        """
        if not self._name:
            return [value]
        client, folder = _client(), f"{self._name}/{self._round}"
        client.key_value_set(f"{folder}/{jax.process_index()}", json.dumps(value))
        client.wait_at_barrier(f"{folder}/all", int(1e3 * SECONDS))
        told = dict(client.key_value_dir_get(folder))
        if self._round:  # that of the round before, which all have read by now
            client.key_value_delete(f"{self._name}/{self._round - 1}/{jax.process_index()}")
        self._round += 1
        return [json.loads(told[f"{folder}/{i}"]) for i in range(jax.process_count())]

    def attempt(self, what: Callable[[], T]) -> T:
        """What `what` gives here, once it has succeeded on all processes.

        Raises:
            OtherProcessError: it has failed on another process, with that one's number and error.
            Exception: it has failed here.
        """
        try:
            value, failure = what(), None
        except Exception as error:
            value, failure = None, error
        problems = self.tell(failure and f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        for index, problem in enumerate(problems):
            if problem:
                raise OtherProcessError(f"process {index} of {len(problems)}: {problem}")
        return cast(T, value)


class Once:
    """A value that the first process to have one gives to all, whenever they ask; as `Meeting`."""

    def __init__(self):
        self._key = f"jaxlm/once/{next(_CALLS)}"

    def put(self, value: Any) -> None:
        """Sets it, unless it is set."""
        try:
            _client().key_value_set(self._key, json.dumps(value), allow_overwrite=False)
        except jax.errors.JaxRuntimeError as error:
            if "ALREADY_EXISTS" not in str(error):
                raise

    def get(self) -> Any:
        """The value, or None; waits for nobody."""
        try:
            return json.loads(_client().key_value_try_get(self._key))
        except jax.errors.JaxRuntimeError as error:
            if "NOT_FOUND" not in str(error):
                raise
            return None


def _client() -> Any:
    client = distributed.global_state.client
    if client is None:
        raise RuntimeError("several processes without jax.distributed.initialize")
    return client
