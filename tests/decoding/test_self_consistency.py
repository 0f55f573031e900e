"""Ways to an answer on a small model, each replayed alone, and their vote by hand."""

import re

import numpy as np
import pytest

from jaxlm.decoding.generate import complete
from jaxlm.decoding.self_consistency import Vote, solve, ways
from tests.decoding import tiny

# So long that all prompts are in one bucket: they share programs.
QUESTION = 3 * "How much is 1 + 1? "


def test_the_prompt():
    begun = f"{QUESTION}\nPlease show me some different ways to solve this problem.\n### Way 1:\n"
    assert ways(QUESTION, []) == f"{begun}* **Step 1:**"
    assert ways(QUESTION, [" Add."]) == f"{begun}* **Step 1:** Add.\n### Way 2:\n* **Step 1:**"


def test_ways_begin_apart_and_go_on_greedily():
    """Each from the prompt without the others; first tokens are the best unused ones with them."""
    model, params = tiny.model(context_length=512), tiny.params()
    given = (model, params, tiny.TOKENIZER)
    found = solve(*given, QUESTION, 2, 8, extract="[^ ]")
    bare = [256, *tiny.TOKENIZER.encode(ways(QUESTION, []))]
    used = set()
    for i, (path, answer) in enumerate(zip(found.paths, found.answers, strict=True)):
        shown = [256, *tiny.TOKENIZER.encode(ways(QUESTION, found.paths[:i]))]
        logits = tiny.next_logits(model, params, shown, 256)
        texts = [(int(t), tiny.TOKENIZER.decode([int(t)]).strip()) for t in np.argsort(-logits)]
        first, text = next((t, x) for t, x in texts if x not in {"", '"', *used})
        used.add(text)
        (alone,) = complete(*given, [[*bare, first]], 8)
        assert path == tiny.TOKENIZER.decode([first, *alone.token_ids]).rstrip()
        asked = ways(QUESTION, []) + path + '\n**Final Answer (Only Number):** "'
        (end,) = complete(*given, [asked], 8, ['"'])
        match = re.search("[^ ]", end.text)
        assert answer == (match and match[0])
    assert len(used) == 2


def test_the_vote():
    vote = Vote([None, "3", "2", "2", "3", None], [""] * 6)
    assert vote.answer == "3" and vote.path_accuracy("2") == 1 / 3
    assert Vote([None], [""]).answer is None


def test_bad_settings_are_told():
    given = (tiny.model(context_length=512), tiny.params(), tiny.TOKENIZER, QUESTION)
    with pytest.raises(ValueError, match="num_paths=0; allowed"):
        solve(*given, num_paths=0)
    with pytest.raises(ValueError, match="max_new_tokens=0; allowed"):
        solve(*given, max_new_tokens=0)
