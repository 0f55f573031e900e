"""Continue prompts with a trained model, or answer them with an encoder–decoder.

python -m launch.generate --checkpoint=runs/quickstart --prompt="Emma was" --max_new_tokens=64
python -m launch.generate --checkpoint=LARGE --small=SMALL --prompt="Emma was"
python -m launch.generate --checkpoint=LARGE --tensor=8 --prompt="Emma was"    # on eight devices
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from typing import Any

import jax
from absl import app, flags
from jax.sharding import Mesh

import jaxlm
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.decoding.adaptive_text import complete_adaptive
from jaxlm.sharding.mesh import MeshConfig, make_mesh
from launch import console, sampling_flags

CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    None,
    "Workdir of a training run, a Hugging Face folder or the hub's owner/name, or a GGUF file.",
    required=True,
)
PROMPT = flags.DEFINE_multi_string(
    "prompt", None, "Text to continue; may be given several times.", required=True
)
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "Most tokens to draw.")
ENCODING = flags.DEFINE_string(
    "position_encoding", None, "Put on the trained model, e.g. 'lm_infinite(window=128)'."
)
CACHE = flags.DEFINE_string(
    "cache",
    "dense",
    "What keeps keys and values; 'ring(window=1024, num_sinks=4)': no more than so many tokens.",
)
METHOD = flags.DEFINE_string(
    "method",
    None,
    "Of search in place of drawing: 'beam(num_beams=4)', contrastive, ….",
)
SMALL = flags.DEFINE_string(
    "small",
    None,
    "A smaller checkpoint of the same tokenizer, which speaks while it is sure: "
    "--method='entropy_adaptive(threshold=1.0)', which then is the default.",
)
CHAT = flags.DEFINE_bool("chat", False, "Prompts are what a user says to a chat model.")
SYSTEM = flags.DEFINE_string("system", None, "With --chat: what it is told before.")
UNROLL = flags.DEFINE_bool(
    "unroll", False, "Layers apart: quicker tokens on a CPU, a later first one."
)
QUANTIZE = flags.DEFINE_enum(
    "quantize", None, ["int8", "int4"], "Matrices, embedding and head in so many bits."
)
TENSOR = flags.DEFINE_integer(
    "tensor", 1, "Devices that share out heads, columns of matrices, and the cache.", lower_bound=1
)
FSDP = flags.DEFINE_integer(
    "fsdp", 1, "Devices that share out parameters and prompts.", lower_bound=1
)
STREAM = flags.DEFINE_bool("stream", True, "Print a single prompt's text as it is drawn.")


def prompt_of(tokenizer: Tokenizer, text: str) -> str | list[int]:
    """The text, or with --chat the conversation that it begins."""
    if not CHAT.value:
        return text
    told = [] if SYSTEM.value is None else [{"role": "system", "content": SYSTEM.value}]
    return jaxlm.chat_prompt(tokenizer, [*told, {"role": "user", "content": text}])


def mesh_of_flags() -> Mesh | None:
    """None: one device holds all. Devices that the flags leave share out prompts."""
    if TENSOR.value == FSDP.value == 1:
        return None
    return make_mesh(MeshConfig(fsdp=FSDP.value, tensor=TENSOR.value))


def loaded(path: str, mesh: Mesh | None) -> tuple[Any, Any, Tokenizer]:
    """A checkpoint as the flags want it."""
    model, params, tokenizer = jaxlm.load(
        path, mesh=mesh, unroll=UNROLL.value, quantize=QUANTIZE.value
    )
    if ENCODING.value is not None:
        if isinstance(model, jaxlm.EncoderDecoder):
            given = f"position_encoding={ENCODING.value!r}"
            raise ValueError(f"{given}; allowed: none with an encoder–decoder")
        model = model.with_position_encoding(ENCODING.value)
    return model, params, tokenizer


def with_small(
    small: str,
    mesh: Mesh | None,
    large: tuple[Any, Any, Tokenizer],
    prompts: list[str | list[int]],
    settings: dict[str, Any],
) -> list[str]:
    """Texts of both models; tells on standard error what the large one's part was."""
    if given := sampling_flags.several():
        told = "allowed: one text of each prompt with --small"
        raise ValueError(f"{', '.join(f'{n}={v}' for n, v in given.items())}; {told}")
    method = METHOD.value or "entropy_adaptive"
    pair = (loaded(small, mesh), large)
    completions, spoken = complete_adaptive(*pair, prompts, method=method, **settings)
    print(
        f"large model: {spoken.large_fraction:.1%} of the tokens; {spoken.cost_ratio:.2f} of its "
        f"cost, {spoken.cost_ratio_true:.2f} with what both read to take over",
        file=sys.stderr,
    )
    return [c.text for c in completions]


def print_as_drawn(
    prompt: str, between: str, of: tuple[Any, Any, Tokenizer], settings: dict[str, Any]
) -> None:
    """One prompt and its text, which is streamed."""
    pieces = jaxlm.stream(*of, prompt_of(of[2], prompt), **settings)
    first = next(pieces, "")  # bad settings show here, before anything is printed
    said = [] if CHAT.value else [prompt, between]
    for piece in itertools.chain([*said, first], pieces):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def main(argv: list[str]) -> None:
    """Prints each prompt with its continuation."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
    settings: dict[str, Any] = {
        "max_new_tokens": MAX_NEW_TOKENS.value,
        "cache": CACHE.value,
        **sampling_flags.given(),
    }
    several = sampling_flags.several()
    with console.clear_errors(), contextlib.ExitStack() as on_mesh:
        if SYSTEM.value is not None and not CHAT.value:
            raise ValueError(f"system={SYSTEM.value!r} without chat; allowed: with --chat")
        mesh = mesh_of_flags()
        if mesh is not None:
            on_mesh.enter_context(jax.set_mesh(mesh))
        model, params, tokenizer = loaded(CHECKPOINT.value, mesh)
        between = "\n" if isinstance(model, jaxlm.EncoderDecoder) else ""
        drawn = METHOD.value is None and SMALL.value is None
        if STREAM.value and len(PROMPT.value) == 1 and not several and drawn:
            print_as_drawn(PROMPT.value[0], between, (model, params, tokenizer), settings)
            return
        prompts = [prompt_of(tokenizer, p) for p in PROMPT.value]
        if SMALL.value is not None:
            large = (model, params, tokenizer)
            texts = with_small(SMALL.value, mesh, large, prompts, settings)
        else:
            settings["method"] = METHOD.value
            texts = jaxlm.generate(model, params, tokenizer, prompts, **settings, **several)
        asked = [p for p in PROMPT.value for _ in range(len(texts) // len(prompts))]
        for prompt, text in zip(asked, texts, strict=True):
            print(f"> {prompt}\n{text}\n" if CHAT.value else f"{prompt}{between}{text}\n")


if __name__ == "__main__":
    app.run(main)
