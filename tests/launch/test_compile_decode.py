"""launch.compile decode: what reading prompts and a step behind them take of a pod."""

import importlib.util
import json
import subprocess
import sys

import pytest

from configs import llama3_8b, tiny
from jaxlm import caches
from jaxlm.training.flops import decode_flops_per_token, prefill_flops
from launch.pod_programs import NEW_TOKENS, decoding_config
from tests.decoding.test_caches import SETTINGS


def test_model_flops_by_hand():
    """Llama 3 8B: two for each weight, and four for each pair of tokens, layer and dim of heads."""
    config = decoding_config(llama3_8b.get_config().to_dict())
    layers = 32 * (4096 * 128 * (2 * 32 + 2 * 8) + 3 * 4096 * 14336)
    head = 4096 * 128256
    assert decode_flops_per_token(config) == 2 * (layers + head)
    pairs = 1000 * 1001 / 2
    whole = 2 * (1000 * layers + head) + 4 * 32 * 4096 * pairs
    assert prefill_flops(config, 1000, keeps_all=True) == pytest.approx(whole)
    assert prefill_flops(config, 1000, keeps_all=False) == 2 * (1000 * layers + head)
    assert config.numerics.param_dtype == "bfloat16"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A function of flags: the figures of decoding with configs/tiny.py on v5e:2x2."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu: pip install -e '.[tpu]'")

    def run(*flags):
        output = tmp_path_factory.mktemp("figures") / "figures.json"
        command = [sys.executable, "-m", "launch.compile", "decode", "--topology=v5e:2x2"]
        command += ["--config=configs/tiny.py", f"--output={output}", *flags]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        return json.loads(output.read_text()) if output.exists() else None, finished

    return run


@pytest.mark.tpu_aot
@pytest.mark.parametrize("cache", ["dense", "quantized(bits=8)"])
def test_each_chip_keeps_its_part_of_the_cache(compiled, cache):
    rows, length = 4, 1024
    flags = [f"--rows={rows}", f"--length={length}", f"--cache={cache}", "--config.mesh.tensor=2"]
    found, finished = compiled(*flags)
    assert finished.returncode == 0, finished.stderr
    config = decoding_config(tiny.get_config().to_dict())
    whole = caches.parse(cache).nbytes_of(config, rows, length + NEW_TOKENS)
    for name in ("prefill", "step"):
        part = found[name]
        # Rows over two, heads over two; positions and lengths of a row are on both of its devices.
        assert whole / 4 <= part["cache_bytes"] < 1.1 * whole / 4
        assert part["fits"]
    step = found["step"]
    assert all(e["nbytes"] < step["cache_bytes"] for e in step["exchanges"])
    assert step["hbm_bytes"] < 4 * (step["cache_bytes"] + parameter_bytes(step))
    assert step["most_tokens_per_second"] == rows / max(step["seconds"].values())


def parameter_bytes(found):
    return sum(n for name, n in found["held"].items() if name.startswith("1."))


@pytest.mark.tpu_aot
@pytest.mark.parametrize("length", [16, 256])  # those of few tokens are written one by one
@pytest.mark.parametrize("cache", SETTINGS)
def test_every_cache_is_written_on_a_tpu(compiled, cache, length):
    flags = [f"--length={length}", f"--cache={SETTINGS[cache]}", "--config.model.num_layers=2"]
    found, finished = compiled("--rows=8", "--config.mesh.tensor=2", *flags)
    assert finished.returncode == 0, finished.stdout
    assert found["prefill"]["fits"] and found["step"]["fits"]


@pytest.mark.tpu_aot
def test_what_does_not_fit_says_by_how_much(compiled):
    found, finished = compiled("--rows=4096", "--length=65536")
    assert finished.returncode == 1
    assert "does not fit, by" in finished.stdout or "does not compile" in finished.stdout
    assert not (found["prefill"]["fits"] and found["step"]["fits"])


@pytest.mark.tpu_aot
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--cache=dens"], "cache='dens' (did you mean dense?); allowed: "),
        (["--config.mesh.tensor=3"], "allowed: sizes whose product is the number of devices, 4"),
    ],
)
def test_bad_flags_are_told_in_a_line(compiled, flags, message):
    found, finished = compiled(*flags)
    assert finished.returncode == 1 and found is None
    assert message in finished.stderr and "Traceback" not in finished.stderr
