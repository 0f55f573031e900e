"""Flags of a command that several processes run together, and their start."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Iterator

import jax
from absl import flags, logging

from jaxlm.sharding.processes import meet

DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "One process a host, which TPU pods, SLURM and Kubernetes tell apart."
)
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "Elsewhere: host:port of the first process, with the two flags below."
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many there are.", lower_bound=1)
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which this one is, from 0.", lower_bound=0)
WAIT = flags.DEFINE_integer("wait_seconds", 300, "For the other processes to start.", lower_bound=1)
HEARTBEAT = flags.DEFINE_integer(
    "heartbeat_seconds", 100, "Without a sign of a process until all stop.", lower_bound=1
)
# What ends all processes ends them at about the same time.
SECONDS_TO_MEET = 10.0


def start() -> None:
    """Joins the other processes, if a flag says that there are such; before JAX has a backend.

    Raises:
        ValueError: flags that do not fit together.
        TimeoutError: the others did not start.
    """
    named = {"coordinator": COORDINATOR, "num_processes": NUM_PROCESSES, "process_id": PROCESS_ID}
    missing = [name for name, flag in named.items() if flag.value is None]
    if len(missing) == len(named) and not DISTRIBUTED.value:
        return
    if missing and not DISTRIBUTED.value:
        raise ValueError(f"{missing[0]} is absent; allowed: all of {', '.join(named)}, or none")
    count, index = NUM_PROCESSES.value, PROCESS_ID.value
    if count is not None and index is not None and index >= count:
        raise ValueError(f"process_id={index}; allowed: 0 to {count - 1} of num_processes={count}")
    try:
        jax.distributed.initialize(
            COORDINATOR.value,
            count,
            index,
            initialization_timeout=WAIT.value,
            heartbeat_timeout_seconds=HEARTBEAT.value,
        )
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        where = f" at {COORDINATOR.value}" if COORDINATOR.value else ""
        raise TimeoutError(
            f"not all processes{where} came within {WAIT.value} s: {error}"
        ) from error
    if jax.process_index() > 0:
        logging.set_verbosity(logging.WARNING)


@contextlib.contextmanager
def leaving_on_error() -> Iterator[None]:
    """Of several processes, one that fails alone is gone in `SECONDS_TO_MEET`. Else JAX has it wait
    for the others at its end, in good health, while they wait for its part of a step.
    """
    try:
        yield
    except BaseException as error:
        # Whatever ends one of them (a diverged loss, a config) ends most often all: each says why.
        if not jax.distributed.is_initialized() or _all_came():
            raise
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        code = getattr(error, "code", None)
        os._exit(code if isinstance(code, int) else 1)


def _all_came() -> bool:
    """Whether the other processes end too. Ctrl-C would only make this one wait for them."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return meet(SECONDS_TO_MEET)
    finally:
        signal.signal(signal.SIGINT, before)
