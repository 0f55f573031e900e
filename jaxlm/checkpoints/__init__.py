"""Checkpoints: asynchronous, atomic, verified; Orbax is used in storage.py alone.

with Saver(directory, keep_last=3) as saver:
    saver.save(step, state, metadata={"config": config}, files={"tokenizer": folder})
restored = restore(directory, abstract_state)             # newest good step, or says why not
params = restore(directory, prefix="params").state        # no optimizer needed
"""

from jaxlm.checkpoints.config_file import (
    ConfigMismatchError,
    check_config,
    check_known_config,
    write_config,
)
from jaxlm.checkpoints.digest import tree_digest
from jaxlm.checkpoints.layout import available_steps, local_folder
from jaxlm.checkpoints.lock import WorkdirLockedError, workdir_lock
from jaxlm.checkpoints.restore import (
    NoCheckpointError,
    Restored,
    StateMismatchError,
    load_numpy,
    restore,
)
from jaxlm.checkpoints.save import SaveError, Saver

__all__ = [
    "ConfigMismatchError",
    "NoCheckpointError",
    "Restored",
    "SaveError",
    "Saver",
    "StateMismatchError",
    "WorkdirLockedError",
    "available_steps",
    "check_config",
    "check_known_config",
    "load_numpy",
    "local_folder",
    "restore",
    "tree_digest",
    "workdir_lock",
    "write_config",
]
