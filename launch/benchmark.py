"""How fast training and decoding are, against this machine's matmul peak and against a peer.

python -m launch.benchmark train --d_model=256 --num_layers=4 --batch_size=8 --length=512
python -m launch.benchmark decode --batch_size=1 --peer=transformers --output=decode.json

A peer is measured in a process of its own, one repetition of each in turn, so that a busy machine
slows both; ratios are medians over the rounds. `--peer_python` names the interpreter of an
environment that has torch and transformers, where this one has not.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from rich.console import Console
from rich.table import Table

from jaxlm.caches.dense import DenseCache
from jaxlm.decoding import engine
from jaxlm.decoding.sampling import Sampling
from jaxlm.model.config import AttentionConfig, ModelConfig, NumericsConfig
from jaxlm.model.parameters import count_params, init_params
from jaxlm.model.transformer import Transformer
from jaxlm.training.config import TrainConfig
from jaxlm.training.flops import matmul_peak, train_flops_per_token
from jaxlm.training.optimizers import make_optimizer
from jaxlm.training.state import init_state
from jaxlm.training.step import make_train_step
from launch import console

D_MODEL = flags.DEFINE_integer("d_model", 256, "Width.", lower_bound=1)
NUM_LAYERS = flags.DEFINE_integer("num_layers", 4, "Depth.", lower_bound=1)
NUM_HEADS = flags.DEFINE_integer(
    "num_heads", 8, "Query heads, and as many kv heads.", lower_bound=1
)
VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 8192, "Vocabulary.", lower_bound=1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Rows.", lower_bound=1)
LENGTH = flags.DEFINE_integer("length", 512, "train: tokens a row.", lower_bound=1)
PROMPT_LENGTH = flags.DEFINE_integer(
    "prompt_length", 128, "decode: tokens of a prompt.", lower_bound=1
)
NEW_TOKENS = flags.DEFINE_integer(
    "new_tokens", 128, "decode: tokens drawn for each prompt.", lower_bound=1
)
ENCODING = flags.DEFINE_string("position_encoding", "rope", "Of our model; the peer's is RoPE.")
DTYPE = flags.DEFINE_string("dtype", "float32", "Of activations.")
ROUNDS = flags.DEFINE_integer("rounds", 8, "Repetitions.", lower_bound=1)
PEER = flags.DEFINE_enum("peer", "", ["", "transformers"], "Measured in turn with us.")
PEER_PYTHON = flags.DEFINE_string("peer_python", sys.executable, "Interpreter of the peer.")
OUTPUT = flags.DEFINE_string("output", None, "File of the figures as JSON.")


@dataclasses.dataclass(frozen=True)
class Work:
    """One repetition of something, and how many tokens it is about."""

    run: Callable[[], None]
    tokens: int
    parameters: int
    flops_per_token: float | None = None


def _model() -> Transformer:
    return Transformer(
        ModelConfig(
            vocab_size=VOCAB_SIZE.value,
            num_layers=NUM_LAYERS.value,
            d_model=D_MODEL.value,
            context_length=max(LENGTH.value, PROMPT_LENGTH.value + NEW_TOKENS.value),
            position_encoding=ENCODING.value,
            attention=AttentionConfig(num_heads=NUM_HEADS.value),
            numerics=NumericsConfig(dtype=DTYPE.value),
        )
    )


def train_work() -> Work:
    """One optimizer step (AdamW, clipping) on random tokens."""
    model, config = _model(), TrainConfig(steps=10_000)
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

    def run() -> None:
        nonlocal state
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))

    flops = train_flops_per_token(model.config, LENGTH.value)
    return Work(run, shape[0] * shape[1], parameters, flops)


def decode_work() -> Work:
    """Greedy continuation of random prompts to a fixed length, prefill included."""
    model, rows, new = _model(), BATCH_SIZE.value, NEW_TOKENS.value
    params = init_params(model)
    shape = (rows, PROMPT_LENGTH.value)
    tokens = jax.random.randint(jax.random.key(1), shape, 0, VOCAB_SIZE.value)
    lengths = jnp.full(rows, shape[1], jnp.int32)
    sampling, never = Sampling.make(rows), jnp.zeros(0, jnp.int32)

    def run() -> None:
        cache = DenseCache.init(model.config, rows, shape[1] + new)
        prompt = (tokens, lengths)
        state = engine.prefill(model, params, prompt, cache, new, sampling, never)
        state = engine.decode(model, params, state, jnp.asarray(new), sampling, never)
        assert np.asarray(state.tokens).shape == (rows, new)

    return Work(run, rows * new, count_params(params))


WORK = {"train": train_work, "decode": decode_work}


class Peer:
    """A child process that does one repetition a request."""

    def __init__(self, what: str):
        sizes = [D_MODEL, NUM_LAYERS, NUM_HEADS, VOCAB_SIZE, BATCH_SIZE, DTYPE]
        sizes += [LENGTH] if what == "train" else [PROMPT_LENGTH, NEW_TOKENS]
        settings = {"what": what, **{flag.name: flag.value for flag in sizes}}
        script = Path(__file__).with_name("benchmark_transformers.py")
        self._process = subprocess.Popen(
            [PEER_PYTHON.value, str(script), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # A waiting peer must not spin on the cores that we are measured on.
            env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"},
        )
        self.about = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ValueError(
                f"--peer={PEER.value} failed to start with --peer_python={PEER_PYTHON.value}; "
                "allowed: an interpreter that imports torch and transformers"
            )
        return json.loads(line)

    def run(self) -> float:
        """Seconds of one repetition."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self._answer()["seconds"]

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def measure(what: str) -> dict[str, Any]:
    """All figures of one benchmark."""
    work = WORK[what]()
    start = time.perf_counter()
    work.run()
    first = time.perf_counter() - start
    work.run()
    peer = Peer(what) if PEER.value else None
    ours, theirs, peaks = [], [], []
    for _ in range(ROUNDS.value):
        peaks.append(matmul_peak(repeats=1))
        start = time.perf_counter()
        work.run()
        ours.append(time.perf_counter() - start)
        if peer is not None:
            theirs.append(peer.run())
    figures: dict[str, Any] = {
        "benchmark": what,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "parameters": work.parameters,
        "first_run_seconds": first,
        "matmul_peak_gflops": max(peaks) / 1e9,
        "tokens_per_second": work.tokens / statistics.median(ours),
        "tokens_per_second_best": work.tokens / min(ours),
    }
    if work.flops_per_token is not None:
        rate = figures["tokens_per_second"] * work.flops_per_token
        figures["model_gflops"] = rate / 1e9
        figures["matmul_peak_share"] = rate / max(peaks)
    if peer is not None:
        peer.close()
        figures["peer"] = peer.about
        figures["peer_tokens_per_second"] = work.tokens / statistics.median(theirs)
        ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
        figures["ratio_to_peer"] = statistics.median(ratios)
    return figures


def show(figures: dict[str, Any]) -> None:
    """The figures as a table."""
    table = Table("", "", title=f"launch.benchmark {figures['benchmark']}", show_header=False)
    for name, value in figures.items():
        table.add_row(name, f"{value:,.3g}" if isinstance(value, float) else str(value))
    Console().print(table)


def main(argv: list[str]) -> None:
    """Prints a table and, with --output, writes JSON."""
    if argv[1:] not in [["train"], ["decode"]]:
        raise app.UsageError("say what to measure: train or decode")
    with console.clear_errors():
        figures = measure(argv[1])
    show(figures)
    text = json.dumps(figures, indent=1) + "\n"
    if OUTPUT.value is None:
        print(text, end="")
    else:
        Path(OUTPUT.value).write_text(text)


if __name__ == "__main__":
    app.run(main)
