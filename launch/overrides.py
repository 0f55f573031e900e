"""Command lines with --config=FILE and --config.model.num_layers=8, and errors that help."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from jaxlm.training.run import RunConfig

OVERRIDE = ("--config.", "-config.")
CONFIG = ("--config", "-config")
SOURCES = ("config.data.sources", "config.data.held_out")


def parse(argv: Sequence[str]) -> list[str]:
    """A `flags_parser` for `app.run`: a field that the config lacks is an error of one line, any
    field can be set to None, and --config.data.sources=a.txt,b.txt is two sources.

    Without it, ml_collections answers with a traceback of its own, and reads neither.
    """
    for argument, after in zip(argv, [*argv[1:], ""], strict=True):
        name, given, file = argument.partition("=")
        file = file if given else after  # --config FILE
        path = Path(file.partition(":")[0])
        if name in CONFIG and not (path.suffix == ".py" and path.is_file()):
            told = f"{name}={file}; allowed: a Python file that is there, as configs/tiny.py"
            print(f"error: {told}", file=sys.stderr)
            raise SystemExit(1)
    cleared = [a for a in argv if a.startswith(OVERRIDE) and a.endswith("=None")]
    try:
        rest = app.parse_flags_with_usage([_quoted(a) for a in argv if a not in cleared])
        for override in cleared:
            clear(flags.FLAGS["config"].value, override)
        return rest
    except (AttributeError, KeyError, TypeError, ValueError, FileNotFoundError) as error:
        print(f"error: {unknown_field(argv) or error}", file=sys.stderr)
        raise SystemExit(1) from error


def run_of(config: Any) -> RunConfig:
    """Of what the get_config() of --config's file returned.

    Raises:
        ValueError: it is no ConfigDict, or its fields are no run's.
    """
    if not isinstance(config, ConfigDict):
        raise ValueError(f"get_config() gave {config!r}; allowed: an ml_collections.ConfigDict")
    return RunConfig.from_dict(config.to_dict())


def _quoted(argument: str) -> str:
    """Addresses with commas between as one string, which DataConfig takes apart."""
    name, _, value = argument.partition("=")
    plain = name.lstrip("-") in SOURCES and value and value[0] not in "([\"'"
    return f"{name}={value!r}" if plain else argument


def clear(config: ConfigDict, override: str) -> None:
    """Sets the field of "--config.train.optimizer.clip_norm=None".

    Raises:
        AttributeError: no such field.
    """
    *path, name = _path(override)
    for part in path:
        config = config[part]
    if name not in config:
        raise AttributeError(override)
    with config.ignore_type():
        config[name] = None


def unknown_field(argv: Sequence[str]) -> str | None:
    """What is wrong with the first override that names no field; None if all do."""
    overrides = [a for a in argv[1:] if a.startswith(OVERRIDE)]
    files = [a for a in argv[1:] if a.partition("=")[0] in CONFIG]
    if not overrides or not files:
        return None
    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=files)
    values([argv[0], *files])
    for override in overrides:
        path = _path(override)
        node: Any = config.value
        for i, name in enumerate(path):
            owner = ".".join(["config", *path[:i]])
            if not isinstance(node, ConfigDict):
                return f"{override}: {owner} has no fields; allowed: --{owner}=VALUE"
            if name not in node:
                known = list(node)
                near = difflib.get_close_matches(name, known, 1)
                hint = f" (did you mean {near[0]}?)" if near else ""
                return (
                    f"{override}: {owner} has no field {name!r}{hint}; allowed: {', '.join(known)}"
                )
            node = node[name]
    return None


def _path(override: str) -> list[str]:
    """["train", "steps"] of "--config.train.steps=8"."""
    return override.lstrip("-").partition("=")[0].split(".")[1:]
