"""Flags of a command that several processes run together, and their start."""

from __future__ import annotations

import jax
from absl import flags, logging

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
