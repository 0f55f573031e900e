"""Block sizes of flash attention by the compiler's static cycles: no TPU is needed.

python -m launch.tune_blocks --topology=v6e:2x2 --length=8192
python -m launch.tune_blocks --topology=v5e:2x2 --backward --tiles_q=128,256 --tiles_k=256,512

Prints every size that compiles in the generation's share of VMEM, fastest first, beside what
`kernels.flash_attention.blocks` has for it. The forward kernel is tuned alone; the backward kernel
beside it, both with the same sizes. Needs libtpu: pip install -e '.[tpu]'.
"""

from __future__ import annotations

import itertools
import sys
from typing import Any

from absl import app, flags
from rich.console import Console
from rich.table import Table

from kernels.flash_attention.blocks import Blocks, choose_blocks
from launch import console
from launch.aot.chips import chip_of
from launch.aot.cost import StaticCost
from launch.aot.static_cost import measure

TOPOLOGY = flags.DEFINE_string("topology", "v5e:2x2", "Generation and grid of chips.")
LENGTH = flags.DEFINE_integer("length", 4096, "Tokens of a row.")
HEADS = flags.DEFINE_integer("heads", 8, "Query heads, and as many kv heads.")
HEAD_DIM = flags.DEFINE_integer("head_dim", 128, "Of each head.")
BACKWARD = flags.DEFINE_bool("backward", False, "With the gradient.")
BLOCKS = flags.DEFINE_list("blocks", ["512", "1024", "2048"], "Queries, and keys, of a block.")
TILES_Q = flags.DEFINE_list("tiles_q", ["128", "256", "512"], "Queries of a tile.")
TILES_K = flags.DEFINE_list("tiles_k", ["256", "512", "1024"], "Keys of a tile.")
STRETCHES = flags.DEFINE_list("stretches", ["2048", "8192"], "Keys in VMEM at a time.")
EARLY = flags.DEFINE_list("early", ["0", "1"], "Tiles whose scores are begun early.")

FUNCTION = "launch.kernel_programs_attention:flash_attention"


def candidates(
    own: Blocks,
    length: int,
    blocks: list[int],
    tiles_q: list[int],
    tiles_k: list[int],
    stretches: list[int],
    early: list[int],
) -> list[Blocks]:
    """All sizes in which tiles divide blocks, blocks the stretch, and none is beyond the length.

    Args:
        own: of the table; the others may take as much of VMEM.
    """
    lengths = dict.fromkeys(min(stretch, length) for stretch in stretches)
    return [
        Blocks(block, block, q, k, stretch, own.vmem_bytes, ahead)
        for block, q, k, stretch, ahead in itertools.product(
            blocks, tiles_q, tiles_k, lengths, early
        )
        if not (block % q or block % k or stretch % block)
    ]


def cost(sizes: Blocks | None) -> StaticCost:
    """Of one call; None: with the sizes of the table."""
    kwargs: dict[str, Any] = {
        "length": LENGTH.value,
        "heads": HEADS.value,
        "head_dim": HEAD_DIM.value,
        "backward": BACKWARD.value,
    }
    if sizes is not None:
        kwargs["sizes"] = vars(sizes)
    return measure(FUNCTION, kwargs, TOPOLOGY.value, scale="heads")


def table_of(found: list[tuple[str, Blocks, StaticCost]], title: str) -> Table:
    """Fastest first."""
    table = Table(title=title)
    for name in ("", "block", "tile", "early", "stretch", "static µs", "spills", "in inner loops"):
        table.add_column(name, justify="right")
    for name, sizes, price in found:
        time = "≥ " if price.microseconds is None else ""
        table.add_row(
            name,
            f"{sizes.block_q}",
            f"{sizes.tile_q} × {sizes.tile_k}",
            f"{sizes.early}",
            f"{sizes.stretch}",
            f"{time}{price.at_least_microseconds:,.1f}" if price.compiles else "does not compile",
            f"{price.spill_stores:,}",
            f"{price.inner_spill_stores:,}",
        )
    return table


def tune() -> None:
    """Prints the table; a line for each size while it is tried."""
    chip = chip_of(TOPOLOGY.value).name
    row_bytes = HEAD_DIM.value * 2
    own = choose_blocks(LENGTH.value, chip, row_bytes)[int(BACKWARD.value)]
    lists = ([int(n) for n in flag.value] for flag in (BLOCKS, TILES_Q, TILES_K, STRETCHES, EARLY))
    found = [("table", own, cost(None))]
    for sizes in candidates(own, LENGTH.value, *lists):
        price = cost(sizes)
        found.append(("", sizes, price))
        time = f"{price.at_least_microseconds:,.1f} µs" if price.compiles else price.error
        print(f"{sizes}: {time}", file=sys.stderr)
    found.sort(key=lambda row: (not row[2].compiles, row[2].at_least_microseconds))
    title = f"flash_attention, {TOPOLOGY.value}, {LENGTH.value} tokens: static estimates"
    Console().print(table_of(found, title))


def main(argv: list[str]) -> None:
    """No arguments but flags."""
    del argv
    with console.clear_errors():
        tune()


if __name__ == "__main__":
    app.run(main)
