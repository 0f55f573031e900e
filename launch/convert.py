"""Write a checkpoint as a folder that transformers and others load.

python -m launch.convert --checkpoint=runs/quickstart --output=runs/quickstart-hub

A run that learned an adapter is written with the adapter merged into its matrices; with --adapter,
the adapter alone, as a folder that peft loads.
"""

from __future__ import annotations

from pathlib import Path

from absl import app, flags

import jaxlm
from jaxlm.adapters.lora import merge_adapters
from jaxlm.data.tokenizers import TOKENIZER
from jaxlm.interop.peft_folder import write_peft_folder
from jaxlm.interop.write import MAX_SHARD_BYTES, check_writable, write_hub_folder
from jaxlm.load import finetune_of, load_config
from jaxlm.model.config import ModelConfig
from jaxlm.model.transformer import Transformer
from launch import console

CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    None,
    "Workdir of a training run, a Hugging Face folder or the hub's owner/name, or a GGUF file.",
    required=True,
)
OUTPUT = flags.DEFINE_string("output", None, "A folder that is absent or empty.", required=True)
STEP = flags.DEFINE_integer("step", None, "Of a workdir; the newest good checkpoint otherwise.")
ARCHITECTURE = flags.DEFINE_string(
    "architecture",
    None,
    "Such as LlamaForCausalLM; otherwise the first that can say the model's config.",
)
ENCODING = flags.DEFINE_string(
    "position_encoding", None, "Put on the model first, e.g. 'rope(scaling=linear(factor=2))'."
)
PARAM_DTYPE = flags.DEFINE_string(
    "param_dtype", None, "float32, bfloat16 or float16; otherwise as they are stored."
)
MAX_SHARD = flags.DEFINE_integer(
    "max_shard_bytes", MAX_SHARD_BYTES, "Of one safetensors file.", lower_bound=1
)
ADAPTER = flags.DEFINE_bool("adapter", False, "Of a run with one: only the adapter, for peft.")
BASE = flags.DEFINE_string(
    "base",
    None,
    "With --adapter: the folder or owner/name that peft is to put it on, such as the model that a "
    "GGUF file was made from. Default: the checkpoint that the run began with.",
)


def check_flags() -> None:
    """Raises for those that would do nothing."""
    if BASE.value is not None and not ADAPTER.value:
        raise ValueError(f"base={BASE.value!r}; allowed: only with --adapter")
    for flag in (MAX_SHARD, ENCODING):
        if flag.present and ADAPTER.value:
            raise ValueError(f"{flag.name}={flag.value!r}; allowed: without --adapter")


def check_before_loading() -> None:
    """Raises, before all weights are read, what writing them would raise after."""
    config = load_config(CHECKPOINT.value)
    if ENCODING.value is not None:
        if not isinstance(config, ModelConfig):
            given = f"position_encoding={ENCODING.value!r}"
            raise ValueError(f"{given}; allowed: none with an encoder–decoder")
        config = Transformer(config).with_position_encoding(ENCODING.value).config
    check_writable(Path(OUTPUT.value), config, ARCHITECTURE.value)


def main(argv: list[str]) -> None:
    """Reads, writes, and says as what."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
    with console.clear_errors():
        check_flags()
        if not ADAPTER.value:
            check_before_loading()
        model, params, tokenizer = jaxlm.load(
            CHECKPOINT.value, STEP.value, param_dtype=PARAM_DTYPE.value
        )
        if ENCODING.value is not None:
            model = model.with_position_encoding(ENCODING.value)
        if ADAPTER.value:
            began = finetune_of(CHECKPOINT.value)
            base = BASE.value or began.checkpoint or CHECKPOINT.value
            modules = write_peft_folder(
                OUTPUT.value, model, params, began.adapter, base, ARCHITECTURE.value
            )
            print(f"{OUTPUT.value}: an adapter of {', '.join(modules)} of {base}")
            assert began.checkpoint is not None  # or there would be no adapter
            below, own = load_config(began.checkpoint), model.config
            assert isinstance(below, ModelConfig) and isinstance(own, ModelConfig)  # as in training
            if below.encoding != own.encoding:
                print(
                    f"{OUTPUT.value}: learned under {own.encoding}, which {base} must be given too"
                )
            return
        params = merge_adapters(params)
        name = write_hub_folder(
            OUTPUT.value, model, params, tokenizer, ARCHITECTURE.value, MAX_SHARD.value
        )
        print(f"{OUTPUT.value}: {name}, {jaxlm.count_params(params):,} parameters")
        if not (Path(OUTPUT.value) / TOKENIZER).is_file():
            kind = type(tokenizer).__name__
            print(f"{OUTPUT.value}: no {TOKENIZER}: its {kind} tokenizer is read by jaxlm alone")


if __name__ == "__main__":
    app.run(main)
