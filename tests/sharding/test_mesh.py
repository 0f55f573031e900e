"""Training on sixteen simulated devices, on any mesh, is training on one."""

import functools
import json

import jax
import numpy as np
import pytest

from jaxlm.checkpoints import load_numpy, restore
from jaxlm.model.parameters import logical_axes
from jaxlm.sharding.mesh import (
    AXES,
    RULES,
    MeshConfig,
    batch_sharding,
    make_mesh,
    parameter_sharding,
)
from tests.devices import on_devices
from tests.sharding.training_process import RUNS, three_steps
from tests.training.cases import MODELS, make_model

IN_EVERY_RUN = ("all", "experts")
OTHERS = tuple(name for name in RUNS if name not in IN_EVERY_RUN)


@pytest.fixture(scope="module", params=[IN_EVERY_RUN, pytest.param(OTHERS, marks=pytest.mark.slow)])
def meshes(request, tmp_path_factory):
    """Where the runs are saved, and what became of each, by its name."""
    directory = tmp_path_factory.mktemp("meshes")
    printed = on_devices(16, "tests.sharding.training_process", str(directory), *request.param)
    return directory, json.loads(printed)


@functools.cache
def one_device(kind):
    assert jax.device_count() == 1
    return three_steps(kind, make_mesh(MeshConfig()))


def test_the_first_state_is_that_of_one_device_to_the_bit(meshes):
    """Each of its numbers is a function of the seed and of its place: nothing is summed."""
    for name, result in meshes[1].items():
        *_, begun = one_device(RUNS[name][0])
        assert result["begun"] == begun, name


def test_losses_and_parameters_are_those_of_one_device(meshes):
    """On 2, 4, 8 and 16 devices, cut one way or another: float32 is summed in another order. (In
    every run on 8 and 16.)
    """
    directory, results = meshes
    for name, result in results.items():
        _, state, losses, _ = one_device(RUNS[name][0])
        # Three steps of adamw, which divides by small moments.
        np.testing.assert_allclose(result["losses"], losses, rtol=1e-5, err_msg=name)
        saved = load_numpy(directory / name)["params"]
        close = functools.partial(np.testing.assert_allclose, atol=2e-4, err_msg=name)
        jax.tree.map(close, saved, state.params)


def test_restored_from_a_mesh_on_one_device(meshes):
    """A laptop opens what a pod saved."""
    directory, results = meshes
    shapes, state, *_ = one_device("plain")
    for name in results:
        if RUNS[name][0] == "plain":
            restored = restore(directory / name, shapes).state
            assert jax.tree.structure(restored) == jax.tree.structure(state)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), restored, state)


# By mesh: the parts of what its axes cut.
CUTS = {"data": 1, "fsdp": 4, "all": 4}
CUT = (
    "embedding",
    "head",
    "layers/block_0/attention/q/kernel",
    "layers/block_0/attention/out/kernel",
    "layers/block_0/feed_forward/up/kernel",
)
WHOLE = ("final_norm/scale", "layers/block_0/attention_norm/scale")


def test_parameters_moments_and_average_are_cut_alike(meshes):
    for mesh in CUTS.keys() & meshes[1].keys():
        cuts = meshes[1][mesh]["cuts"]
        for where in ("params", "optimizer/1/mu", "optimizer/1/nu", "ema"):
            assert {cuts[f"{where}/{name}"] for name in CUT} == {CUTS[mesh]}, (mesh, where)
            assert {cuts[f"{where}/{name}"] for name in WHOLE} == {1}, (mesh, where)


def test_sizes_that_do_not_fit_the_devices():
    with pytest.raises(ValueError, match=r"fsdp=2 × context=5 × tensor=3 = 30; .* devices, 1$"):
        make_mesh(MeshConfig(fsdp=2, context=5, tensor=3))
    with pytest.raises(ValueError, match="mesh: fsdp=0; allowed: a number >= 1"):
        MeshConfig(fsdp=0)


def abstract_mesh(data=1, fsdp=1, context=1, tensor=1):
    return jax.sharding.AbstractMesh((data, fsdp, context, tensor), AXES)


def test_rows_that_cannot_be_shared_out():
    with pytest.raises(ValueError, match="batch_size=6; allowed: a multiple of data × fsdp = 4"):
        batch_sharding(abstract_mesh(data=2, fsdp=2), 6, 8)
    with pytest.raises(ValueError, match="sequence_length=9; allowed: a multiple of context = 2"):
        batch_sharding(abstract_mesh(data=2, context=2), 6, 9)


def test_a_parameter_that_cannot_be_cut():
    with pytest.raises(ValueError, match="parameter head: vocab=37 over mesh axis tensor=2; allow"):
        axes = jax.sharding.PartitionSpec("embed", "vocab")
        parameter_sharding(abstract_mesh(tensor=2), "head", axes, (16, 37))


def test_every_axis_of_every_parameter_has_a_rule():
    """A new parameter with a new axis name needs a line in the table."""
    for name in MODELS:
        axes = jax.tree.leaves(
            logical_axes(make_model(name)), is_leaf=lambda x: isinstance(x, jax.P)
        )
        used = {a for spec in axes for a in spec if a is not None}
        assert used <= set(RULES)
