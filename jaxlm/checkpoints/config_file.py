"""config.json of a workdir: a run goes on only under the config it began with."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import logging

from jaxlm.checkpoints.layout import step_folders
from jaxlm.checkpoints.manifest import BadStepError
from jaxlm.checkpoints.verify import opened_step

CONFIG = "config.json"
_ABSENT = object()


class ConfigMismatchError(ValueError):
    """The workdir holds another config; the text has one line per differing field."""


def check_config(
    workdir: str | os.PathLike[str],
    config: Mapping[str, Any],
    allow_change: bool = False,
    defaults: Mapping[str, Any] | None = None,
    checkpoints: Path | None = None,
) -> None:
    """Compare the config with the one that a workdir holds, if it holds one.

    Args:
        workdir: may be absent.
        config: nested, JSON-able (tuples count as lists).
        allow_change: log the differences as warnings.
        defaults: what a field means that config.json lacks, because an older version wrote it.
        checkpoints: whose newest one's metadata counts where config.json is gone; what `config` has
            no name for is passed over.

    Raises:
        ConfigMismatchError: another config, and allow_change is False.
        ValueError: config.json is there but unreadable.
    """
    saved = saved_config(workdir)
    if saved is None and checkpoints is not None:
        saved = {n: v for n, v in _newest_metadata(checkpoints).items() if n in config} or None
    if saved is None:
        return
    lines = differences(json.loads(_text_of(config)), _completed(saved, defaults or {}))
    if lines and not allow_change:
        raise _mismatch(workdir, lines)
    for line in lines:
        logging.warning("config changed: %s", line)


def _newest_metadata(checkpoints: Path) -> Mapping[str, Any]:
    """Of the newest step that is good but for its arrays, which are not read."""
    for step, folder in reversed(step_folders(checkpoints).items()):
        with contextlib.suppress(BadStepError):
            return opened_step(step, folder).metadata
    return {}


def write_config(workdir: str | os.PathLike[str], config: Mapping[str, Any]) -> None:
    """Make it the workdir's config, once it is known that the run can go on with it."""
    path = Path(workdir) / CONFIG
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(CONFIG + ".tmp")
    temporary.write_text(_text_of(config))
    temporary.replace(path)


def _text_of(config: Mapping[str, Any]) -> str:
    """As it is written. NaN and infinity are no JSON: ValueError, here rather than at a save."""
    return json.dumps(dict(config), indent=1, sort_keys=True, allow_nan=False) + "\n"


def check_known_config(
    workdir: str | os.PathLike[str],
    config: Mapping[str, Any],
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Compare only the fields that `config` has, if the workdir holds a config at all: what can be
    refused before the rest of it is known. `defaults` as of `check_config`.

    Raises:
        ConfigMismatchError: another config.
        ValueError: config.json is there but unreadable.
    """
    saved = saved_config(workdir)
    if saved is None:
        return
    known = json.loads(json.dumps(dict(config)))
    lines = differences(known, _restricted(_completed(saved, defaults or {}), known))
    if lines:
        raise _mismatch(workdir, lines)


def saved_config(workdir: str | os.PathLike[str]) -> Any:
    """What config.json of a workdir says; None: there is none.

    Raises:
        ValueError: it is there but unreadable.
    """
    path = Path(workdir) / CONFIG
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); remove it or restore it") from error


def _completed(values: Any, defaults: Any) -> Any:
    """`values`, and the fields of `defaults` that they lack."""
    if not (isinstance(values, dict) and isinstance(defaults, Mapping)):
        return values
    return {**defaults, **{k: _completed(v, defaults.get(k)) for k, v in values.items()}}


def _restricted(values: Any, like: Any) -> Any:
    """`values` without the fields that `like` lacks."""
    if not (isinstance(values, dict) and isinstance(like, dict)):
        return values
    return {k: _restricted(v, like[k]) for k, v in values.items() if k in like}


def _mismatch(workdir: str | os.PathLike[str], lines: list[str]) -> ConfigMismatchError:
    return ConfigMismatchError("\n".join([f"{workdir} holds a run with another config:", *lines]))


def differences(
    here: Any, saved: Any, name: str = "", places: tuple[str, str] = ("here", "in the workdir")
) -> list[str]:
    """One line per differing field: "train.learning_rate: 0.001 here, 0.002 in the workdir"."""
    if isinstance(here, dict) and isinstance(saved, dict):
        lines = []
        for key in sorted(here.keys() | saved.keys()):
            below = f"{name}.{key}" if name else key
            lines += differences(here.get(key, _ABSENT), saved.get(key, _ABSENT), below, places)
        return lines
    # As text: 1 and 1.0 and True are equal in Python, not in a config; NaN equals itself.
    if _text(here) == _text(saved):
        return []
    return [f"{name}: {_text(here)} {places[0]}, {_text(saved)} {places[1]}"]


def _text(value: Any) -> str:
    return "absent" if value is _ABSENT else json.dumps(value, sort_keys=True)
