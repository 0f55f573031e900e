"""Damaged, hostile and unknown checkpoints: one clear line, before anything large is allocated."""

import json
import re

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import jaxlm
from jaxlm.interop.safetensors_folder import SafetensorsFolder
from jaxlm.load import open_foreign
from tests.interop.folders import read_golden, write_folder
from tests.interop.weights import draw

SHARD = "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    _, config, shapes = read_golden("llama")
    return write_folder(tmp_path / "hub", config, shapes, parts=3)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    _, config, shapes = read_golden("llama")
    return write_folder(tmp_path_factory.mktemp("fuzz") / "hub", config, shapes, parts=3)


@pytest.fixture(scope="module")
def whole_again(tmp_path_factory):
    _, config, shapes = read_golden("llama")
    return write_folder(tmp_path_factory.mktemp("kinds") / "hub", config, shapes)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def unknown_architecture(folder):
    edit(folder / "config.json", architectures=["NoSuchForCausalLM"])


def missing_key(folder):
    edit(folder / "config.json", num_hidden_layers=None)


def unknown_activation(folder):
    edit(folder / "config.json", hidden_act="sine")


def unknown_scaling(folder):
    edit(folder / "config.json", rope_parameters={"rope_type": "spiral"})


def missing_shard(folder):
    (folder / SHARD).unlink()


def truncated_shard(folder):
    whole = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(whole[: len(whole) // 2])


def huge_header(folder):
    (folder / SHARD).write_bytes((2**62).to_bytes(8, "little") + b"{}")


def overlapping_tensors(folder):
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header = json.dumps({"a": entry, "b": entry}).encode()
    (folder / SHARD).write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))


def path_trick(folder):
    edit(folder / INDEX, weight_map={"model.norm.weight": "../model.safetensors"})


def index_of_a_long_name(folder):
    edit(folder / INDEX, weight_map={"model.norm.weight": "a" * 999 + ".safetensors"})


def index_that_is_no_json(folder):
    (folder / INDEX).write_text("[" * 100_000)


def index_without_a_map(folder):
    (folder / INDEX).write_text('{"weight_map": ["model.safetensors"]}')


def index_of_pickles(folder):
    edit(folder / INDEX, weight_map={"model.norm.weight": "pytorch_model.bin"})


def tensor_in_another_shard(folder):
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    shards = sorted(set(index.values()))
    other = shards[(shards.index(index["model.norm.weight"]) + 1) % 3]
    edit(folder / INDEX, weight_map=index | {"model.norm.weight": other})


def tensor_twice_in_the_index(folder):
    text = (folder / INDEX).read_text()
    start = '"weight_map": {'
    (folder / INDEX).write_text(text.replace(start, f'{start}"lm_head.weight": "{SHARD}", '))


def tensor_in_two_shards(folder):
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    for file in sorted(set(index.values()))[:2]:
        tensors = load_file(folder / file)
        save_file(tensors | {"extra": np.zeros(2, np.float32)}, folder / file)


def config_of_a_billion_layers(folder):
    edit(folder / "config.json", num_hidden_layers=10**9)


def config_that_is_a_list(folder):
    (folder / "config.json").write_text("[]")


def no_weights(folder):
    for path in folder.glob("model*"):
        path.unlink()


def pickled_weights(folder):
    no_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")


def wrong_shape(folder):
    edit(folder / "config.json", intermediate_size=57)


def missing_tensor(folder):
    edit(folder / "config.json", num_hidden_layers=4)


def tensor_without_a_place(folder):
    edit(folder / "config.json", num_hidden_layers=2)


def large_tokenizer(folder):
    edit(folder / "config.json", vocab_size=90)


def no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def template_in_another_coding(folder):
    (folder / "chat_template.jinja").write_bytes(b"\xe9")


def kind_without_its_file(folder):
    (folder / "kind.json").write_text('{"kind": "sentencepiece"}')


def peft_adapter_beside_its_base(folder):
    """Which transformers would put on the model."""
    (folder / "adapter_config.json").write_text("{}")


def peft_adapter_alone(folder):
    peft_adapter_beside_its_base(folder)
    (folder / "config.json").unlink()


def no_config(folder):
    (folder / "config.json").unlink()


def run_before_its_first_checkpoint(folder):
    (folder / "tokenizer").mkdir()


def ignored_biases(folder):
    """Which another family than Llama has no place for."""
    edit(folder / "config.json", architectures=["MistralForCausalLM"], attention_bias=True)
    file = folder / SHARD
    bias = {"model.layers.0.self_attn.q_proj.bias": np.zeros(42, np.float32)}
    save_file(load_file(file) | bias, file)
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    edit(folder / INDEX, weight_map=index | dict.fromkeys(bias, SHARD))


CASES = {
    template_in_another_coding: r"chat_template.jinja: .* can't decode byte 0xe9 .*allowed: UTF-8",
    kind_without_its_file: r"kind.json: kind='sentencepiece', but .*No such file",
    **dict.fromkeys(
        (peft_adapter_beside_its_base, peft_adapter_alone),
        r"hub holds an adapter of peft's \(adapter_config.json\); allowed: the model",
    ),
    no_config: r"hub has no checkpoints and no config.json; allowed: the --workdir of a training",
    run_before_its_first_checkpoint: r"hub is a run that has no checkpoint yet; allowed",
    ignored_biases: r"1 tensors that the model has no place for, such as .*q_proj.bias",
    unknown_architecture: r"architecture='NoSuchForCausalLM'; allowed: .*LlamaForCausalLM",
    missing_key: r"config.json: num_hidden_layers is absent",
    unknown_activation: r"hidden_act='sine'; allowed: silu",
    unknown_scaling: r"rope_type='spiral'; allowed: default, linear",
    missing_shard: r"1 of 3 shards are missing, such as model-00002",
    truncated_shard: r"model-00002-of-00003.safetensors is no whole safetensors file",
    huge_header: r"model-00002-of-00003.safetensors is no whole safetensors file",
    overlapping_tensors: r"model-00002-of-00003.safetensors is no whole safetensors file",
    path_trick: r"names '../model.safetensors'; allowed: .safetensors files beside it",
    index_of_a_long_name: r"names 'a{100}'; allowed: .safetensors files beside it",
    index_that_is_no_json: r"index.json is no JSON file: .*recursion",
    index_without_a_map: r"index.json: weight_map; allowed: the name of a file for each tensor",
    index_of_pickles: r"names 'pytorch_model.bin'; allowed: .safetensors files beside it",
    tensor_in_another_shard: r"index.json names 'model.norm.weight' in model-.*\(1 are not\)",
    tensor_twice_in_the_index: r"index.json is no JSON file: 'lm_head.weight' is there twice",
    tensor_in_two_shards: r"model-00002-.* and .*model-00001-.* hold extra",
    config_of_a_billion_layers: r"num_hidden_layers=1000000000; allowed: at most 30, the number",
    config_that_is_a_list: r"config.json holds a list; allowed: a JSON object",
    no_weights: r"hub has no safetensors; allowed: model.safetensors",
    pickled_weights: r"only pickled weights \(pytorch_model.bin\), which may run code",
    wrong_shape: r"gate_proj.weight has shape \[56, 42\]; allowed: \[57, 42\]",
    missing_tensor: r"no tensor model.layers.3.* \(9 are missing\)",
    tensor_without_a_place: r"9 tensors that the model has no place for, such as model.layers.2",
    large_tokenizer: r"vocab_size=97; allowed: at most the model's 90",
    no_tokenizer: r"hub has no tokenizer.json; allowed",
}


def test_a_billion_experts(tmp_path):
    _, config, shapes = read_golden("mixtral")
    folder = write_folder(tmp_path / "hub", config | {"num_local_experts": 10**9}, shapes)
    with pytest.raises(ValueError, match=r"hub: 1000000000 experts; allowed: at most 69, the num"):
        jaxlm.load(folder)


@pytest.mark.parametrize("damage", CASES, ids=lambda f: f.__name__)
def test_it_is_refused(folder, damage):
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=CASES[damage]):
        jaxlm.load(folder)


WRONG = [
    ("config.json", "quantization_config", "abc"),
    ("config.json", "architectures", True),
    ("config.json", "rope_scaling", [1]),
    ("config.json", "rope_scaling", "abc"),
    ("config.json", "rope_theta", {}),
    ("config.json", "rope_theta", "abc"),
    ("config.json", "partial_rotary_factor", [1]),
    ("config.json", "partial_rotary_factor", float("nan")),
    ("config.json", "hidden_act", []),
    ("config.json", "num_hidden_layers", 0),
    ("config.json", "num_hidden_layers", "3"),
    ("config.json", "hidden_size", "42"),
    ("config.json", "vocab_size", 2**31),
    ("config.json", "head_dim", 200_000_000),
    ("config.json", "intermediate_size", 10**9),
    *(("generation_config.json", "eos_token_id", i) for i in ("a", 1.5, [[]], -1, 2**31, True)),
    ("tokenizer_config.json", "eos_token", {}),
    ("tokenizer_config.json", "eos_token", 5),
    ("tokenizer_config.json", "eos_token", "no such token"),
    ("tokenizer_config.json", "add_bos_token", "abc"),
    ("tokenizer_config.json", "chat_template", 5),
    ("tokenizer_config.json", "chat_template", [{}]),
    ("kind.json", "kind", "abc"),
    ("kind.json", "kind", []),
]


OURS = {"hidden_size": "d_model", "intermediate_size": "d_ff"}


def refused(folder):
    """The one line that says why."""
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        open_foreign(folder)
    (line,) = str(error.value).splitlines()
    assert str(folder) in line
    return line


@pytest.mark.parametrize(("file", "key", "value"), WRONG)
def test_a_value_of_another_kind(whole_again, file, key, value):
    path = whole_again / file
    (whole_again / "config.json").write_text(json.dumps(read_golden("llama")[1]))
    config = json.loads(path.read_text()) if path.is_file() else {}
    config.pop("rope_parameters", None)
    path.write_text(json.dumps(config | {key: value}))
    line = refused(whole_again)
    path.unlink()
    assert "allowed: " in line
    assert OURS.get(key, key) in line


@pytest.mark.parametrize("text", ["", "5", "[]", "[" * 100_000, '{"kind": 1, "kind": 2}'])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "generation_config.json", "kind.json"])
def test_a_side_file_that_is_no_object(whole_again, file, text):
    (whole_again / "config.json").write_text(json.dumps(read_golden("llama")[1]))
    (whole_again / file).write_text(text)
    line = refused(whole_again)
    (whole_again / file).unlink()
    assert file in line


def test_a_file_of_a_folder(whole):
    with pytest.raises(FileNotFoundError, match=r"config.json is a file; allowed: .*a .gguf file"):
        jaxlm.load(whole / "config.json")


@pytest.mark.parametrize("name", ["absent.gguf", "ABSENT.GGUF", "dir.gguf"])
def test_no_gguf_file(tmp_path, name):
    (tmp_path / "dir.gguf").mkdir()
    assert refused(tmp_path / name).endswith("; allowed: a .gguf file")


# What an index may hold, for files as for all else.
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
NAMES = st.sampled_from(["model.norm.weight", "lm_head.weight", "absent", ""])
FILES = st.sampled_from([SHARD, "..", "../x.safetensors", "/x.safetensors", "x\0.safetensors"])


@hypothesis.given(
    index=JSON | st.fixed_dictionaries({"weight_map": JSON | st.dictionaries(NAMES, FILES | JSON)})
)
def test_an_index_of_anything(whole, index):
    """It opens, or one line names the file and what is allowed."""
    (whole / INDEX).write_text(json.dumps(index))
    try:
        SafetensorsFolder(whole)
    except (ValueError, FileNotFoundError) as error:
        assert str(whole) in str(error) and len(str(error).splitlines()) == 1


@pytest.mark.parametrize("case", ["llama", "gpt_neox", "gptj"])
def test_a_body_without_its_prefix_and_a_head(case, tmp_path):
    _, config, shapes = read_golden(case)
    whole = write_folder(tmp_path / "whole", config, shapes)
    body = write_folder(tmp_path / "body", config, shapes)
    short = re.compile("(model|gpt_neox|transformer)[.]")
    file = body / "model.safetensors"
    save_file({short.sub("", n, count=1): x for n, x in load_file(file).items()}, file)
    jax.tree.map(np.testing.assert_array_equal, jaxlm.load(body)[1], jaxlm.load(whole)[1])


def test_a_body_alone_with_old_buffers(tmp_path):
    """As openai-community/gpt2 is stored: no prefix, and a mask in every layer."""
    _, config, shapes = read_golden("gpt2")
    whole = write_folder(tmp_path / "whole", config, shapes)
    body = write_folder(tmp_path / "body", config, shapes)
    tensors = {n.removeprefix("transformer."): draw(n, s) for n, s in shapes.items()}
    tensors |= {f"h.{i}.attn.bias": np.ones((1, 1, 8, 8), np.float32) for i in range(3)}
    save_file(tensors | {"lm_head.weight": tensors["wte.weight"]}, body / "model.safetensors")
    (_, want, _), (_, got, _) = jaxlm.load(whole), jaxlm.load(body)
    np.testing.assert_array_equal(got["embedding"], want["embedding"])
    for part in ("layers", "final_norm", "position"):
        assert str(got[part]) == str(want[part])
