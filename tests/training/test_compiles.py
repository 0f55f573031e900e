import jax
import jax.numpy as jnp

from jaxlm.data.tokenizers import load_tokenizer
from jaxlm.decoding.generate import generate
from jaxlm.model.parameters import init_params
from jaxlm.training.compiles import count_compiles
from tests.training.cases import make_model


def test_counts_by_name_within_the_block_only():
    @jax.jit
    def double(x):
        return x * 2

    one, two = jnp.ones(1), jnp.ones(2)
    with count_compiles() as compiled:
        double(one)
        double(one)
        double(two)
    assert compiled == {"double": 2}
    three = jnp.ones(3)
    double(three)
    assert compiled == {"double": 2}


def test_prompts_of_one_bucket_share_their_programs():
    """1 to 16 tokens: the prompt's length is data, not a shape."""
    tokenizer = load_tokenizer("bytes")
    model = make_model(vocab_size=320)
    params = init_params(model)
    with count_compiles() as compiled:
        generate(model, params, tokenizer, ["abc"], max_new_tokens=4)
        first = dict(compiled)
        generate(model, params, tokenizer, ["abcdefghijk"], max_new_tokens=4, temperature=0.7)
        generate(model, params, tokenizer, ["a"], max_new_tokens=4, top_k=3, seed=5)
    assert (first["prefill"], first["decode"]) == (1, 1)
    assert compiled == first
