"""How fast training and decoding are, against what this machine can do and against a peer.

python -m launch.benchmark train --d_model=256 --num_layers=4 --batch_size=8 --length=512
python -m launch.benchmark decode --batch_size=1 --peer=transformers --output=decode.json
python -m launch.benchmark decode --checkpoint=MODEL.gguf --batch_size=1 --peer=transformers
python -m launch.benchmark decode --methods='greedy,beam(num_beams=4)' --caches='dense,ring(64)'
python -m launch.benchmark load --checkpoint=MODEL.gguf --rounds=3 --peer=transformers
python -m launch.benchmark save --d_model=512 --num_layers=8 --batch_size=8

A peer is measured in a process of its own, one repetition of each in turn, so that a busy machine
slows both; ratios are medians over the rounds. `--peer_python` names the interpreter of an
environment that has torch and transformers, where this one has not. Of a checkpoint the peer gets
the same weights, as `launch.convert` writes them.

With `--methods` or `--caches` there is a table of all of the ones on all of the others: on a
checkpoint, of prompts from `--text`; on a model of given sizes all weights and texts are random.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from rich.console import Console
from rich.table import Table

import jaxlm
from jaxlm.adapters.quantize import quantize_params
from jaxlm.caches.dense import Dense
from jaxlm.data.documents import long_windows
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.decoding import engine
from jaxlm.decoding.sampling import Sampling
from jaxlm.interop.write import write_hub_folder
from jaxlm.model.config import AttentionConfig, ModelConfig, NumericsConfig
from jaxlm.model.parameters import count_params, init_params
from jaxlm.model.transformer import Transformer
from jaxlm.training.config import TrainConfig
from jaxlm.training.flops import (
    copy_bandwidth,
    matmul_parameters,
    matmul_peak,
    train_flops_per_token,
)
from jaxlm.training.optimizers import make_optimizer
from jaxlm.training.state import init_state
from jaxlm.training.step import make_train_step
from launch import benchmark_load, benchmark_methods, benchmark_save, console
from launch.benchmark_peer import Peer

CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    None,
    "decode: a workdir, a Hugging Face folder, or a GGUF file, in place of a model of these sizes.",
)
D_MODEL = flags.DEFINE_integer("d_model", 256, "Width.", lower_bound=1)
NUM_LAYERS = flags.DEFINE_integer("num_layers", 4, "Depth.", lower_bound=1)
NUM_HEADS = flags.DEFINE_integer(
    "num_heads", 8, "Query heads, and as many kv heads.", lower_bound=1
)
VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 8192, "Vocabulary.", lower_bound=1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Rows.", lower_bound=1)
LENGTH = flags.DEFINE_integer("length", 512, "train: tokens a row.", lower_bound=1)
PROMPT_LENGTH = flags.DEFINE_integer(
    "prompt_length",
    None,
    "decode: tokens of a prompt. Default: 128, of a checkpoint 1024.",
    lower_bound=1,
)
NEW_TOKENS = flags.DEFINE_integer(
    "new_tokens", 128, "decode: tokens drawn for each prompt.", lower_bound=2
)
ENCODING = flags.DEFINE_string(
    "position_encoding", None, "Of our model. Default: the checkpoint's own, or rope: the peer's."
)
DTYPE = flags.DEFINE_string("dtype", "float32", "Of activations.")
UNROLL = flags.DEFINE_bool(
    "unroll", False, "Layers apart in place of one loop over them; see jaxlm.model.layouts."
)
QUANTIZE = flags.DEFINE_enum(
    "quantize", None, ["int8", "int4"], "decode: matrices, embedding and head in so many bits."
)
ROUNDS = flags.DEFINE_integer("rounds", 8, "Repetitions.", lower_bound=1)
METHODS = flags.DEFINE_string(
    "methods", None, "decode: several, with commas: greedy, and jaxlm.decoding.search's."
)
CACHES = flags.DEFINE_string("caches", None, "decode: several, with commas, of jaxlm.caches.")
TEXT = flags.DEFINE_string(
    "text", "builtin:austen_valid", "decode --methods of a checkpoint: where prompts come from."
)
PEER = flags.DEFINE_enum("peer", "", ["", "transformers"], "Measured in turn with us.")
PEER_PYTHON = flags.DEFINE_string("peer_python", sys.executable, "Interpreter of the peer.")
OUTPUT = flags.DEFINE_string("output", None, "File of the figures as JSON.")


@dataclasses.dataclass(frozen=True)
class Work:
    """What is measured.

    Attributes:
        run: one repetition; the seconds of each of its phases.
        tokens: that each phase is about.
        model: ours.
        parameters: of it.
        flops: of model arithmetic in each phase, as far as it is known.
        bytes: that each phase cannot but read, as far as they are known.
        state: what the last repetition left, where there is such a thing.
    """

    run: Callable[[], dict[str, float]]
    tokens: Mapping[str, int]
    model: Transformer
    parameters: int
    flops: Mapping[str, float] = dataclasses.field(default_factory=dict)
    bytes: Mapping[str, float] = dataclasses.field(default_factory=dict)
    state: Callable[[], Any] = lambda: None


def prompt_length() -> int:
    """Tokens of a prompt."""
    return PROMPT_LENGTH.value or (128 if CHECKPOINT.value is None else 1024)


def model_of_sizes() -> Transformer:
    """The model that the flags describe."""
    return Transformer(
        ModelConfig(
            vocab_size=VOCAB_SIZE.value,
            num_layers=NUM_LAYERS.value,
            d_model=D_MODEL.value,
            context_length=max(LENGTH.value, prompt_length() + NEW_TOKENS.value),
            position_encoding=ENCODING.value or "rope",
            attention=AttentionConfig(num_heads=NUM_HEADS.value),
            numerics=NumericsConfig(dtype=DTYPE.value, scan_layers=not UNROLL.value),
        )
    )


@functools.cache
def checkpoint() -> tuple[Transformer, Any, Tokenizer]:
    """The one to measure, computed and kept in the dtype of activations."""
    for flag in (D_MODEL, NUM_LAYERS, NUM_HEADS, VOCAB_SIZE):
        if flags.FLAGS[flag.name].present:
            given = f"{flag.name}={flag.value} beside checkpoint={CHECKPOINT.value!r}"
            raise ValueError(f"{given}; allowed: one of them")
    path, dtype = CHECKPOINT.value, DTYPE.value
    assert path is not None
    model, params, tokenizer = jaxlm.load(path, dtype=dtype, param_dtype=dtype, unroll=UNROLL.value)
    if not isinstance(model, Transformer):
        raise ValueError(f"checkpoint={CHECKPOINT.value!r}; allowed: no encoder–decoder")
    return model, params, tokenizer


def train_work() -> Work:
    """One optimizer step (AdamW, clipping) on random tokens."""
    if CHECKPOINT.value is not None:
        raise ValueError(f"checkpoint={CHECKPOINT.value!r}; allowed: with decode")
    model, config = model_of_sizes(), TrainConfig(steps=10_000)
    optimizer = make_optimizer(config.optimizer, config.steps)
    step = jax.jit(make_train_step(model, optimizer, config), donate_argnums=0)
    shape = (BATCH_SIZE.value, LENGTH.value)
    rows = jax.random.randint(jax.random.key(1), (shape[0], shape[1] + 1), 0, VOCAB_SIZE.value)
    batch = {
        "tokens": rows[:, :-1],
        "targets": rows[:, 1:],
        "positions": jnp.broadcast_to(jnp.arange(shape[1])[None], shape),
        "segment_ids": jnp.ones(shape, jnp.int32),
        "loss_weights": jnp.ones(shape, jnp.float32),
    }
    state = init_state(model, optimizer, config)
    parameters = count_params(state.params)

    def run() -> dict[str, float]:
        nonlocal state
        start = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        return {"train": time.perf_counter() - start}

    tokens = shape[0] * shape[1]
    flops = tokens * train_flops_per_token(model.config, shape[1])
    counted = {"train": tokens}
    return Work(run, counted, model, parameters, {"train": flops}, state=lambda: state)


def decoder() -> tuple[Transformer, Any]:
    """The model that decodes, and its parameters."""
    if CHECKPOINT.value is None:
        model = model_of_sizes()
        params: Any = init_params(model)
    else:
        model, params, _ = checkpoint()
        if ENCODING.value is not None:
            model = model.with_position_encoding(ENCODING.value)
    if QUANTIZE.value is not None:
        params = quantize_params(params, QUANTIZE.value, tables=True)
    return model, params


def decode_work() -> Work:
    """Greedy continuation of random prompts to a fixed length: the prompts read, which gives each
    its first token; the others drawn; and both together.
    """
    model, params = decoder()
    rows, new, length = BATCH_SIZE.value, NEW_TOKENS.value, prompt_length()
    shape = (rows, length)
    tokens = jax.random.randint(jax.random.key(1), shape, 0, model.config.vocab_size)
    lengths = jnp.full(rows, length, jnp.int32)
    sampling, never = Sampling.make(rows), jnp.zeros(0, jnp.int32)

    def run() -> dict[str, float]:
        start = time.perf_counter()
        cache = Dense().init(model.config, rows, length + new)
        state = engine.prefill(model, params, (tokens, lengths), cache, new, sampling, never)
        state.tokens.block_until_ready()
        read = time.perf_counter()
        state = engine.decode(model, params, state, jnp.asarray(new), sampling, never)
        state.tokens.block_until_ready()
        end = time.perf_counter()
        assert (state.drawn == new).all()
        return {"prefill": read - start, "decode": end - read, "generate": end - start}

    bits = jnp.finfo(model.config.param_dtype).bits
    if QUANTIZE.value is not None:
        bits = jnp.iinfo(QUANTIZE.value).bits
    weights = matmul_parameters(model.config) * bits / 8
    kept = Dense().nbytes_of(model.config, rows, length + new // 2)
    counted = {"prefill": rows * length, "decode": rows * (new - 1), "generate": rows * new}
    reads = {"decode": float((new - 1) * (weights + kept))}
    return Work(run, counted, model, count_params(params), bytes=reads)


def compare_methods() -> list[benchmark_methods.Decoding]:
    """All methods on all caches.

    Raises:
        ValueError: an unknown one, or a flag that has no meaning here.
    """
    if PEER.value:
        raise ValueError(f"peer={PEER.value!r} beside methods and caches; allowed: no peer")
    model, params = decoder()
    length = prompt_length()
    shape = (BATCH_SIZE.value, length + NEW_TOKENS.value)
    if CHECKPOINT.value is None:
        drawn = jax.random.randint(jax.random.key(1), shape, 0, model.config.vocab_size)
        windows = np.asarray(drawn)
    else:
        windows = long_windows(TEXT.value, checkpoint()[2], shape[1] - 1, shape[0])
    names = (
        benchmark_methods.listed("methods", METHODS.value or benchmark_methods.GREEDY),
        benchmark_methods.listed("caches", CACHES.value or "dense"),
    )
    return benchmark_methods.measure(
        model, params, windows, length, NEW_TOKENS.value, names, ROUNDS.value
    )


WORK = {"train": train_work, "decode": decode_work}


def start_peer(what: str, folder: str) -> Peer:
    """The peer, with our sizes or, through `folder`, with the checkpoint's weights."""
    sizes = [D_MODEL, NUM_LAYERS, NUM_HEADS, VOCAB_SIZE, BATCH_SIZE, DTYPE, LENGTH, NEW_TOKENS]
    settings = {flag.name: flag.value for flag in sizes}
    settings |= {"what": what, "prompt_length": prompt_length(), "checkpoint": None}
    if CHECKPOINT.value is not None:
        model, params, tokenizer = checkpoint()
        write_hub_folder(Path(folder) / "hub", model, params, tokenizer)
        settings |= {"checkpoint": f"{folder}/hub", "vocab_size": model.config.vocab_size}
    return Peer(PEER_PYTHON.value, settings)


def measure(what: str) -> dict[str, Any]:
    """All figures of one benchmark."""
    work = WORK[what]()
    start = time.perf_counter()
    work.run()
    first = time.perf_counter() - start
    work.run()
    ours: list[dict[str, float]] = []
    theirs: list[dict[str, float]] = []
    peaks, copies, about = [], [], None
    with tempfile.TemporaryDirectory() as folder:
        peer = start_peer(what, folder) if PEER.value else None
        for _ in range(ROUNDS.value):
            peaks.append(matmul_peak())
            copies.append(copy_bandwidth(repeats=1))
            ours.append(work.run())
            if peer is not None:
                theirs.append(peer.run())
        if peer is not None:
            about = peer.about
            peer.close()
    figures: dict[str, Any] = {
        "benchmark": what,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "parameters": work.parameters,
        "first_run_seconds": first,
        "matmul_peak_gflops": max(peaks) / 1e9,
        "copy_gb_per_second": max(copies) / 1e9,
    }
    for phase, tokens in work.tokens.items():
        median = statistics.median(r[phase] for r in ours)
        figures[f"{phase}_tokens_per_second"] = tokens / median
        figures[f"{phase}_tokens_per_second_best"] = tokens / min(r[phase] for r in ours)
        if phase in work.flops:
            figures[f"{phase}_gflops"] = work.flops[phase] / median / 1e9
            figures[f"{phase}_matmul_peak_share"] = work.flops[phase] / median / max(peaks)
        if phase in work.bytes:
            figures[f"{phase}_gb_per_second"] = work.bytes[phase] / median / 1e9
            figures[f"{phase}_copy_share"] = work.bytes[phase] / median / max(copies)
        if theirs:
            took = statistics.median(r[phase] for r in theirs)
            figures[f"{phase}_peer_tokens_per_second"] = tokens / took
            ratios = [b[phase] / a[phase] for a, b in zip(ours, theirs, strict=True)]
            figures[f"{phase}_ratio_to_peer"] = statistics.median(ratios)
    return figures if about is None else {**figures, "peer": about}


def show(figures: dict[str, Any]) -> None:
    """The figures as a table."""
    table = Table("", "", title=f"launch.benchmark {figures['benchmark']}", show_header=False)
    for name, value in figures.items():
        table.add_row(name, f"{value:,.3g}" if isinstance(value, float) else str(value))
    Console().print(table)


def main(argv: list[str]) -> None:
    """Prints a table and, with --output, writes JSON."""
    if argv[1:] not in [["train"], ["decode"], ["load"], ["save"]]:
        raise app.UsageError("say what to measure: train, decode, load or save")
    figures: Any
    with console.clear_errors():
        if OUTPUT.value is not None:  # what cannot be written is told before anything is measured
            Path(OUTPUT.value).parent.mkdir(parents=True, exist_ok=True)
            Path(OUTPUT.value).touch()
        if argv[1] == "load":
            if CHECKPOINT.value is None:
                raise ValueError("checkpoint is absent; allowed: with load, what is to be loaded")
            python = PEER_PYTHON.value if PEER.value else None
            figures = benchmark_load.measure(CHECKPOINT.value, ROUNDS.value, python)
            show(figures)
        elif argv[1] == "save":
            if PEER.value:
                raise ValueError(f"peer={PEER.value!r} beside save; allowed: no peer")
            work = train_work()
            figures = benchmark_save.measure(work.run, work.state, ROUNDS.value)
            show(figures)
        elif METHODS.value is None and CACHES.value is None:
            figures = measure(argv[1])
            show(figures)
        elif argv[1] == "decode":
            rows = compare_methods()
            # A file has no width; a terminal has its own.
            wide = None if sys.stdout.isatty() else 160
            Console(width=wide).print(benchmark_methods.as_table(rows))
            figures = [dataclasses.asdict(row) for row in rows]
        else:
            raise ValueError("methods and caches are given; allowed: with decode")
    text = json.dumps(figures, indent=1) + "\n"
    if OUTPUT.value is None:
        print(text, end="")
    else:
        Path(OUTPUT.value).write_text(text)


if __name__ == "__main__":
    app.run(main)
