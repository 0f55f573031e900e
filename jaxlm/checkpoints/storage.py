"""Arrays on disk through Orbax; no other file imports it.

One folder a leaf, one uncompressed chunk in it (zarr without OCDBT). So a chunk's bytes are exactly
the array's bytes, its size is known before it is read, equal states give equal files, a part of the
state is read without the rest, and no CPU time goes to compressing floats, which hardly compress.
OCDBT would pack small leaves into fewer files, under random names. Scanned layers keep leaves few.

Orbax's handler is used without its Checkpointer: that one adds a temporary folder and timestamps of
its own, and save.py already commits the step as a whole.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxlm.checkpoints.leaves import LeafSpec, in_parts, nest


def _is_not_orbax(record: logging.LogRecord) -> bool:
    return "/orbax/checkpoint/" not in record.pathname


# Orbax logs each phase of each save, and every exception it raises as well.
logging.getLogger("absl").addFilter(_is_not_orbax)


def _handler() -> ocp.PyTreeCheckpointHandler:
    return ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False)


def write_arrays(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write {"params/w": array} into a new folder. Blocks until the files are complete."""
    folder.mkdir()
    if not arrays:
        return  # Orbax refuses an empty tree.
    handler = _handler()
    try:
        handler.save(folder, args=ocp.args.PyTreeSave(nest(arrays)))
    finally:
        handler.close()


def start_shards(folder: Path, arrays: Mapping[str, jax.Array]) -> Callable[[], None]:
    """Begin to write {"params/w": array} of several processes into a new folder, each process the
    shards that it holds, a chunk each. To be called by all of them; every one has to write its
    part before a leaf can be read.

    The shards are on the host when this returns: the buffers may be donated then.

    Returns:
        what blocks until this process's files are complete; may be called on another thread.
    """
    handlers = ocp.type_handlers.create_type_handler_registry(
        # One chunk a shard, and no metadata of shards: their store needs a folder's mode.
        (
            jax.Array,
            ocp.type_handlers.ArrayHandler(array_metadata_store=None, use_replica_parallel=False),
        )
    )
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False, use_compression=False, type_handler_registry=handlers
    )
    saving = ocp.args.PyTreeSave(nest(arrays))
    futures = asyncio.run(handler.async_save(folder, args=saving)) or []

    def finish() -> None:
        try:
            for future in futures:
                future.result()
        finally:
            handler.close()

    return finish


def read_arrays(
    folder: Path, specs: Mapping[str, LeafSpec], nbytes: int
) -> Iterator[dict[str, np.ndarray]]:
    """Read the named leaves, so many at a time as fit `nbytes`, or one that is larger.

    Raises:
        ValueError: the stored shape or dtype is not the expected one (seen before allocation).
        Exception: whatever Orbax says of a file that it can't read.
    """
    handler = _handler()
    try:
        stored = _by_name(handler.metadata(folder).tree)
        for name, spec in specs.items():
            found = stored[name]
            if tuple(found.shape) != spec.shape or np.dtype(found.dtype).name != spec.dtype:
                raise ValueError(f"{name}: the file says {found.dtype}{list(found.shape)}")
        for part in in_parts(specs, nbytes):
            wanted = nest(dict.fromkeys(part, ocp.RestoreArgs(restore_type=np.ndarray)))
            what = ocp.args.PyTreeRestore(item=wanted, restore_args=wanted, partial_restore=True)
            yield _by_name(handler.restore(folder, args=what))
    finally:
        handler.close()


def _by_name(tree: dict) -> dict:
    """Leaves of nested dicts by path; unlike jax.tree, it doesn't look inside Orbax's objects."""
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: not isinstance(x, dict))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves[0]}
