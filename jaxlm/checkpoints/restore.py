"""Restore the newest good step, and say why newer ones were refused."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from jaxlm.checkpoints.layout import UNFINISHED, available_steps, step_folder, step_folders
from jaxlm.checkpoints.leaves import LeafSpec, named_leaves, nest
from jaxlm.checkpoints.manifest import BadStepError, Manifest
from jaxlm.checkpoints.verify import opened_step, unverified_arrays, verified_arrays
from jaxlm.sharding.processes import Meeting


class NoCheckpointError(FileNotFoundError):
    """There is no good step to restore; the text lists each one that was refused, and why."""


class StateMismatchError(ValueError):
    """The checkpoint is good but of another state than the one asked for."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """One step.

    Attributes:
        state: as asked for: the structure of `abstract_state`, or nested dicts of NumPy arrays.
        metadata: what the caller gave to `Saver.save`.
        digest: SHA-256 of the whole saved state.
        folder: the step's folder, with the files given to `Saver.save` (verified).
        refused: a line for each newer step that was passed over.
    """

    step: int
    state: Any
    metadata: dict[str, Any]
    digest: str
    folder: Path
    refused: tuple[str, ...]


def restore(
    directory: str | os.PathLike[str],
    abstract_state: Any = None,
    *,
    step: int | None = None,
    up_to: int | None = None,
    prefix: str | tuple[str, ...] = "",
    verify: bool = True,
) -> Restored:
    """Restore a step after checking every SHA-256 of what it loads.

    Args:
        directory: that was given to Saver.
        abstract_state: pytree of `jax.ShapeDtypeStruct` (or arrays) to restore into; a leaf's
            `sharding` is where it goes, whatever mesh it was saved on. If that is the devices of
            several processes, all of them call this, and restore the same step. None: nested dicts
            of NumPy arrays (key data for typed PRNG keys, Python lists and dataclasses by their
            names).
        step: this one or an error. None: the newest good one; refused ones are logged as warnings.
        up_to: no newer one than this; None: any.
        prefix: only the part of the state below this path ("params"), read without the rest; of
            several, the first that the checkpoint has.
        verify: False: the arrays' SHA-256s are left out; sizes and all else are checked. What that
            spares: `launch.benchmark save`.

    Raises:
        NoCheckpointError: no step, or no good one.
        StateMismatchError: `abstract_state` differs from what was saved; one line a leaf.
    """
    directory = Path(directory)
    refused: list[str] = []
    tried: set[tuple[int, Path]] = set()
    meeting = Meeting() if _lies_on_several_processes(abstract_state) else None
    while found := _newest(directory, step, up_to, tried, meeting):
        tried.add(found)
        (candidate, folder), state, problem = found, None, None
        try:
            manifest = opened_step(candidate, folder)
            state = _load(folder, manifest, abstract_state, prefix, verify)
        except BadStepError as error:
            problem = str(error)
        if meeting is not None:
            problem = next(filter(None, meeting.tell(problem)), None)
        if problem is not None:
            refused.append(f"step {candidate} refused ({folder}): {problem}")
            logging.warning("checkpoint %s", refused[-1])
            continue
        if refused:
            logging.warning("checkpoint of step %d is used instead", candidate)
        return Restored(
            candidate, state, manifest.metadata, manifest.digest, folder, tuple(refused)
        )
    reasons = refused or [f"saved steps: {available_steps(directory)}"]
    asked = "" if step is None else f" of step {step}"
    raise NoCheckpointError("\n".join([f"no good checkpoint{asked} in {directory}", *reasons]))


def load_numpy(directory: str | os.PathLike[str], step: int | None = None) -> dict[str, Any]:
    """The newest good step's state as nested dicts of NumPy arrays; needs no mesh and no model.

    Raises:
        NoCheckpointError: no good step.
    """
    return restore(directory, step=step).state


def _newest(
    directory: Path,
    step: int | None,
    up_to: int | None,
    tried: Set[tuple[int, Path]],
    meeting: Meeting | None,
) -> tuple[int, Path] | None:
    """The newest folder that was not tried, as things are now: a run that goes on may have saved
    a step, and deleted one, since the last look. A finished folder comes before an unfinished one
    of the same step. Of several processes the first decides: others may see a folder of a shared
    disk come later.
    """
    if step is None:
        unfinished = list(step_folders(directory, UNFINISHED).items())
        candidates = [*unfinished, *step_folders(directory).items()]
    else:
        candidates = [(step, step_folder(directory, step))]
        candidates = [c for c in candidates if c[1].is_dir()]
    left = [c for c in candidates if c not in tried and (up_to is None or c[0] <= up_to)]
    newest = min(left, key=lambda c: (-c[0], c[1].name), default=None)
    if meeting is None:
        return newest
    first = meeting.tell(newest and (newest[0], newest[1].name))[0]
    return first and (first[0], directory / first[1])


def _lies_on_several_processes(abstract_state: Any) -> bool:
    shardings = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(abstract_state))
    return not all(sharding is None or sharding.is_fully_addressable for sharding in shardings)


def _load(
    folder: Path,
    manifest: Manifest,
    abstract_state: Any,
    prefix: str | tuple[str, ...],
    verify: bool,
) -> Any:
    """Arrays below the prefix, in the structure asked for."""
    specs: dict[str, LeafSpec] = {}
    start = ""
    for one in (prefix,) if isinstance(prefix, str) else prefix:
        start = one + "/" if one else ""
        specs = {
            n.removeprefix(start): s for n, s in manifest.leaves.items() if n.startswith(start)
        }
        if specs:
            break
    if not specs and prefix:
        raise StateMismatchError(f"prefix={prefix!r}; no leaf of the checkpoint lies below it")
    wanted = None if abstract_state is None else named_leaves(abstract_state)
    if wanted is not None:
        _check_match(specs, wanted)
    read = verified_arrays if verify else unverified_arrays
    arrays = read(folder, manifest, [start + name for name in specs])
    if wanted is None:
        return nest({name: arrays[start + name] for name in specs})
    # pop: the host copy of a leaf can go as soon as the leaf is on its devices.
    leaves = [
        _placed(name, specs[name], arrays.pop(start + name), like) for name, like in wanted.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)


def _check_match(specs: Mapping[str, LeafSpec], wanted: Mapping[str, Any]) -> None:
    lines = []
    for name in sorted(specs.keys() | wanted.keys()):
        if name not in wanted:
            lines.append(f"{name}: in the checkpoint, not asked for")
        elif name not in specs:
            lines.append(f"{name}: asked for, not in the checkpoint")
        else:
            saved, like = specs[name].abstract(), wanted[name]
            # A Python number has no dtype of its own; it was saved with JAX's default.
            shape, dtype = jnp.shape(like), getattr(like, "dtype", jnp.result_type(like))
            if (saved.shape, saved.dtype) != (shape, dtype):
                lines.append(
                    f"{name}: {saved.dtype}{list(saved.shape)} in the checkpoint, "
                    f"{dtype}{list(shape)} asked for"
                )
    if lines:
        raise StateMismatchError("\n".join(["the state asked for is not the saved one:", *lines]))


def _placed(name: str, spec: LeafSpec, array: np.ndarray, like: Any) -> jax.Array:
    """The leaf on the devices of `like.sharding`, or on the default one."""
    sharding = getattr(like, "sharding", None)
    if sharding is None or sharding.is_fully_addressable:
        placed = jax.device_put(spec.wrap(array), sharding)
    else:  # each process its own parts: device_put would compare the array on all of them
        parts = jax.make_array_from_callback(spec.shape, sharding, lambda index: array[index])
        placed = spec.wrap(parts)
    if placed.dtype != spec.abstract().dtype:
        raise StateMismatchError(f"{name}: {spec.dtype} needs jax_enable_x64")
    return placed
