"""Every preset is a valid run whose docstring says how to start it, and the model it claims."""

import importlib
import math
import pathlib
import re

import jax
import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

import configs
from jaxlm.data.config import DataConfig, SourceConfig
from jaxlm.model.config import MoEConfig
from jaxlm.model.parameters import abstract_params
from jaxlm.model.transformer import Transformer
from jaxlm.training.flops import matmul_parameters
from jaxlm.training.run import CompareConfig, RunConfig
from launch.overrides import _quoted, clear, run_of

NAMES = sorted(p.stem for p in pathlib.Path(configs.__path__[0]).glob("[a-z]*.py"))
# Parameters of the published checkpoints.
PUBLISHED = {
    "llama3_1b": 1_235_814_400,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "moe_8x7b": 46_702_792_704,
}


def preset(name):
    return run_of(importlib.import_module(f"configs.{name}").get_config())


@pytest.mark.parametrize("name", NAMES)
def test_it_is_a_run_and_says_how_to_start_it(name):
    run = preset(name)
    if run.finetune is None:
        model = run.model_config(tokenizer_vocab_size=1000)
        assert model.context_length == run.data.sequence_length
    else:  # what it does not say is the checkpoint's
        base = preset("tiny").model_config(tokenizer_vocab_size=1000)
        assert run.model_config(tokenizer_vocab_size=1000, base=base) == base
    if name == "default":
        return
    said = importlib.import_module(f"configs.{name}").__doc__
    for word in ("Command", "Hardware", "Time", "Result"):
        assert re.search(rf"^{word} +\S", said, re.MULTILINE), word
    assert f"--config=configs/{name}.py" in said


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_has_the_published_size(name):
    config = preset(name).model_config(tokenizer_vocab_size=1000)
    leaves = jax.tree.leaves(abstract_params(Transformer(config)))
    count = sum(math.prod(x.shape) for x in leaves)
    assert count == PUBLISHED[name]
    if name == "moe_8x7b":
        used = matmul_parameters(config) + config.vocab_size * config.d_model
        assert used / 1e9 == pytest.approx(12.9, rel=5e-3)


def overridden(*overrides):
    values = flags.FlagValues()
    argv = ["train", "--config=configs/default.py", *overrides]
    config = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    values(argv)
    return config.value


# ml_collections loads config files by a method that Python will drop.
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_any_field_can_be_set():
    """Those that are None by default too, and those of parts that are off by default."""
    config = overridden(
        "--config.model.moe.num_experts=4",
        "--config.model.vocab_size=500",
        "--config.model.embedding.scale=2",
        "--config.model.attention.layer_pattern=('global','sliding')",
        "--config.model.attention.sliding_window=8",
        "--config.train.profile=(2,4)",
        "--config.data.sources=one.txt",
        "--config.compare.position_encodings=('rope','nope')",
        "--config.compare.also=rope + lm_infinite",
    )
    clear(config, "--config.train.optimizer.clip_norm=None")
    run = RunConfig.from_dict(config.to_dict())
    model = run.model_config(tokenizer_vocab_size=1)
    assert model.moe == MoEConfig(num_experts=4)
    assert model.vocab_size == 500 and model.embedding.scale == 2.0
    assert model.attention.layer_pattern == ("global", "sliding")
    assert run.train.profile == (2, 4) and run.train.optimizer.clip_norm is None
    assert run.data.sources == (SourceConfig("one.txt"),)
    assert run.compare == CompareConfig(("rope", "nope"), also=("rope + lm_infinite",))


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_sources_with_commas_between():
    for value in ("a.txt,b.txt", "('a.txt','b.txt')"):
        argument = _quoted(f"--config.data.sources={value}")
        run = RunConfig.from_dict(overridden(argument).to_dict())
        assert run.data.sources == (SourceConfig("a.txt"), SourceConfig("b.txt"))


def test_sources_of_a_run_built_in_python():
    assert DataConfig(sources="a.txt,b.txt").sources == (
        SourceConfig("a.txt"),
        SourceConfig("b.txt"),
    )


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_a_field_of_a_part_that_is_off():
    config = overridden("--config.model.moe.top_k=4").to_dict()
    with pytest.raises(ValueError, match=r"model.moe: top_k=4; allowed: set num_experts as well"):
        RunConfig.from_dict(config).check_model()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"data": {"sources": None}}, "data: sources=None; allowed: a path, or a list"),
        ({"data": {"held_out": 3}}, "data: held_out=3; allowed: a path, or a list"),
        ({"model": {}}, "config: data is absent; allowed: DataConfig"),
    ],
)
def test_what_no_run_can_be_made_of(config, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        run_of(ConfigDict(config))
    with pytest.raises(ValueError, match=r"allowed: an ml_collections\.ConfigDict"):
        run_of(config)


def test_presets_are_distinct_models():
    assert len({str(preset(n).model) + str(preset(n).data) for n in NAMES if n != "default"}) >= 6
