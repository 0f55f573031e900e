"""What people see: errors as one line, results as a table."""

from __future__ import annotations

import contextlib
import logging as python_logging
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import jax
from absl import logging
from rich.console import Console
from rich.table import Table

from jaxlm.checkpoints import ConfigMismatchError, SaveError, WorkdirLockedError
from jaxlm.data.optional import MissingPackageError
from jaxlm.evaluation.loss import HeldOut, LossByPosition
from jaxlm.sharding.processes import OtherProcessError
from jaxlm.training.divergence import DivergedError
from jaxlm.training.stopping import Interrupt

# Errors whose text already says what to do: a traceback would hide it.
EXPLAINED = (
    ValueError,
    OSError,
    OverflowError,
    MissingPackageError,
    SaveError,
    WorkdirLockedError,
    DivergedError,
    OtherProcessError,
)

# A loop says how far it is when it starts, and not more often than this.
SECONDS_BETWEEN_LINES = 10.0

# Columns of what is no terminal: a file or a pipe, which takes lines of any length.
WIDEST = 10_000


@contextlib.contextmanager
def clear_errors(goes_on: bool = False) -> Iterator[None]:
    """Ends the process with status 1 and the text of an explained error (--verbosity=1 shows where
    it was raised), and with 130 on Ctrl-C or SIGTERM.

    Args:
        goes_on: the same command, started again, takes up what it had done.
    """
    # JAX says at INFO which backends it did not find.
    python_logging.getLogger("jax").setLevel(python_logging.WARNING)
    # Training takes both signals over while it has a state to save. Shells start background jobs
    # with SIGINT ignored: whoever sends it all the same means it.
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {n: signal.signal(n, Interrupt()) for n in numbers}
    try:
        yield
    except ConfigMismatchError as error:
        print(f"error: {error}\nallowed with --allow_config_change", file=sys.stderr)
        raise SystemExit(1) from error
    except EXPLAINED as error:
        logging.debug("raised here:", exc_info=True)
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    except MemoryError as error:
        logging.debug("raised here:", exc_info=True)
        print(f"error: not enough memory: {error or 'none is left on the host'}", file=sys.stderr)
        raise SystemExit(1) from error
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        logging.debug("raised here:", exc_info=True)
        print(f"error: not enough memory: {str(error).splitlines()[0]}", file=sys.stderr)
        raise SystemExit(1) from error
    except KeyboardInterrupt as error:
        more = "; the same command goes on from what is saved" if goes_on else ""
        print(f"\ninterrupted{more}", file=sys.stderr)
        raise SystemExit(130) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


T = TypeVar("T")


def tracked(items: Sequence[T], what: str) -> Iterator[T]:
    """The items, while lines on stderr say how many are done and how long the rest may take."""
    start = last = time.monotonic()
    print(f"{what}: 0/{len(items)}", file=sys.stderr, flush=True)
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if done == len(items) or now - last >= SECONDS_BETWEEN_LINES:
            took = now - start
            left = took / done * (len(items) - done)
            told = f"{took:,.0f} s" + (f", about {left:,.0f} s left" if left else "")
            print(f"{what}: {done}/{len(items)}, {told}", file=sys.stderr, flush=True)
            last = now


def print_held_out(results: Mapping[str, HeldOut]) -> None:
    """A row a model."""
    rows = {}
    for name, r in results.items():
        bits = "" if r.bits_per_byte is None else f"{r.bits_per_byte:.3f}"
        rows[name] = (f"{r.loss:.3f}", f"{r.perplexity:.2f}", bits, f"{r.accuracy:.1%}")
    columns = ("loss (nats/token)", "perplexity", "bits/byte", "accuracy")
    _print_table("Held-out text", columns, rows)


def print_loss_by_position(curves: Mapping[str, LossByPosition], context_length: int) -> None:
    """A row a model, a column for each doubling of the position.

    A column is the mean of one bucket, the last that ends at or before the doubled position (or
    the first, where none does), and its heading is where that bucket ends. They begin at the
    trained length, or up to three halvings before it: a bucket more than half as long as the
    position would hold tokens with next to no context.
    """
    first = next(iter(curves.values()))
    ends = [*first.start[1:], first.length]
    chosen, position = [], context_length
    for _ in range(3):
        position = position // 2 if position // 2 >= 2 * ends[0] else position
    while position < first.length:
        chosen.append(max((i for i, end in enumerate(ends) if end <= position), default=0))
        position *= 2
    cells = sorted({*chosen, len(ends) - 1})
    title = f"Loss just before a position (nats/token; trained to {context_length})"
    rows = {name: [f"{curve.loss[i]:.3f}" for i in cells] for name, curve in curves.items()}
    _print_table(title, [str(ends[i]) for i in cells], rows)


def print_passkeys(found: Mapping[str, Mapping[int, float]], count: int) -> None:
    """A row a model, a column a length."""
    lengths = list(next(iter(found.values())))
    rows = {name: [f"{by_length[n]:.0%}" for n in lengths] for name, by_length in found.items()}
    _print_table(
        f"Pass keys found, of {count}, by tokens of the text", list(map(str, lengths)), rows
    )


def _print_table(title: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> None:
    """Models and their figures, none of them cut: a file gets whole lines, a terminal folds."""
    table = Table(title=title)
    table.add_column("model", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", overflow="fold")
    for name, cells in rows.items():
        table.add_row(name, *cells)
    width = None if sys.stdout.isatty() else WIDEST
    Console(width=width, markup=False, emoji=False).print(table)
