"""GGUF's tensors, and the parameters they hold: one table for all architectures.

Matrices are stored outputs first, whatever the hub does, and experts stand in one tensor.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from jaxlm.interop.rows import Row, linear, norm

LAYER = "blk.{layer}."
NORMS = {
    "attn_norm": "attention_norm",
    "post_attention_norm": "attention_post_norm",
    "ffn_norm": "feed_forward_norm",
    "post_ffw_norm": "feed_forward_post_norm",
    "attn_q_norm": "attention/q_norm",
    "attn_k_norm": "attention/k_norm",
}
MATRICES = ("gate", "up", "down")


def _heads(theirs: str, ours: str, head: str, turned: str) -> list[Row]:
    """Queries, keys or values; a head's rows as `head` has them there, as `turned` here."""
    weight, bias = f"(n {head}) d -> d n {turned}", f"(n {head}) -> n {turned}"
    return linear(f"{LAYER}{theirs}", f"attention/{ours}", weight, bias)


ROWS: tuple[Row, ...] = (
    Row("token_embd.weight", "embedding", "v d -> v d"),
    Row("position_embd.weight", "position/table", "t d -> t d"),
    *norm("token_embd_norm", "embedding_norm", True),
    *norm("output_norm", "final_norm", True),
    Row("output.weight", "head", "v d -> d v"),
    *(row for theirs, ours in NORMS.items() for row in norm(f"{LAYER}{theirs}", ours, True)),
    *(row for name in "qkv" for row in _heads(f"attn_{name}", name, "h", "h")),
    *linear(f"{LAYER}attn_output", "attention/out", "d (n h) -> n h d", "d -> d"),
    Row(f"{LAYER}attn_sinks.weight", "attention/sink_logits", "n -> n"),
    *linear(f"{LAYER}ffn_gate_inp", "experts/router", "e d -> d e", "e -> e"),
    Row(f"{LAYER}ffn_gate_inp_shexp.weight", "experts/shared_gate/kernel", "(o i) -> i o"),
    *(
        row
        for name in MATRICES
        for row in (
            *linear(f"{LAYER}ffn_{name}", f"feed_forward/{name}", "o i -> i o", "o -> o"),
            *linear(f"{LAYER}ffn_{name}_shexp", f"experts/shared/{name}", "o i -> i o"),
            Row(f"{LAYER}ffn_{name}_exps.weight", f"experts/{name}", "e o i -> e i o"),
            Row(f"{LAYER}ffn_{name}_exps.bias", f"experts/{name}_bias", "e o -> e o"),
        )
    ),
)

# What some architectures have instead, where it is there.
# Queries and keys for a rotation of neighbouring dims (2i, 2i + 1).
PAIRED = tuple(row for name in "qk" for row in _heads(f"attn_{name}", name, "r 2", "(2 r)"))
QKV = tuple(
    linear(
        f"{LAYER}attn_qkv",
        "attention/q attention/k attention/v",
        "(p h) d -> d p h",
        "(p h) -> p h",
    )
)
GATE_AND_UP = (
    Row(
        f"{LAYER}ffn_up.weight",
        "feed_forward/gate/kernel feed_forward/up/kernel",
        "p d -> d p",
    ),
)
# Mixtral's, in files before March 2024.
EXPERT_BY_EXPERT = tuple(
    Row(f"{LAYER}ffn_{name}.{{expert}}.weight", f"experts/{name}", "o i -> i o")
    for name in MATRICES
)
# Falcon 40B's two norms.
FALCON_NORMS = (
    *norm(f"{LAYER}attn_norm_2", "attention_norm", True),
    *norm(f"{LAYER}attn_norm", "feed_forward_norm", True),
)
GPT_OSS_NORMS = tuple(norm(f"{LAYER}post_attention_norm", "feed_forward_norm", False))


def gguf_rows(hub: Sequence[Row], instead: Sequence[Row], names: Collection[str]) -> list[Row]:
    """A model's rows under GGUF's names.

    Args:
        hub: its rows under the hub's names, which tell the parameters it has.
        instead: rows that take the place of those of all architectures where their tensors are
            among `names`.
        names: of the file's tensors.
    """
    wanted = {path for row in hub for path in row.paths}
    chosen = {row.ours: row for row in ROWS if row.ours in wanted}
    for row in instead:
        if row.theirs.format(layer=0, expert=0) in names and wanted.issuperset(row.paths):
            chosen |= dict.fromkeys(row.paths, row)
    return list(dict.fromkeys(chosen.values()))
