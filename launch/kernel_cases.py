"""What `launch.compile kernels` compiles: each kernel of ours, and what it is compared with.

A new kernel is one more Case. Its function is as launch.aot.static_cost.measure takes it; until
there is one, the peer stands alone in the table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

Kwargs = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape of one job.

    Attributes:
        name: unique.
        group: cases of one kernel; --quick compiles the first of each.
        shape: for the table.
        useful_flops: that the job needs: no hidden pairs, nothing worked out anew.
        function: ours, "module:name", or None.
        kwargs: of ours.
        peer: "module:name" of what others offer, or None.
        peer_kwargs: its settings; the one of least time is compared with.
        peer_steps: how often all of its bundles are walked, where that is data: then its cycles are
            those of an empty run.
        target: largest ratio of our time to the peer's that we are content with.
        scale: see launch.aot.static_cost.measure; of ours and of the peer.
    """

    name: str
    group: str
    shape: str
    useful_flops: float
    function: str | None = None
    kwargs: Kwargs = dataclasses.field(default_factory=dict)
    peer: str | None = None
    peer_kwargs: tuple[Kwargs, ...] = ()
    peer_steps: int | None = None
    target: float | None = None
    scale: str | None = None

    @property
    def kernels(self) -> set[str]:
        """Folders of kernels/ that it runs, as ours or to compare with."""
        return {KERNELS[f] for f in (self.function, self.peer) if f in KERNELS}


FLASH_PROGRAMS = (
    *("flash_attention", "packed_attention", "attention_at", "lambda_attention"),
    *("biased_attention", "damped_attention", "fire_attention"),
)
QUANTIZED_PROGRAMS = ("quantized_decode_attention", "scaled_decode_attention")
PEERS = "launch.kernel_peers"
TRAINING = "launch.kernel_programs_training"
FLASH = "launch.kernel_programs_attention:flash_attention"
DECODE = "launch.kernel_programs_decode"
# Which folder of kernels/ a program is about; those of others are not here.
KERNELS = {
    f"launch.kernel_programs_{file}:{program}": kernel
    for file, kernel, programs in (
        ("attention", "flash_attention", FLASH_PROGRAMS),
        ("attention", "block_sampled_attention", ("block_sampled_attention",)),
        ("training", "cross_entropy", ("cross_entropy",)),
        ("decode", "decode_attention", ("decode_attention", "paged_decode")),
        ("decode", "kv_quantize", ("kv_quantize",)),
        ("decode", "quantized_decode_attention", QUANTIZED_PROGRAMS),
    )
    for program in programs
}
CAPACITIES = (2048, 32768)
HEADS, HEAD_DIM = 8, 128
# Of others' attention: faster than 512 at 4096 tokens on v5e, v5p and v6e.
BLOCK = 1024
# (length, backward too); targets by the latter.
ATTENTION = [(4096, False), (8192, False), (4096, True), (8192, True)]
TARGETS = {False: 0.8, True: 0.75}


def causal_flops(length: int, heads: int, head_dim: int, backward: bool) -> float:
    """Two matmuls over the pairs that a causal mask shows, and four more to go back: the scores,
    which flash attention works out anew, count once.
    """
    pairs = length * (length + 1) / 2
    return (12.0 if backward else 4.0) * pairs * heads * head_dim


def _attention(peer: str, target: bool = False, steps: bool = False) -> list[Case]:
    """Causal, against others' kernels. `steps`: which blocks theirs visits is data, so the steps
    that compute are counted here; each walks all of its kernel's bundles.
    """
    cases = []
    for length, backward in ATTENTION:
        sizes = {"length": length, "heads": HEADS, "head_dim": HEAD_DIM, "backward": backward}
        group = f"{peer} {'forward + backward' if backward else 'forward'}"
        blocks = length // BLOCK
        cases.append(
            Case(
                name=f"{group} {length}",
                group=group,
                shape=f"bf16 [1, {HEADS}, {length}, {HEAD_DIM}] causal",
                useful_flops=causal_flops(length, HEADS, HEAD_DIM, backward),
                function=FLASH,
                kwargs=sizes,
                peer=f"{PEERS}:{peer}",
                peer_kwargs=({**sizes, "block": BLOCK},),
                peer_steps=HEADS * blocks * (blocks + 1) // 2 if steps else None,
                target=TARGETS[backward] if target else None,
                scale="heads",
            )
        )
    return cases


def _full_attention(peer: str) -> list[Case]:
    """Of all tokens to all: there kernels that walk lists of blocks need none, and have cycles."""
    cases = []
    for backward in (False, True):
        sizes = {"length": 4096, "heads": HEADS, "head_dim": HEAD_DIM, "backward": backward}
        sizes["causal"] = False
        group = f"full {peer} {'forward + backward' if backward else 'forward'}"
        cases.append(
            Case(
                name=f"{group} 4096",
                group=group,
                shape=f"bf16 [1, {HEADS}, 4096, {HEAD_DIM}] full",
                useful_flops=(12.0 if backward else 4.0) * 4096**2 * HEADS * HEAD_DIM,
                function=FLASH,
                kwargs=sizes,
                peer=f"{PEERS}:{peer}",
                peer_kwargs=({**sizes, "block": BLOCK},),
                scale="heads",
            )
        )
    return cases


def _lambda_attention() -> Case:
    """Against our own causal attention: one head, a long row is much to schedule."""
    length, window, num_sinks = 32768, 4096, 16
    pairs = window * (length - window) + window * (window + 1) / 2 + num_sinks * (length - window)
    sizes = {"length": length, "heads": 1, "head_dim": HEAD_DIM}
    return Case(
        name=f"lambda_attention forward {length}",
        group="lambda_attention forward",
        shape=f"bf16 [1, 1, {length}, {HEAD_DIM}], window {window}, {num_sinks} sinks",
        useful_flops=4.0 * pairs * HEAD_DIM,
        function="launch.kernel_programs_attention:lambda_attention",
        kwargs={**sizes, "window": window, "num_sinks": num_sinks},
        peer=FLASH,
        peer_kwargs=(sizes,),
        target=1 / 3,
    )


def _passes(function: str, about: str) -> list[Case]:
    """Forward, then backward too."""
    cases = []
    for backward in (False, True):
        group = f"{function} {'forward + backward' if backward else 'forward'}"
        cases.append(
            Case(
                name=f"{group} 4096",
                group=group,
                shape=f"bf16 [1, {HEADS}, 4096, {HEAD_DIM}] {about}",
                useful_flops=causal_flops(4096, HEADS, HEAD_DIM, backward),
                function=f"launch.kernel_programs_attention:{function}",
                kwargs={
                    "length": 4096,
                    "heads": HEADS,
                    "head_dim": HEAD_DIM,
                    "backward": backward,
                },
            )
        )
    return cases


def _changed_scores(function: str, about: str) -> list[Case]:
    """Against our own attention without what changes its scores: what that costs."""
    return [
        dataclasses.replace(case, peer=FLASH, peer_kwargs=(case.kwargs,), scale="heads")
        for case in _passes(function, f"causal, {about}")
    ]


def _sampled() -> list[Case]:
    """Which blocks are fetched is data, so there are bytes and bundles, and no cycles."""
    length, blocks = 32768, 64
    pairs = [max(0.05, max(d, 1) ** -0.5) * (blocks - d) for d in range(blocks)]
    share = sum(pairs) / (blocks * (blocks + 1) / 2)
    cases = []
    for backward in (False, True):
        group = f"block_sampled_attention {'forward + backward' if backward else 'forward'}"
        cases.append(
            Case(
                name=f"{group} {length}",
                group=group,
                shape=f"bf16 [1, {HEADS}, {length}, {HEAD_DIM}] {share:.0%} of causal",
                useful_flops=share * causal_flops(length, HEADS, HEAD_DIM, backward),
                function="launch.kernel_programs_attention:block_sampled_attention",
                kwargs={
                    "length": length,
                    "heads": HEADS,
                    "head_dim": HEAD_DIM,
                    "backward": backward,
                },
            )
        )
    return cases


def _cross_entropy() -> list[Case]:
    """The losses alone, and their gradients, by ours and by XLA."""
    cases = []
    for blocks in (64, 250.5):
        sizes = {"tokens": 8192, "width": 4096, "vocab_blocks": blocks}
        vocab = int(512 * blocks)
        product = 2.0 * 8192 * 4096 * vocab
        shape = f"bf16 [8192, 4096] × [4096, {vocab}]"
        for backward in (False, True):
            group = f"cross_entropy {'forward + backward' if backward else 'forward'}"
            cases.append(
                Case(
                    name=f"{group} {vocab}",
                    group=group,
                    shape=shape,
                    # Logits, and the two gradients; ours works out the logits twice.
                    useful_flops=(3 if backward else 1) * product,
                    function=f"{TRAINING}:cross_entropy",
                    kwargs={**sizes, "backward": backward},
                    scale="vocab_blocks",
                )
            )
        cases.append(
            Case(
                name=f"chunked_cross_entropy {vocab}",
                group="chunked_cross_entropy",
                shape=shape,
                useful_flops=3 * product,
                peer=f"{TRAINING}:chunked_cross_entropy",
                peer_kwargs=tuple({**sizes, "chunk": chunk} for chunk in (512, 2048)),
            )
        )
    return cases


def _quantize(bits: int) -> Case:
    """What 128 new tokens of 8 sequences cost, against a copy of them."""
    sizes = {"batch": 8, "tokens": 128, "heads": HEADS, "head_dim": HEAD_DIM}
    return Case(
        name=f"kv_quantize {bits} bits",
        group="kv_quantize",
        shape=f"bf16 [8, {HEADS}, 128, {HEAD_DIM}], keys and values, groups of 64",
        useful_flops=0.0,
        function=f"{DECODE}:kv_quantize",
        kwargs={**sizes, "bits": bits},
        peer=f"{PEERS}:plain_copy",
        peer_kwargs=(sizes,),
    )


def _decode(peer: str, settings: Kwargs, rows: int | None = None) -> list[Case]:
    """`rows`: of a cache of 8 rows and HEADS heads, those that one walk of the peer's loop has, of
    as many keys as its pages.
    """
    cases = []
    for capacity in CAPACITIES:
        sizes = _cache(capacity)
        pages = {"page": settings["page"]} if "page" in settings else {}
        steps = None
        if rows is not None:
            steps = 8 * HEADS // rows * capacity // (settings["page"] * settings["pages"])
        cases.append(
            Case(
                name=f"{peer} {capacity}",
                group=peer,
                shape=f"bf16 cache [8, {HEADS}, {capacity}, {HEAD_DIM}]",
                useful_flops=4.0 * 8 * HEADS * capacity * HEAD_DIM,
                function=f"{DECODE}:{'paged_decode' if pages else 'decode_attention'}",
                kwargs={**sizes, **pages},
                peer=f"{PEERS}:{peer}",
                peer_kwargs=({**sizes, **settings},),
                peer_steps=steps,
                scale=None if pages else "heads",
            )
        )
    return cases


def _quantized_decode(bits: int, target: float | None = None) -> Case:
    """Against our own kernel on a bfloat16 cache."""
    sizes = _cache(32768)
    return Case(
        name=f"quantized_decode {bits} bits",
        group=f"quantized_decode {bits} bits",
        shape=f"{bits}-bit cache [8, {HEADS}, 32768, {HEAD_DIM}], groups of 64",
        useful_flops=4.0 * 8 * HEADS * 32768 * HEAD_DIM,
        function=f"{DECODE}:quantized_decode_attention",
        kwargs={**sizes, "bits": bits},
        peer=f"{DECODE}:decode_attention",
        peer_kwargs=(sizes,),
        target=target,
        scale="heads",
    )


def _float8_decode() -> Case:
    """As `_quantized_decode`."""
    sizes = _cache(32768)
    return Case(
        name="quantized_decode float8",
        group="quantized_decode float8",
        shape=f"float8 cache [8, {HEADS}, 32768, {HEAD_DIM}], a scale per token",
        useful_flops=4.0 * 8 * HEADS * 32768 * HEAD_DIM,
        function=f"{DECODE}:scaled_decode_attention",
        kwargs=sizes,
        peer=f"{DECODE}:decode_attention",
        peer_kwargs=(sizes,),
        scale="heads",
    )


def _cache(capacity: int) -> dict[str, int]:
    return {"batch": 8, "capacity": capacity, "heads": HEADS, "head_dim": HEAD_DIM}


CASES = (
    *_attention("flash_attention", target=True),
    _lambda_attention(),
    *_changed_scores("biased_attention", "trained bias"),
    *_changed_scores("damped_attention", "factor of the distance"),
    # Which kinks a tile meets is data, so there are bytes and bundles, and no cycles.
    *_changed_scores("fire_attention", "FIRE, 32 units"),
    # Which blocks take part is data, so there are bytes and bundles, and no cycles.
    *_passes("packed_attention", "causal, packed"),
    *_passes("attention_at", "tokens anywhere, Λ-shaped, slopes"),
    *_sampled(),
    *_cross_entropy(),
    *_attention("splash_attention", steps=True),
    *_full_attention("splash_attention"),
    *_full_attention("tokamax_splash_attention"),
    *_decode("plain_decode", {}),
    *_decode("paged_decode", {"page": 64, "pages": 8}, rows=1),
    *_decode("ragged_paged_decode", {"page": 64, "pages": 8}, rows=HEADS),
    *(_quantize(bits) for bits in (8, 4, 2)),
    _quantized_decode(8, target=0.55),
    _quantized_decode(4, target=0.32),
    _quantized_decode(2),
    _float8_decode(),
)


def select(only: str | None, quick: bool) -> list[Case]:
    """The cases whose name contains `only`; with `quick` the first of each group.

    Raises:
        ValueError: there is none.
    """
    cases = [case for case in CASES if only is None or only in case.name]
    if not cases:
        raise ValueError(
            f"only={only!r} is part of no name; allowed: {', '.join(case.name for case in CASES)}"
        )
    if quick:
        cases = list({case.group: case for case in reversed(cases)}.values())[::-1]
    return cases
