"""launch.compile train: what a step takes of a pod, from the compiled program."""

import importlib.util
import json
import subprocess
import sys

import pytest

from configs import llama3_8b
from jaxlm.sharding.mesh import MeshConfig
from jaxlm.training.run import RunConfig
from launch.aot.cost import Memory
from launch.aot.hlo import Collective
from launch.aot.pod import PodCost, exchanges_of
from launch.compile_train import figures, mesh_sizes
from launch.pod_table import MIB


def test_exchanges_are_summed_by_kind_and_group():
    found = [
        Collective("all-gather", "a", 100, 4, 3),
        Collective("all-gather", "b", 50, 4, 1),
        Collective("all-gather", "c", 10, 2, 1),
        Collective("all-reduce", "d", 1000, 4, 2),
    ]
    first, second, third = exchanges_of(found)
    assert (first.kind, first.count, first.nbytes, first.taken_in) == ("all-reduce", 2, 2000, 3000)
    # Of 350 bytes that a device has in the end, it had a quarter.
    assert (second.group_size, second.count, second.nbytes) == (4, 4, 350)
    assert second.taken_in == 350 * 3 / 4
    assert (third.group_size, third.taken_in) == (2, 5)


def test_the_rest_of_the_devices_are_for_data():
    assert mesh_sizes(MeshConfig(fsdp=8, tensor=2), 64) == {
        "data": 4,
        "fsdp": 8,
        "context": 1,
        "tensor": 2,
    }
    with pytest.raises(ValueError, match=r"fsdp=3 × .* = 63; allowed: .* number of devices, 64"):
        mesh_sizes(MeshConfig(fsdp=3), 64)


def test_bounds_are_those_of_public_peaks():
    """By hand: 8.03e9 weights × 6 and the pairs of tokens, on 4 chips of 197 TFLOP/s."""
    run = RunConfig.from_dict(llama3_8b.get_config().to_dict())
    gathered = exchanges_of([Collective("all-gather", "a", 4 * 10**12, 4, 1)])
    cost = PodCost("v5e:2x2", 4, None, Memory(10**10, 0, 0, 10**10), {}, gathered, 820 * 10**9)
    found = figures(run, cost, {})
    tokens = 512 * 8192
    weights = 32 * (4096 * 128 * (2 * 32 + 2 * 8) + 3 * 4096 * 14336) + 4096 * 128256
    flops = tokens * (6 * weights + 12 * 32 * 4096 * (8192 + 1) / 2)
    assert found["model_flops"] == pytest.approx(flops)
    assert found["seconds"]["arithmetic"] == pytest.approx(flops / 4 / 1.97e14)
    assert found["seconds"]["HBM"] == pytest.approx(1.0)
    assert found["seconds"]["links"] == pytest.approx(3e12 / (4 * 4.5e10))
    assert found["least_step_seconds"] == found["seconds"]["arithmetic"]
    assert not cost.fits  # 20 GB in 17.2


SHARED = ["--config.mesh.data=1", "--config.mesh.context=4"]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A function of flags: the figures of a config's step on v5e chips, and the process."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu: pip install -e '.[tpu]'")

    def run(*flags, config="tiny", topology="v5e:2x2"):
        output = tmp_path_factory.mktemp("figures") / "figures.json"
        command = [sys.executable, "-m", "launch.compile", "train", f"--topology={topology}"]
        command += [f"--config=configs/{config}.py", f"--output={output}", *flags]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        found = json.loads(output.read_text()) if output.exists() else None
        return found, finished

    return run


@pytest.mark.tpu_aot
@pytest.mark.parametrize(
    ("flags", "kinds"),
    [
        # Rows alone are cut: only sums, of gradients and figures; whatever attention is used.
        ([], {"all-reduce"}),
        (["--config.mesh.fsdp=4"], {"all-gather", "all-reduce", "all-to-all"}),
        (["--config.mesh.tensor=2"], {"all-gather", "all-reduce", "all-to-all"}),
        # No keys are gathered in a ring.
        ([*SHARED, "--config.model.attention.implementation=ring"], {"all-reduce"}),
        (
            [*SHARED, "--config.model.attention.implementation=all_to_all"],
            {"all-reduce", "all-to-all", "all-gather"},
        ),
    ],
    ids=["data", "fsdp", "tensor", "ring", "all_to_all"],
)
def test_a_step_on_four_chips(compiled, flags, kinds):
    found, finished = compiled(*flags)
    assert finished.returncode == 0, finished.stderr
    moved = {e["kind"] for e in found["exchanges"]} - {"collective-permute", "reduce-scatter"}
    assert moved <= kinds
    held = found["held"]
    # Two moments of adamw for each parameter, and two counters.
    assert held["0.optimizer"] == pytest.approx(2 * held["0.params"], abs=100)
    assert found["fits"] and "fits" in finished.stdout
    assert found["hbm_total"] > held["0.params"] + held["0.optimizer"]


@pytest.mark.tpu_aot
def test_each_chip_gets_its_part_of_the_matrices_gradients(compiled):
    """Where fsdp's devices lie along one axis of the chips' grid: see `jaxlm.sharding.mesh`."""
    model = {"num_layers": 2, "d_model": 1024, "vocab_size": 8192, "feed_forward.d_ff": 3584}
    model |= {"attention.num_heads": 8, "attention.num_kv_heads": 8}
    flags = [f"--config.model.{name}={value}" for name, value in model.items()]
    flags += ["--config.data.sequence_length=1024", "--config.data.batch_size=16"]
    flags += ["--config.mesh.fsdp=4"]
    found, finished = compiled(*flags, config="llama3_8b", topology="v5e:2x4")
    assert finished.returncode == 0, finished.stderr
    of_fsdp = {e["kind"]: e for e in found["exchanges"] if e["group_size"] == 4}
    assert of_fsdp.get("all-reduce", {"nbytes": 0})["nbytes"] < MIB
    # Seven matrices in each of two layers, and the head.
    assert of_fsdp["reduce-scatter"]["count"] == 7 * 2 + 1
    # Layers in both passes, then the head and the embedding.
    assert of_fsdp["all-gather"]["count"] <= 7 * 2 * 2 + 2


@pytest.mark.tpu_aot
def test_what_does_not_fit_says_by_how_much(compiled):
    found, finished = compiled("--config.model.d_model=8192", "--config.model.num_layers=16")
    assert finished.returncode == 1
    assert "does not" in finished.stdout and (found is None or not found["fits"])
