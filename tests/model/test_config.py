"""ModelConfig: what it refuses, what it derives, and that the table of configs uses all of it."""

import dataclasses
import json
import re

import pytest

from jaxlm.attention.context import FORMS
from jaxlm.model.config import ModelConfig, MoEConfig
from tests.model.configs import CONFIGS, PARTS, small

# (part or None, field, bad value, what the error must say is allowed)
BAD = [
    (None, "vocab_size", 0, ">= 1"),
    (None, "num_layers", 0, ">= 1"),
    (None, "d_model", 0, ">= 1"),
    (None, "d_model", 30, "a multiple of attention.num_heads=4"),
    (None, "context_length", 0, ">= 1"),
    (None, "dropout", 1.0, "[0, 1)"),
    (None, "dropout", -0.1, "[0, 1)"),
    (None, "position_encoding", "ropee", "rope"),
    (None, "position_encoding", "rope(", "name(option=value)"),
    ("attention", "num_heads", 0, ">= 1"),
    ("attention", "num_kv_heads", 3, "a divisor of num_heads=4"),
    ("attention", "num_kv_heads", 0, "a divisor of num_heads=4"),
    ("attention", "head_dim", 0, "None or an integer >= 1"),
    ("attention", "qk_norm", "heads", "none, head, full"),
    ("attention", "softcap", 0.0, "None or > 0"),
    ("attention", "scale", -1.0, "None or > 0"),
    ("attention", "layer_pattern", (), "global, sliding"),
    ("attention", "layer_pattern", ("local",), "global, sliding, bidirectional; or of crossed"),
    ("attention", "layer_pattern", ("global", "crossed"), "or of crossed alone"),
    ("attention", "sliding_window", 4, "if layer_pattern has a sliding layer"),
    ("attention", "implementation", "fused", "auto, flash, blockwise, reference"),
    ("feed_forward", "d_ff", 0, "None or an integer >= 1"),
    ("feed_forward", "kind", "swish", "swiglu, geglu"),
    ("feed_forward", "parallel", "yes", "none, shared, separate"),
    ("moe", "num_experts", 0, ">= 1"),
    ("moe", "top_k", 9, "1 to num_experts=8"),
    ("moe", "top_k", 0, "1 to num_experts=8"),
    ("moe", "d_ff", 0, "None or an integer >= 1"),
    ("moe", "num_shared_experts", -1, ">= 0"),
    ("moe", "shared_d_ff", 0, "None or, with num_shared_experts >= 1"),
    ("moe", "shared_d_ff", 24, "None or, with num_shared_experts >= 1"),
    ("moe", "shared_gate", True, "False without num_shared_experts"),
    ("moe", "load_balance_weight", -0.1, ">= 0"),
    ("moe", "router_z_weight", -0.1, ">= 0"),
    ("norm", "kind", "batchnorm", "rmsnorm, layernorm"),
    ("norm", "placement", "before", "pre, post, sandwich, residual"),
    ("norm", "epsilon", 0.0, "> 0"),
    ("norm", "bias", True, "False with rmsnorm"),
    ("norm", "clip_qkv", 0.0, "None or a number > 0"),
    ("embedding", "scale", 0.0, "None or a number > 0"),
    ("embedding", "num_token_types", -1, ">= 0"),
    ("embedding", "logit_scale", 0.0, "None or a number > 0"),
    ("embedding", "logit_softcap", 0.0, "None or a number > 0"),
    ("numerics", "dtype", "float64", "float32, bfloat16, float16"),
    ("numerics", "param_dtype", "fp32", "float32, bfloat16, float16"),
    ("numerics", "remat", "all", "none, dots, full"),
]

REQUIRED = {ModelConfig: {"vocab_size": 8}, MoEConfig: {"num_experts": 8}}


def leaves(cls):
    """Its fields that are not parts with fields of their own."""
    return [f for f in dataclasses.fields(cls) if f.name not in PARTS]


@pytest.mark.parametrize(("part", "field", "value", "allowed"), BAD)
def test_bad_values(part, field, value, allowed):
    with pytest.raises(ValueError, match=field) as error:
        required = REQUIRED.get(PARTS[part], {})
        small(**{field: value} if part is None else {part: {**required, field: value}})
    text = str(error.value)
    assert repr(value) in text
    assert allowed in text.split("allowed:", 1)[1]


def test_window_is_needed_by_a_sliding_layer():
    with pytest.raises(ValueError, match="sliding_window=None; allowed: an integer >= 1 if"):
        small(attention={"layer_pattern": ("global", "sliding")})


def test_a_scale_plus_one_needs_a_scale():
    with pytest.raises(ValueError, match="scale_plus_one=True; allowed: False without scale"):
        small(norm={"scale": False, "scale_plus_one": True})


def test_parallel_needs_a_norm_before():
    with pytest.raises(ValueError, match=r"parallel='shared'; allowed: none with norm\.placement"):
        small(feed_forward={"parallel": "shared"}, norm={"placement": "post"})


@pytest.mark.parametrize("encoding", ["alibi", "t5", "xpos", "rope_alibi", "lm_infinite(rope)"])
def test_bidirectional_layers_need_an_encoding_of_both_sides(encoding):
    with pytest.raises(
        ValueError, match=r"position_encoding=.*; allowed: with bidirectional layers"
    ):
        small(attention={"layer_pattern": ("bidirectional",)}, position_encoding=encoding)


@pytest.mark.parametrize("part", PARTS, ids=str)
def test_every_field_refuses_a_wrong_type(part):
    cls, value = PARTS[part], object()
    for field in dataclasses.fields(cls):
        with pytest.raises(ValueError, match=f"{field.name}=<object"):
            small(**{field.name: value} if part is None else {part: {field.name: value}})


@pytest.mark.parametrize("part", PARTS, ids=str)
def test_the_constructor_refuses_a_wrong_type(part):
    """Without the type checker of the tests, which would be faster."""
    cls, value = PARTS[part], object()
    made = cls(**REQUIRED.get(cls, {}))
    for field in dataclasses.fields(cls):
        bare = object.__new__(cls)
        vars(bare).update(vars(made) | {field.name: value})
        with pytest.raises(ValueError, match=f"{field.name}=<object"):
            bare.__post_init__()


def test_every_restricted_field_is_in_the_table_of_bad_values():
    """Booleans have no bad values but of another type."""
    known = {(part, field) for part, field, _, _ in BAD}
    for part, cls in PARTS.items():
        for field in leaves(cls):
            if field.type != "bool":
                assert (part, field.name) in known


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"num_layer": 3}, r"model: unknown field 'num_layer' \(did you mean num_layers\?\)"),
        ({"attention": {"heads": 3}}, r"model.attention: unknown field 'heads'"),
        ({"moe": {"topk": 3}}, r"model.moe: unknown field 'topk' \(did you mean top_k\?\)"),
    ],
)
def test_unknown_field_tells_the_nearest(values, text):
    with pytest.raises(ValueError, match=text):
        ModelConfig.from_dict({"vocab_size": 8, **values})


@pytest.mark.parametrize("name", CONFIGS)
def test_dict_round_trip(name):
    config = CONFIGS[name]
    again = ModelConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config)
    assert str(again.encoding) == str(config.encoding)


def test_configs_differ():
    """Equality sees every field: only a config that spells out the defaults equals another."""
    names = list(CONFIGS)
    same = {(a, b) for a in names for b in names if a < b and CONFIGS[a] == CONFIGS[b]}
    assert same == {("base", "swiglu")}


@pytest.mark.parametrize("cls", PARTS.values())
def test_frozen(cls):
    made = cls(**REQUIRED.get(cls, {}))
    for field in dataclasses.fields(cls):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(made, field.name, None)


def test_derived_widths():
    config = ModelConfig(vocab_size=8, d_model=256)
    assert (config.head_dim, config.num_kv_heads) == (32, 8)
    # 8/3·256 = 682.7, rounded up to a multiple of 128.
    assert config.d_ff == 768
    plain = dataclasses.replace(config.feed_forward, kind="gelu")
    assert config.replace(feed_forward=plain).d_ff == 1024
    assert small(moe={"num_experts": 4, "d_ff": 7}).d_ff == 7
    assert small(moe={"num_experts": 4}).d_ff == 48


def test_a_copy_derives_its_widths_anew():
    config = ModelConfig(vocab_size=8, d_model=256, position_encoding="learned")
    larger = config.replace(d_model=512, context_length=99)
    assert (larger.head_dim, larger.d_ff) == (64, 1408)
    assert larger.encoding.table_length == 99
    assert larger == ModelConfig(
        vocab_size=8, d_model=512, context_length=99, position_encoding="learned"
    )


def choices(part, field):
    """The allowed words of a field, from its error."""
    with pytest.raises(ValueError, match="allowed") as error:
        small(**{part: {field: "?"}})
    return set(re.split(", ", str(error.value).split("allowed: ")[1]))


def test_the_table_uses_every_option():
    """A new option must join the table of configs, and with it the test against the oracle."""
    for part, cls in PARTS.items():
        made = list(CONFIGS.values())
        if part is not None:
            made = [p for p in (getattr(c, part) for c in made) if p is not None]
        for field in leaves(cls):
            used = {getattr(p, field.name) for p in made}
            if field.name in ("vocab_size", "d_model", "context_length"):
                continue  # sizes without a special value
            assert used - {field.default}, f"{part}.{field.name} is never but its default"
            if field.type == "str":
                # Flash attention runs on a TPU: tests/attention/test_flash.py; rows that devices
                # share, on a mesh: tests/attention/test_context.py.
                wanted = choices(part, field.name) - {"flash", *FORMS}
                assert used == wanted, f"{part}.{field.name}"
