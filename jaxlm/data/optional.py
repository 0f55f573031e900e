"""Packages that only some data needs."""

from __future__ import annotations

import importlib
from typing import Any


class MissingPackageError(ImportError):
    """An optional package is not installed; the text says for what, and how to get it."""


def optional(module: str, what: str, extra: str = "hf") -> Any:
    """The module.

    Args:
        module: its full name.
        what: needs it, e.g. the path of a file.
        extra: of ours that installs it.

    Raises:
        MissingPackageError: its package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MissingPackageError(f"{what} needs {package}: pip install -e '.[{extra}]'") from error
