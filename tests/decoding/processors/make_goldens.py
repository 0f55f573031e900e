"""Logits after transformers' own processors and warpers, for a test without torch.

python -m tests.decoding.processors.make_goldens    (in an environment with torch and transformers)
"""

from pathlib import Path

import numpy as np

FILE = Path(__file__).parent / "goldens.npz"
ROWS, VOCAB, PROMPT, LENGTH, LIMIT = 24, 40, 7, 12, 6
STOPS = (3, 17)
# Settings by names that both have; of `logit_bias` transformers' name is `sequence_bias`.
CASES = {
    "min_p": {"min_p": 0.1},
    "typical_p": {"typical_p": 0.7},
    "epsilon_cutoff": {"epsilon_cutoff": 0.02},
    "eta_cutoff": {"eta_cutoff": 0.05},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.8},
    "repetition_penalty": {"repetition_penalty": 1.3},
    "no_repeat_ngram_size 1": {"no_repeat_ngram_size": 1},
    "no_repeat_ngram_size 3": {"no_repeat_ngram_size": 3},
    "bad_words_ids": {"bad_words_ids": [[9], [1, 2], [0, 1, 30], [1, 2, 0, 31], [17]]},
    "min_new_tokens": {"min_new_tokens": 6},
    "logit_bias": {"logit_bias": {4: 2.5, 9: -3.0}},
    "sequence_bias": {"sequence_bias": {(7,): 1.5, (1, 7): -0.5, (2, 1, 8): 9.0, (0, 11): 2.0}},
    "suppress_tokens": {"suppress_tokens": [0, 5, 39]},
    "forced_eos_token_id": {"forced_eos_token_id": 3},
}
# All at once, for their order.
CASES["all"] = {k: v for one in CASES.values() for k, v in one.items()} | {
    "temperature": 0.8,
    "top_k": 30,
    "top_p": 0.95,
    "min_p": 0.02,
    "typical_p": 0.97,
    "epsilon_cutoff": 0.01,
    "eta_cutoff": 0.01,
}
del CASES["all"]["forced_eos_token_id"]


def main():
    """Writes the file."""
    import torch
    import transformers

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.LlamaConfig(vocab_size=VOCAB, intermediate_size=8, **sizes)
    model = transformers.LlamaForCausalLM(config)
    random = np.random.default_rng(0)
    tokens = random.integers(0, 3, (ROWS, LENGTH))
    logits = (3 * random.standard_normal((ROWS, VOCAB))).astype(np.float32)
    found = {"tokens": tokens, "logits": logits, "transformers": transformers.__version__}
    for name, settings in CASES.items():
        given = {"top_k": 0} | settings
        bias = {(i,): b for i, b in given.pop("logit_bias", {}).items()}
        if bias := bias | given.get("sequence_bias", {}):
            given["sequence_bias"] = bias
        options = transformers.GenerationConfig(do_sample=True, **given)
        options.max_length = PROMPT + LIMIT
        options._eos_token_tensor = torch.tensor(STOPS)
        chain = model._get_logits_processor(options, input_ids_seq_length=PROMPT, device="cpu")
        both = {"logit_bias", "sequence_bias"} <= set(settings)  # one of theirs
        assert len(chain) == len(settings) - both, name
        out = chain(torch.from_numpy(tokens), torch.from_numpy(logits))
        found[name] = out.numpy()
    np.savez_compressed(FILE, **found)


if __name__ == "__main__":
    main()
