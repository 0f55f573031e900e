"""Write one step folder from several processes, each the parts of the state that it holds.

The folder is on storage that all of them share. A part is a chunk of its leaf's array, and the
SHA-256 is of the whole leaf, whatever it was cut into: so each leaf is read back by one process,
which also shows that it can be. Nothing else tells how many processes there were: such a step is
restored on any mesh, by any number of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxlm.checkpoints import storage
from jaxlm.checkpoints.commit import open_unfinished, publish, remove_surely, seal
from jaxlm.checkpoints.digest import leaf_digest
from jaxlm.checkpoints.layout import UNFINISHED, step_folder
from jaxlm.checkpoints.leaves import LeafSpec, spec_and_array
from jaxlm.checkpoints.manifest import STATE
from jaxlm.checkpoints.verify import read_leaves
from jaxlm.sharding.processes import Meeting, is_first


def start_commit(
    directory: Path,
    step: int,
    named: Mapping[str, Any],
    metadata: dict[str, Any],
    files: Mapping[str, bytes | Path],
    meeting: Meeting,
) -> Callable[[], None]:
    """Begin to write a step; the state's buffers may be donated when this returns.

    Args:
        directory: of the steps, the same on all processes.
        named: leaves by path, arrays that lie on all processes.
        metadata, files: those of the first process are written.
        meeting: of this directory's writers.

    Returns:
        what does the rest, to be called by all processes, on a thread of its own.

    Raises:
        OSError, OtherProcessError: there is no room, or no folder can be made.
        TypeError, ValueError: a leaf that can't be stored.
    """
    stored = {name: _shared(name, leaf) for name, leaf in named.items()}
    specs = {name: spec for name, (spec, _) in stored.items()}
    final = step_folder(directory, step)
    unfinished = final.with_name(final.name + UNFINISHED)

    def make_folder() -> None:
        if is_first():
            open_unfinished(directory, step, sum(spec.nbytes for spec in specs.values()))
            (unfinished / STATE).mkdir()

    meeting.attempt(make_folder)
    arrays = {name: array for name, (_, array) in stored.items() if array.size}
    finish_arrays = meeting.attempt(lambda: storage.start_shards(unfinished / STATE, arrays))

    def finish() -> None:
        try:
            meeting.attempt(finish_arrays)
            mine = meeting.attempt(lambda: _digests(unfinished, _share(specs)))
            digests = {n: d for part in meeting.tell(mine) for n, d in part.items()}
            about = (step, specs, digests, metadata, files)
            meeting.attempt(
                lambda: is_first() and publish(directory, seal(unfinished, *about), unfinished)
            )
        except BaseException:
            if is_first():
                remove_surely(unfinished)
            raise

    return finish


def _shared(name: str, leaf: Any) -> tuple[LeafSpec, jax.Array]:
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        raise ValueError(
            f"state leaf {name!r} is this process's own; allowed with several processes: arrays "
            "that lie on all of them"
        )
    spec, array = spec_and_array(name, leaf)
    assert isinstance(array, jax.Array)
    return spec, array


def _share(specs: Mapping[str, LeafSpec]) -> dict[str, LeafSpec]:
    """The leaves that this process reads back: of each size about as many as the others."""
    by_size = sorted(specs, key=lambda name: (-specs[name].nbytes, name))
    return {name: specs[name] for name in by_size[jax.process_index() :: jax.process_count()]}


def _digests(folder: Path, specs: Mapping[str, LeafSpec]) -> dict[str, str]:
    parts = read_leaves(folder, specs)
    return {n: leaf_digest(n, specs[n], array) for part in parts for n, array in part.items()}
