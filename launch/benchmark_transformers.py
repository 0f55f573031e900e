"""The peer of launch.benchmark: Hugging Face transformers on torch, alone in its process.

Reads its settings from its first argument, says {"name": …} when it is warm, and then answers each
line of its input with the seconds of each phase of one repetition. It imports nothing of ours, so
any interpreter with torch and transformers can run it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any


def load(settings: dict[str, Any]) -> Any:
    """The checkpoint, or else a Llama of our benchmark model's shape: the same parameters, layer by
    layer.
    """
    import transformers

    if settings["checkpoint"] is not None:
        return transformers.AutoModelForCausalLM.from_pretrained(
            settings["checkpoint"], attn_implementation="sdpa"
        )
    width = settings["d_model"]
    third = -(-8 * width // 3)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=settings["vocab_size"],
            hidden_size=width,
            intermediate_size=-(-third // 128) * 128,
            num_hidden_layers=settings["num_layers"],
            num_attention_heads=settings["num_heads"],
            num_key_value_heads=settings["num_heads"],
            max_position_embeddings=4096,
            tie_word_embeddings=False,
            attn_implementation="sdpa",
        )
    )


def train(settings: dict[str, Any]) -> Callable[[], dict[str, float]]:
    """One optimizer step: forward, cross entropy, backward, clipping, fused AdamW."""
    import torch

    model = load(settings).train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4, fused=True)
    shape = (settings["batch_size"], settings["length"] + 1)
    tokens = torch.randint(0, settings["vocab_size"], shape)
    half = settings["dtype"] == "bfloat16"

    def run() -> dict[str, float]:
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        targets = tokens[:, 1:].flatten()
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        return {"train": time.perf_counter() - start}

    return run


def decode(settings: dict[str, Any]) -> Callable[[], dict[str, float]]:
    """Greedy generation to a fixed length: the first token, and all of them; the difference is what
    the others took.
    """
    import torch

    model = load(settings).eval().to(getattr(torch, settings["dtype"]))
    shape = (settings["batch_size"], settings["prompt_length"])
    tokens = torch.randint(3, settings["vocab_size"], shape)

    def generate(new: int) -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=False,
                max_new_tokens=new,
                min_new_tokens=new,
                pad_token_id=0,
            )
        assert out.shape[1] == shape[1] + new
        return time.perf_counter() - start

    def run() -> dict[str, float]:
        first, both = generate(1), generate(settings["new_tokens"])
        return {"prefill": first, "decode": both - first, "generate": both}

    return run


def main() -> None:
    """Warms up, then serves."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    settings = json.loads(sys.argv[1])
    run = {"train": train, "decode": decode}[settings["what"]](settings)
    run()
    run()
    name = f"transformers {transformers.__version__}, torch {torch.__version__}"
    print(json.dumps({"name": name, "threads": torch.get_num_threads()}), flush=True)
    for _ in sys.stdin:
        print(json.dumps(run()), flush=True)


if __name__ == "__main__":
    main()
