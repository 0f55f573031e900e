"""Beam search by transformers on the small Llama of tests/interop, for a test without torch.

python -m tests.decoding.make_beam_goldens      (in an environment with torch and transformers)
"""

import itertools
import tempfile
from pathlib import Path

import numpy as np

from tests.interop.make_goldens import CASES, drawn_model

FILE = Path(__file__).parent / "goldens" / "beams.npz"
NUM_BEAMS = (2, 4, 8)
EARLY_STOPPING = (False, True, "never")
LENGTH_PENALTY = (0.0, 1.0, 2.0)
PROMPTS, LENGTH, NEW_TOKENS = 10, 6, 16
# So many that some texts end early, and some not at all.
STOPS = (3, 17, 40, 41, 66)


def main():
    """Writes the file."""
    import torch
    import transformers

    kind, fields = CASES["llama"]
    with tempfile.TemporaryDirectory() as folder:
        config = getattr(transformers, kind)(**fields)
        model, _ = drawn_model(transformers, config, folder, "eager")
    tokens = np.random.default_rng(1).integers(4, config.vocab_size, (PROMPTS, LENGTH))
    found = {"tokens": tokens, "transformers": transformers.__version__}
    for num_beams, early, penalty in itertools.product(NUM_BEAMS, EARLY_STOPPING, LENGTH_PENALTY):
        out = model.generate(
            torch.from_numpy(tokens),
            attention_mask=torch.ones_like(torch.from_numpy(tokens)),
            num_beams=num_beams,
            num_return_sequences=num_beams,
            early_stopping=early,
            length_penalty=penalty,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=list(STOPS),
            pad_token_id=0,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
        case = f"{num_beams} {early} {penalty}"
        new = out.sequences.numpy()[:, LENGTH:]
        new = np.pad(new, ((0, 0), (0, NEW_TOKENS - new.shape[1])))
        found[f"{case} tokens"] = new.reshape(PROMPTS, num_beams, NEW_TOKENS).astype(np.int16)
        found[f"{case} scores"] = out.sequences_scores.numpy().reshape(PROMPTS, num_beams)
    np.savez_compressed(FILE, **found)


if __name__ == "__main__":
    main()
