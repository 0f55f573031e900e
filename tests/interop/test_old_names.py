"""Configs as earlier versions of transformers, or a family's own code, wrote them."""

import pytest

from jaxlm.interop.families import find
from jaxlm.interop.fields import read_fields
from jaxlm.interop.hub_config import HubConfig
from jaxlm.positions.by_kind import ByKind
from jaxlm.positions.rope import RoPE
from jaxlm.positions.rope_scaling import Linear
from tests.interop.test_families import read_golden


def read(values):
    config = HubConfig(values, "config.json")
    model = read_fields(find(values["architectures"][0], "config.json").fields, config)
    assert not config.unread
    return model


def without(case, *names):
    return {n: v for n, v in read_golden(case)[1].items() if n not in names}


def test_gemma_3():
    """As google/gemma-3-1b-it, but for its sizes."""
    old = without("gemma3", "rope_parameters", "layer_types", "_sliding_window_pattern")
    old |= {"rope_theta": 1000000, "rope_local_base_freq": 10000, "sliding_window_pattern": 3}
    old |= {
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "cache_implementation": "hybrid",
    }
    model = read(old)
    assert model.position_encoding == ByKind(RoPE(1e6, scaling=Linear(8.0)), RoPE(1e4))
    assert model.attention.layer_pattern == ("sliding", "sliding", "global")


@pytest.mark.parametrize("case", ["falcon_7b", "falcon_rw"])
def test_falcon(case):
    """Under the names of its own code, which had some sizes and the activation as constants."""
    new = ("num_hidden_layers", "num_attention_heads", "activation", "ffn_hidden_size")
    absent = ("new_decoder_architecture", "num_kv_heads", "num_ln_in_parallel_attn")
    old = without(case, *new, *absent, "rope_parameters", "max_position_embeddings")
    got, want = read(old | {"n_layer": 3, "n_head": 6}), read(read_golden(case)[1])
    assert (got.num_layers, got.context_length, got.encoding) == (3, 2048, want.encoding)
    assert (got.num_kv_heads, got.d_ff) == (want.num_kv_heads, want.d_ff)
    assert got.feed_forward.parallel == want.feed_forward.parallel
    assert got.feed_forward.kind == want.feed_forward.kind


def test_gpt_oss():
    """As openai/gpt-oss-20b, whose keys say two things twice."""
    old = without("gpt_oss", "rope_parameters", "num_experts_per_tok")
    old |= {"rope_theta": 150000, "initial_context_length": 4096, "experts_per_token": 2}
    old["rope_scaling"] = {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    }
    model = read(old)
    assert model.moe.top_k == 2
    assert str(model.position_encoding) == (
        "rope(base=150000.0, scaling=yarn(factor=32.0, original_length=4096, truncate=False))"
    )


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("mpt", {"attn_config": {"qk_ln": True}}, "attn_config: qk_ln=True; allowed: False"),
        ("mpt", {"attn_config": {"alibi": False}}, "attn_config: alibi=False; allowed: True"),
        ("mpt", {"no_bias": False}, "no_bias=False; allowed: True"),
        ("gpt_oss", {"swiglu_limit": 9.0}, "swiglu_limit=9.0; allowed: 7.0"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "residual.*allowed: False"),
        ("qwen2_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2; allowed: 1"),
    ],
)
def test_what_no_model_here_has(case, change, message):
    with pytest.raises(ValueError, match=message):
        read(read_golden(case)[1] | change)


def test_unknown_keys_of_a_nested_config_are_told():
    config = HubConfig(read_golden("mpt")[1] | {"attn_config": {"new_key": 1}}, "config.json")
    read_fields(find("MptForCausalLM", "").fields, config)
    assert config.unread == {"attn_config.new_key"}
