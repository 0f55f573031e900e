"""`with_position_encoding`: the same parameters under another encoding."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import positions
from jaxlm.model.parameters import abstract_params
from jaxlm.model.transformer import Transformer
from tests.model.configs import logits, packed_rows, random_params, small


def bare(encoding):
    return Transformer(small(position_encoding=encoding))


@pytest.mark.parametrize("inner", ["rope(base=500)", "alibi", "nope", "xpos", "kerple", "t5"])
@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("lm_infinite", {"window": 5, "num_sinks": 2}),
        ("lm_infinite(window=5, num_sinks=2)", {}),
        (positions.get("lm_infinite", window=5, num_sinks=2), {}),
        ("lm_infinite(window=5)", {"num_sinks": 2}),
        (positions.get("lm_infinite", window=5), {"num_sinks": 2}),
    ],
    ids=["options", "text", "object", "text and options", "object and options"],
)
def test_lm_infinite_wraps_the_models_own_encoding(inner, text, options):
    got = bare(inner).with_position_encoding(text, **options)
    assert got == bare(f"lm_infinite({inner}, window=5, num_sinks=2)")


def test_lm_infinite_wraps_what_it_is_told_to():
    model = bare("alibi").with_position_encoding("lm_infinite(nope)")
    assert model == bare("lm_infinite(nope)")
    assert model == bare("alibi").with_position_encoding("lm_infinite", inner="nope")
    assert bare("lm_infinite").config.encoding == bare("lm_infinite(rope)").config.encoding


@pytest.mark.parametrize("inner", ["rope(base=500)", "alibi"])
def test_lm_infinite_takes_the_place_of_another(inner):
    """The encoding within stays: it is what the parameters were trained with."""
    before = bare(f"lm_infinite({inner}, window=9, num_sinks=3)")
    got = before.with_position_encoding("lm_infinite", window=5)
    assert got == bare(f"lm_infinite({inner}, window=5)")
    default = bare("lm_infinite").with_position_encoding("lm_infinite", window=5)
    assert default == bare("lm_infinite(rope, window=5)")


def two_kinds(encoding):
    attention = {"layer_pattern": ("sliding", "global"), "sliding_window": 6}
    return Transformer(small(position_encoding=encoding, attention=attention))


def test_lm_infinite_leaves_sliding_layers_with_their_own_encoding():
    before = two_kinds("by_kind(rope(base=500), sliding=alibi)")
    got = before.with_position_encoding("lm_infinite", window=5)
    assert got == two_kinds("by_kind(lm_infinite(rope(base=500), window=5), sliding=alibi)")
    again = got.with_position_encoding("lm_infinite", window=7)
    assert again == two_kinds("by_kind(lm_infinite(rope(base=500), window=7), sliding=alibi)")


@pytest.mark.parametrize("encoding", ["rope(base=500)", "alibi"])
def test_one_encoding_in_both_kinds_is_that_encoding(encoding):
    model = two_kinds(encoding)
    params = random_params(abstract_params(model))
    both = model.with_position_encoding(f"by_kind({encoding}, sliding={encoding})")
    # The same numbers under two names: programs differ, sums run in one order.
    np.testing.assert_array_equal(*(logits(m, params, *packed_rows()) for m in (model, both)))


def test_an_option_given_twice_is_refused():
    with pytest.raises(ValueError, match=r"lm_infinite: window=9 given again; allowed: each"):
        bare("rope").with_position_encoding("lm_infinite(window=8)", window=9)


def test_the_window_is_the_context_length_by_default():
    model = bare("rope").with_position_encoding("lm_infinite")
    assert model.config.encoding.window == model.config.context_length == 16


def test_parameters_serve_both():
    model = bare("rope")
    params = random_params(abstract_params(model))
    tokens, at, segments = packed_rows()
    far = at + jnp.where(segments != 0, 40, 0)
    near = model.with_position_encoding("lm_infinite", window=64)
    # Within the window nothing changes but the way that angles are rounded.
    np.testing.assert_allclose(
        logits(near, params, tokens, at, segments),
        logits(model, params, tokens, at, segments),
        rtol=0,
        atol=2e-5,
    )
    narrow = model.with_position_encoding("lm_infinite", window=2, num_sinks=0)
    changed = logits(narrow, params, tokens, far, segments)
    assert jnp.abs(changed - logits(model, params, tokens, far, segments)).max() > 0.01


@pytest.mark.parametrize(
    ("before", "after", "error"),
    [
        ("rope", "t5", r"position_encoding=t5 has learned parameters \(table\)"),
        ("t5", "learned", r"position_encoding=learned has learned parameters \(table\)"),
        ("rope", "lm_infinite(kerple)", "has learned parameters .* a model with rope lacks"),
        ("rope", "by_kind(sliding=t5)", r"by_kind: sliding='t5.*without learned parameters"),
        ("rope", "by_kind(sliding=sinusoidal)", "by_kind: sliding='sinus.*adds nothing"),
        ("rope", "by_kind(by_kind)", "by_kind: full='by_kind'; allowed: an encoding of one kind"),
        ("rope", "lm_infinite(by_kind)", "inner='by_kind'; allowed: a relative encoding"),
        ("rope", "ropes", r"did you mean rope\?"),
        ("learned", "lm_infinite", "lm_infinite: inner='learned.*allowed: a relative encoding"),
    ],
)
def test_what_cannot_serve_is_refused(before, after, error):
    with pytest.raises(ValueError, match=error):
        bare(before).with_position_encoding(after)


def test_learned_parameters_may_be_left_unused():
    model = bare("t5")
    params = random_params(abstract_params(model))
    got = logits(model.with_position_encoding("nope"), params, *packed_rows())
    want = logits(
        bare("nope"), {n: v for n, v in params.items() if n != "position"}, *packed_rows()
    )
    np.testing.assert_array_equal(got, want)
