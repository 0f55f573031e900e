"""Each setting's meaning for one row, worked out slowly in float64.

An oracle takes logits, prompt, output and the setting's value, and gives logits.
"""

import numpy as np

STOPS = (3, 7)  # stop tokens of the cases
LIMIT = 9  # and their max_new_tokens


def probs(logits):
    p = np.exp(logits - logits.max())
    return p / p.sum()


def entropy(p):
    return -sum(q * np.log(q) for q in p if q > 0)


def only(logits, kept):
    return np.array([x if i in kept else -np.inf for i, x in enumerate(logits)])


def without(logits, banned):
    return only(logits, set(range(len(logits))) - set(banned))


def min_p(logits, prompt, output, value):
    p = probs(logits)
    return only(logits, {i for i in range(len(p)) if p[i] >= value * p.max()})


def typical_p(logits, prompt, output, value):
    p = probs(logits)
    h = entropy(p)
    kept, mass = set(), 0.0
    for i in sorted(range(len(p)), key=lambda i: abs(-np.log(p[i]) - h)):
        kept.add(i)
        mass += p[i]
        if mass >= value:
            break
    return only(logits, kept)


def epsilon_cutoff(logits, prompt, output, value):
    p = probs(logits)
    return only(logits, {int(p.argmax())} | {i for i in range(len(p)) if p[i] >= value})


def eta_cutoff(logits, prompt, output, value):
    eta = min(value, np.sqrt(value) * np.exp(-entropy(probs(logits))))
    return epsilon_cutoff(logits, prompt, output, eta)


def repetition_penalty(logits, prompt, output, value):
    out = logits.copy()
    for token in {*prompt, *output}:
        out[token] = out[token] / value if out[token] > 0 else out[token] * value
    return out


def frequency_penalty(logits, prompt, output, value):
    out = logits.copy()
    for token in output:
        out[token] -= value
    return out


def presence_penalty(logits, prompt, output, value):
    out = logits.copy()
    for token in set(output):
        out[token] -= value
    return out


def no_repeat_ngram_size(logits, prompt, output, value):
    text = [*prompt, *output]
    ngrams = {tuple(text[i : i + value]) for i in range(len(text) - value + 1)}
    last = text[len(text) - value + 1 :] if value > 1 else []
    if not value or len(text) < value - 1:
        return logits
    return without(logits, [v for v in range(len(logits)) if (*last, v) in ngrams])


def bad_words_ids(logits, prompt, output, value):
    text = [*prompt, *output]
    banned = [
        w[-1]
        for w in value
        if w not in [[s] for s in STOPS] and text[len(text) - len(w) + 1 :] == w[:-1]
    ]
    return without(logits, banned)


def min_new_tokens(logits, prompt, output, value):
    return without(logits, STOPS if len(output) < value else ())


def logit_bias(logits, prompt, output, value):
    out = logits.copy()
    for token, bias in value.items():
        out[token] += bias
    return out


def sequence_bias(logits, prompt, output, value):
    text, out = [*prompt, *output], logits.copy()
    for word, bias in value.items():
        if text[len(text) - len(word) + 1 :] == list(word[:-1]):
            out[word[-1]] += bias
    return out


def allowed_token_ids(logits, prompt, output, value):
    return only(logits, set(value))


def suppress_tokens(logits, prompt, output, value):
    return without(logits, value)


def begin_suppress_tokens(logits, prompt, output, value):
    return without(logits, () if output else value)


def forced(logits, token):
    return np.array([0.0 if i == token else -np.inf for i in range(len(logits))])


def forced_bos_token_id(logits, prompt, output, value):
    return forced(logits, value) if len(prompt) + len(output) == 1 else logits


def forced_eos_token_id(logits, prompt, output, value):
    return forced(logits, value) if len(output) == LIMIT - 1 else logits


# Of each setting: a function, and a value for each of four rows, the last of which has it off.
CASES = {
    "min_p": (min_p, [0.02, 0.2, 0.9, 0]),
    "typical_p": (typical_p, [0.2, 0.6, 0.95, 1]),
    "epsilon_cutoff": (epsilon_cutoff, [0.01, 0.05, 0.9, 0]),
    "eta_cutoff": (eta_cutoff, [0.01, 0.1, 0.9, 0]),
    "repetition_penalty": (repetition_penalty, [1.3, 0.7, 2.5, 1]),
    "frequency_penalty": (frequency_penalty, [0.5, -0.3, 2.0, 0]),
    "presence_penalty": (presence_penalty, [0.5, -0.3, 2.0, 0]),
    "no_repeat_ngram_size": (no_repeat_ngram_size, [1, 2, 3, 0]),
    "bad_words_ids": (
        bad_words_ids,
        [[[5]], [[2, 1], [1, 2, 0], [3]], [[0], [0, 1, 2, 0, 1]], None],
    ),
    "min_new_tokens": (min_new_tokens, [1, 5, 9, 0]),
    "logit_bias": (logit_bias, [{3: 1.5}, {0: -2, 1: 7.25}, {9: float("-inf")}, None]),
    "sequence_bias": (
        sequence_bias,
        [{(3,): 1.5}, {(1, 0): -2, (0, 2): 7.25, (0,): 1}, {(0, 1, 2, 0, 1): 3.0}, None],
    ),
    "allowed_token_ids": (allowed_token_ids, [[1], [0, 2, 4], [10, 9], None]),
    "suppress_tokens": (suppress_tokens, [[1], [0, 2, 4], [10, 9], None]),
    "begin_suppress_tokens": (begin_suppress_tokens, [[1], [0, 2, 4], [10, 9], None]),
    "forced_bos_token_id": (forced_bos_token_id, [1, 2, 0, None]),
    "forced_eos_token_id": (forced_eos_token_id, [1, 2, 0, None]),
}
