"""What people see: errors as one line, results as a table."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping

from rich.console import Console
from rich.table import Table

from jaxlm.checkpoints import ConfigMismatchError, SaveError, WorkdirLockedError
from jaxlm.data.optional import MissingPackageError
from jaxlm.evaluation.loss import HeldOut, LossByPosition
from jaxlm.training.divergence import DivergedError

# Errors whose text already says what to do: a traceback would hide it.
EXPLAINED = (
    ValueError,
    OSError,
    MissingPackageError,
    SaveError,
    WorkdirLockedError,
    DivergedError,
)


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """Ends the process with status 1 and the text of an explained error, Ctrl-C with 130."""
    try:
        yield
    except ConfigMismatchError as error:
        print(f"error: {error}\nallowed with --allow_config_change", file=sys.stderr)
        raise SystemExit(1) from error
    except EXPLAINED as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    except KeyboardInterrupt as error:
        print("\ninterrupted; the same command goes on from what is saved", file=sys.stderr)
        raise SystemExit(130) from error


def print_held_out(results: Mapping[str, HeldOut]) -> None:
    """A row a model."""
    table = Table(title="Held-out text")
    for name in ("model", "loss (nats/token)", "perplexity", "bits/byte", "accuracy"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for name, r in results.items():
        bits = "" if r.bits_per_byte is None else f"{r.bits_per_byte:.3f}"
        table.add_row(name, f"{r.loss:.3f}", f"{r.perplexity:.2f}", bits, f"{r.accuracy:.1%}")
    Console().print(table)


def print_loss_by_position(curves: Mapping[str, LossByPosition], context_length: int) -> None:
    """A row a model, a column for each doubling of the position."""
    first = next(iter(curves.values()))
    ends, end = [], context_length
    while end < first.length:
        ends.append(end)
        end *= 2
    ends.append(first.length)
    table = Table(title=f"Loss just before a position (nats/token; trained to {context_length})")
    table.add_column("model")
    for end in ends:
        table.add_column(str(end), justify="right")
    for name, curve in curves.items():
        cells = [max(i for i, s in enumerate(curve.start) if s < end) for end in ends]
        table.add_row(name, *(f"{curve.loss[i]:.3f}" for i in cells))
    Console().print(table)
