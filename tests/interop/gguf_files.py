"""GGUF files of the goldens' models, as llama.cpp's conversion scripts write them."""

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

from tests.interop.weights import draw

# The hub's model_type → GGUF's architecture, where they differ.
ARCHITECTURES = {
    "gemma3_text": "gemma3",
    "gpt_neox": "gptneox",
    "gpt_oss": "gpt-oss",
    "mixtral": "llama",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
}
# Two merges over the byte alphabet: "ab", "abc", and a control token.
TOKENS = ["<|end|>", *(chr(c) for c in range(33, 127)), "ab", "abc"]
# Metadata, and the names that config.json has for it, of which the first one there counts.
NAMES = {
    "block_count": "num_hidden_layers n_layer n_layers",
    "context_length": "max_position_embeddings n_positions seq_length max_seq_len",
    "embedding_length": "hidden_size n_embd d_model",
    "feed_forward_length": "intermediate_size ffn_hidden_size",
    "attention.head_count": "num_attention_heads n_head n_heads",
    "attention.head_count_kv": "num_key_value_heads num_kv_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.layer_norm_epsilon": "layer_norm_eps norm_epsilon layer_norm_epsilon",
    "attention.sliding_window": "sliding_window",
    "attention.clamp_kqv": "clip_qkv",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "expert_count": "num_local_experts num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "use_parallel_residual": "use_parallel_residual",
}
SCALING = {
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}


def architecture(config):
    return ARCHITECTURES.get(config["model_type"], config["model_type"])


def metadata(config):
    """What stands behind the architecture's name."""
    config = config | config.get("attn_config", {})
    found = {"attention.layer_norm_epsilon": 1e-5} if config["model_type"] == "olmo" else {}
    for ours, names in NAMES.items():
        values = [config[n] for n in names.split() if config.get(n) is not None]
        found |= {ours: values[0]} if values else {}
    if not found.get("attention.sliding_window"):
        found.pop("attention.sliding_window", None)
    found["vocab_size"] = config["vocab_size"]
    found.setdefault("attention.head_count_kv", found["attention.head_count"])
    found.setdefault("feed_forward_length", 4 * found["embedding_length"])
    found.setdefault("context_length", 2048)  # what BLOOM's config.json leaves out
    rope = config.get("rope_parameters", {})
    found |= {"attention.max_alibi_bias": 8.0} if "alibi_bias_max" in config else {}
    if (types := config.get("layer_types")) and config.get("sliding_window"):
        found["attention.sliding_window_pattern"] = [t == "sliding_attention" for t in types]
    if "sliding_attention" in rope:
        found["rope.freq_base_swa"] = rope["sliding_attention"]["rope_theta"]
    rope = rope.get("full_attention", rope)
    if "rope_theta" in rope:
        found["rope.freq_base"] = rope["rope_theta"]
    width = found.get(
        "attention.key_length", found["embedding_length"] // found["attention.head_count"]
    )
    if "partial_rotary_factor" in rope:
        found["rope.dimension_count"] = int(rope["partial_rotary_factor"] * width)
    if rope.get("rope_type") in ("linear", "yarn", "longrope"):
        found["rope.scaling.type"] = rope["rope_type"]
        found |= {f"rope.scaling.{o}": rope[t] for o, t in SCALING.items() if t in rope}
    if rope.get("rope_type") == "longrope":
        length, trained = found["context_length"], rope["original_max_position_embeddings"]
        factor = np.sqrt(1 + np.log(length / trained) / np.log(trained))
        found["rope.scaling.attn_factor"] = float(factor)
    if config["model_type"] == "gpt_oss":
        found["expert_feed_forward_length"] = config["intermediate_size"]
    return found


def add(writer, key, value):
    """By its Python type; list items alike."""
    first = value[0] if isinstance(value, list) else value
    kinds = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING"}
    kind = gguf.GGUFValueType[kinds[type(first)]]
    if isinstance(value, list):
        writer.add_array(key, value)
    else:
        writer.add_key_value(key, value, kind)


def paired(x, heads):
    """llama.cpp's order of a head's rows: dims i and i + R of a head become 2i and 2i + 1."""
    return x.reshape(heads, 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def ungrouped(x, groups, heads):
    """Rows of groups of queries, a key and a value → of all queries, all keys, all values."""
    x = x.reshape(groups, heads // groups + 2, -1, *x.shape[1:])
    parts = (x[:, :-2], x[:, -2:-1], x[:, -1:])
    rest = x.shape[3:]
    return np.concatenate([p.reshape(-1, *rest) for p in parts])


def converted(config, shapes):
    """The tensors, changed as GGUF has them, by the names that gguf's table of names knows."""
    kind, about = architecture(config), metadata(config)
    heads = about["attention.head_count"]
    kv = about["attention.head_count_kv"]
    experts = {}
    for name, shape in shapes.items():
        x = draw(name, shape)
        if kind in ("llama", "olmo") and (".q_proj." in name or ".k_proj." in name):
            x = paired(x, kv if ".k_proj." in name else heads)
        if kind in ("bloom", "gptneox", "falcon") and ".query_key_value." in name:
            x = ungrouped(x, kv if kind == "falcon" else heads, heads)
        if kind == "gpt2" and x.ndim == 2 and ".h." in name:
            x = x.T
        if kind.startswith("gemma") and name.endswith("norm.weight"):
            x = x + 1
        if kind == "gpt-oss" and ".experts." in name:
            yield from gpt_oss_experts(name, x)
        elif ".experts." in name:
            start, (number, rest) = (
                name.split("experts.")[0],
                name.split("experts.")[1].split(".", 1),
            )
            start = start.replace("model.", "").replace("block_sparse_moe", "feed_forward")
            start = name.split("experts.")[0] if ".mlp." in name else start
            experts.setdefault(f"{start}experts.{rest}", {})[int(number)] = x
        else:
            short = name.removeprefix("transformer.") if kind == "bloom" else name
            yield (f"{short}.weight" if short.endswith("sinks") else short), x
    for name, found in experts.items():
        yield name, np.stack([found[i] for i in range(len(found))])


def gpt_oss_experts(name, x):
    """One tensor of gate and up, columns in turn and inputs first, as two with outputs first."""
    start, _, last = name.rpartition(".")
    part, bias = last.removesuffix("_bias"), last.endswith("_bias")
    ending = "bias" if bias else "weight"
    x = x if bias else x.swapaxes(1, 2)
    if part == "down_proj":
        yield f"{start}.down_proj.{ending}", x
    else:
        yield f"{start}.gate_proj.{ending}", x[:, ::2]
        yield f"{start}.up_proj.{ending}", x[:, 1::2]


def angles(config):
    """Divisors of frequencies that Llama 3.1 and LongRoPE have, as llama.cpp writes them."""
    rope = config.get("rope_parameters", {})
    if rope.get("rope_type") == "longrope":
        for name in ("long", "short"):
            yield f"rope_factors_{name}.weight", np.float32(rope[f"{name}_factor"])
    if rope.get("rope_type") == "llama3":
        width, length = config["head_dim"], rope["original_max_position_embeddings"]
        waves = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, width, 2) / width)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        smooth = np.clip((length / waves - low) / (high - low), 0, 1)
        yield "rope_freqs.weight", np.float32(1 / ((1 - smooth) / rope["factor"] + smooth))


def as_stored(x, kind):
    """Its blocks; of kinds that the package only unpacks, blocks of small numbers drawn anew."""
    try:
        return gguf.quantize(x, kind)
    except NotImplementedError:
        rows, size = x.shape[0], x.shape[1] // gguf.GGML_QUANT_SIZES[kind][0]
        width = gguf.GGML_QUANT_SIZES[kind][1]
        return np.random.default_rng(x.size).integers(0, 44, (rows, size * width), np.uint8)


def add_tokenizer(writer):
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] + [1] * (len(TOKENS) - 1))
    writer.add_token_merges(["a b", "ab c"])
    writer.add_eos_token_id(0)


def write_gguf(path, config, shapes, kind=Kind.F32, tokenizer=add_tokenizer, tensors=None):
    """The golden's model; matrices as `kind`; other tensors than the drawn ones if they are given,
    which may have GGUF's names.
    """
    name, about = architecture(config), metadata(config)
    writer = gguf.GGUFWriter(path, name)
    for key, value in about.items():
        add(writer, f"{name}.{key}", value)
    tokenizer(writer)
    arch = next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == name)
    names = gguf.get_tensor_name_map(arch, min(about["block_count"], 9))
    for theirs, x in tensors or (*converted(config, shapes), *angles(config)):
        stored = kind if x.ndim == 2 else Kind.F32
        short = names.get_name(theirs, try_suffixes=(".weight", ".bias")) or theirs
        writer.add_tensor(short, as_stored(np.ascontiguousarray(x), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
