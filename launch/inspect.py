"""What a checkpoint holds and what it takes to run it, without reading its weights.

python -m launch.inspect runs/quickstart --batch_size=8 --length=4096
"""

from __future__ import annotations

from absl import app, flags
from rich.console import Console
from rich.table import Table

from jaxlm import caches
from jaxlm.load import load_config, loaded_shapes
from jaxlm.model.config import ModelConfig
from jaxlm.model.encoder_decoder import EncoderDecoderConfig
from jaxlm.model.parameters import size_by_part
from launch import console

BATCH_SIZE = flags.DEFINE_integer("batch_size", 1, "Sequences decoded at a time.", lower_bound=1)
LENGTH = flags.DEFINE_integer(
    "length", None, "Tokens of each; the model's context length by default.", lower_bound=1
)
CACHES = (
    "dense",
    "paged",
    "ring(window=4096)",
    "quantized(bits=8)",
    "quantized(bits=4)",
    "staircase",
)


def architecture(config: ModelConfig) -> dict[str, str]:
    """The choices that tell one model from another, in words."""
    a, f, moe = config.attention, config.feed_forward, config.moe
    sees = ", ".join(a.layer_pattern)
    if a.sliding_window is not None:
        sees += f" (window {a.sliding_window})"
    mlp = f"{f.kind}, {config.d_ff:,} wide"
    if moe is not None:
        mlp += f"; {moe.num_experts} experts, {moe.top_k} a token"
    return {
        "layers": f"{config.num_layers} of width {config.d_model:,}",
        "attention": f"{a.num_heads} query heads and {config.num_kv_heads} key/value heads "
        f"of {config.head_dim}",
        "layers see": sees,
        "MLP": mlp,
        "norm": f"{config.norm.kind}, {config.norm.placement}",
        "vocabulary": f"{config.vocab_size:,}" + (", tied" if config.embedding.tied else ""),
        "position encoding": str(config.encoding),
        "context length": f"{config.context_length:,}",
        "parameters' dtype": config.numerics.param_dtype,
        "activations' dtype": config.numerics.dtype,
    }


def halves(config: ModelConfig | EncoderDecoderConfig) -> dict[str, ModelConfig]:
    """The Transformers that a model is made of, by name; the one that decodes is the last."""
    if isinstance(config, ModelConfig):
        return {"": config}
    return {"encoder": config.encoder, "decoder": config.decoder}


def mebibytes(count: float) -> str:
    """In MiB."""
    return f"{count / 2**20:,.1f} MiB"


def memory(config: ModelConfig, batch: int, length: int) -> dict[str, float]:
    """Bytes of each kind of cache at this batch size and length."""
    return {c: caches.parse(c).nbytes_of(config, batch, length) for c in CACHES}


def main(argv: list[str]) -> None:
    """Prints three tables: the choices (an encoder–decoder's in two), parameters, and memory to
    decode, if the model can.
    """
    if len(argv) != 2:
        raise app.UsageError("give one path: a workdir, a Hugging Face folder, a GGUF file")
    with console.clear_errors():
        config = load_config(argv[1])
        tables = []
        for half, own in halves(config).items():
            tables.append(Table(title=f"{argv[1]} {half}".strip(), show_header=False))
            for name, text in architecture(own).items():
                tables[-1].add_row(name, text)
        parts = Table("part", "parameters", "share", "memory", title="Parameters")
        sizes = size_by_part(loaded_shapes(argv[1]))
        total, num_bytes = map(sum, zip(*sizes.values(), strict=True))
        for name, (count, kept) in (sizes | {"all": (total, num_bytes)}).items():
            parts.add_row(name, f"{count:,}", f"{count / total:.1%}", mebibytes(kept))
        tables.append(parts)
        length = LENGTH.value or own.context_length
        title = f"Memory to decode {BATCH_SIZE.value} × {length:,} tokens"
        caches = Table("cache", "keys and values", "with parameters", title=title)
        if not own.sees_ahead:
            for name, size in memory(own, BATCH_SIZE.value, length).items():
                caches.add_row(name, mebibytes(size), mebibytes(size + num_bytes))
            tables.append(caches)
        for table in tables:
            Console(markup=False, emoji=False).print(table)


if __name__ == "__main__":
    app.run(main)
