"""The door to the TPU kernels: what they do agrees with the reference, what they do not is said."""

import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxlm import positions
from jaxlm.attention import flash
from jaxlm.attention import mask as masks
from jaxlm.attention.attend import attend
from jaxlm.attention.inputs import AttentionInputs, AttentionSpec
from jaxlm.attention.reference import attend_reference
from jaxlm.positions.encoding import Dimensions
from jaxlm.sharding.mesh import MeshConfig, make_mesh
from tests.kernels.interpret import random
from tests.kernels.test_flash_attention import results
from tests.marks import slow_but

SPEC = AttentionSpec(masks.causal(), scale=0.125, aligned=True)


def inputs(T=130, N=4, K=2, H=64, sinks=True, first=50):
    """Two rows: one of two documents, one with padding."""
    rng = np.random.default_rng(0)
    q, k, v = (random(rng, 2, T, heads, H) for heads in (N, K, K))
    ids = np.ones((2, T), np.int32)
    ids[0, first:], ids[1, T - 10 :] = 2, 0
    at = np.tile(np.arange(T, dtype=np.int32), (2, 1))
    at[0, first:] -= first
    at, ids = jnp.asarray(at), jnp.asarray(ids)
    sink_logits = random(rng, N) if sinks else None
    return AttentionInputs(q, k, v, at, at, ids, ids, sink_logits=sink_logits)


@pytest.fixture
def on_tpu(monkeypatch):
    """As traced for a TPU, and run by its interpreter."""
    monkeypatch.setattr(flash, "target_chip", lambda: "v5e")
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        yield


def both(spec, arrays, given, apart=False):
    """Values and gradients of attention to `given(arrays)`, beside the reference's; `apart` as in
    `results`.
    """

    def of(attend):
        def run(arrays):
            x = given(arrays)
            out, lse = attend(spec, x)
            return out, jnp.where((x.q_segment_ids != 0)[..., None], lse, 0.0)

        return run

    cotangents = jnp.cos(arrays["q"]), jnp.ones(arrays["q"].shape[:3])
    found = results(of(attend), arrays, cotangents, apart)
    wanted = results(of(attend_reference), arrays, cotangents, False)
    return zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)


def check(spec, x):
    """Values and gradients, the sink logits' too."""
    arrays = {"q": x.q, "k": x.k, "v": x.v, "sink_logits": x.sink_logits}
    # float32 sums of 130 terms in another order.
    for a, b in both(spec, arrays, lambda arrays: dataclasses.replace(x, **arrays)):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5)


def test_it_is_chosen_on_a_tpu_and_agrees_with_the_reference(on_tpu):
    x = inputs()
    assert flash.unsupported(SPEC, x) is None
    jaxpr = jax.make_jaxpr(lambda x: attend(SPEC, x))(x)
    assert "pallas_call" in str(jaxpr)
    check(dataclasses.replace(SPEC, softcap=3.0), x)


def test_on_a_mesh_each_device_has_its_rows_and_heads(on_tpu):
    """One device here; tests/attention/test_flash_aot.py compiles for four."""
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        check(dataclasses.replace(SPEC, mask=masks.sliding_window(40)), inputs())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lambda", pytest.param("causal", marks=pytest.mark.slow)])
def test_parts_of_rows_are_whole_rows(name):
    """On two devices, in a process of its own; there the interpreter's threads await each other, so
    a device needs a few.
    """
    command = [sys.executable, "-W", "error", "-m", "tests.attention.context_process", name]
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=2"
    env = {**os.environ, "XLA_FLAGS": flags, "NPROC": "8"}
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]


ENCODINGS = {
    "alibi": "alibi",
    "t5": "t5(num_buckets=8, max_distance=100)",
    "two_sided_t5": "t5(num_buckets=8, max_distance=100, bidirectional=True)",
    "kerple": "kerple",
    "sandwich": "sandwich(width=16)",
    "rope_alibi": "rope_alibi",
    "fire": "fire(width=4, threshold=60)",
    "multiplicative": "rope_alibi(kind=multiplicative)",
    "lm_infinite": "lm_infinite(window=128, num_sinks=3)",
    "lm_infinite_multiplicative": (
        "lm_infinite(inner=rope_alibi(kind=multiplicative), window=130, num_sinks=3)"
    ),
    "lm_infinite_alibi": "lm_infinite(inner=alibi, window=130, num_sinks=3)",
}
# A far part, and one with a gradient of its own.
IN_EVERY_RUN = ("lm_infinite", "fire")


@pytest.mark.parametrize(
    "name",
    slow_but(IN_EVERY_RUN, ENCODINGS),
)
def test_position_encodings(on_tpu, name):
    """Two documents, one longer than the window; the gradient of what the encoding has learned."""
    encoding = positions.parse(ENCODINGS[name]).bind(Dimensions(2, 64, 128, 128))
    x = inputs(T=200, N=2, K=1, first=40, sinks=False)
    lengths = jnp.full((2, 200), 160, jnp.int32)
    learned, rng = encoding.parameters(Dimensions(2, 64, 128, 128)), np.random.default_rng(7)
    params = {name: 0.3 + random(rng, *p.shape) for name, p in learned.items()}
    if "threshold" in params:
        params["threshold"] += 60
    spec = dataclasses.replace(
        SPEC,
        mask=encoding.restrict(masks.full() if name == "two_sided_t5" else masks.causal()),
        score=encoding.score if encoding.changes_scores else None,
        score_form=encoding.score_form,
        network=encoding.network if encoding.score_form == "network" else None,
        score_is_learned=bool(params),
        ceiling=encoding.ceiling,
    )

    def given(arrays):
        q, k = arrays["q"], arrays["k"]
        rotation = encoding.rotation(x.q_positions, lengths, 64)
        return dataclasses.replace(
            x,
            q=encoding.rotate_queries(q, rotation),
            k=encoding.rotate_keys(k, rotation),
            v=arrays["v"],
            head_parameters=encoding.head_parameters(arrays["params"], 2),
            q_far=encoding.far_queries(q),
            k_far=encoding.far_keys(k),
        )

    arrays = {"q": x.q, "k": x.k, "v": x.v, "params": params}
    assert flash.unsupported(spec, jax.eval_shape(given, arrays)) is None
    for a, b in both(spec, arrays, given, apart="lm_infinite" in name):
        # float32 sums of 200 terms, of a bias' gradient of 200² terms, in another order.
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, np.abs(b).max()), rtol=2e-5)


IN_ANY_ORDER = {
    "nope": (masks.chunked(50), "nope"),
    "alibi": (masks.sliding_window(60), "alibi"),
    "linear": (masks.causal(), "rope_alibi(kind=linear)"),
    "lm_infinite_alibi": (masks.causal(), "lm_infinite(inner=alibi, window=60, num_sinks=3)"),
}


@pytest.mark.parametrize(
    "name",
    slow_but(["alibi"], IN_ANY_ORDER),
)
def test_tokens_in_any_order(on_tpu, name):
    """Permuted, as `contiguous=False` promises nothing of them; on a mesh of one device."""
    mask, text = IN_ANY_ORDER[name]
    encoding = positions.parse(text).bind(Dimensions(4, 64, 128, 128))
    x = inputs()
    order = np.random.default_rng(0).permutation(x.q.shape[1])
    at, ids = x.q_positions[:, order], x.q_segment_ids[:, order]
    x = dataclasses.replace(
        x,
        q_positions=at,
        k_positions=at,
        q_segment_ids=ids,
        k_segment_ids=ids,
        head_parameters=encoding.head_parameters({}, 4),
    )
    spec = dataclasses.replace(
        SPEC,
        mask=encoding.restrict(mask),
        score=encoding.score if encoding.changes_scores else None,
        score_form=encoding.score_form,
        ceiling=encoding.ceiling,
        aligned=False,
    )
    assert flash.unsupported(spec, x) is None
    with jax.set_mesh(make_mesh(MeshConfig())):
        assert "pallas_call" in str(jax.make_jaxpr(lambda x: attend(spec, x))(x))
        check(spec, x)


def test_prefix(on_tpu):
    spec = dataclasses.replace(SPEC, mask=masks.prefix(20))
    x = inputs(N=2, K=1)
    assert flash.unsupported(spec, x) is None
    check(spec, x)


PATTERNS = {
    "causal": (masks.causal(), (0, None, 0, None)),
    "full": (masks.full(), (None, None, 0, None)),
    "window": (masks.sliding_window(7), (0, 7, 0, None)),
    "prefix": (masks.prefix(3), (0, None, 0, 3)),
    "lambda": (masks.lambda_shaped(7, 2), (0, 7, 2, None)),
    "lambda longer than the row": (masks.lambda_shaped(70, 2), (0, 70, 0, None)),
    "lambda in a layer's window": (
        masks.lambda_shaped(7, 2) & masks.sliding_window(5),
        (0, 5, 0, None),
    ),
    "sinks that the layer's window hides": (
        masks.lambda_shaped(7, 2) & masks.sliding_window(9),
        None,
    ),
    "chunked": (masks.chunked(4), None),
    "sinks alone": (masks.kept_sinks(4), None),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_masks_as_the_kernels_take_them(name):
    mask, wanted = PATTERNS[name]
    found = flash.pattern_of(mask, 20)
    assert found == wanted
    if found is None:
        return
    i, j = np.arange(20)[:, None], np.arange(20)[None]
    seen = mask.to_dense(jnp.arange(20), jnp.arange(20))
    near = np.ones((20, 20), bool) if found.ahead is None else j - i <= found.ahead
    near = near if found.window is None else near & (i - j < found.window)
    near |= (j < found.num_sinks) & (j <= i)
    near |= (
        np.zeros_like(near)
        if found.prefix is None
        else np.broadcast_to(j < found.prefix, near.shape)
    )
    assert (seen == near).all()


def score_by_row(head, scores, distance, q_positions):
    return scores + q_positions.astype(jnp.float32)


REASONS = {
    "mask=AttentionMask": {"mask": masks.chunked(4)},
    "adds no slope": {"aligned": False, "score": score_by_row, "score_form": "bias"},
    "is no bias, factor or network": {"score": score_by_row},
    "2 sinks and a window of 6": {"mask": masks.lambda_shaped(6, 2)},
}


@pytest.mark.parametrize("reason", REASONS)
def test_what_the_kernels_do_not_do(on_tpu, reason):
    spec, x = dataclasses.replace(SPEC, **REASONS[reason]), inputs(T=8, sinks=False)
    with pytest.raises(ValueError, match=f"implementation='flash' for .*{reason}.*; allowed: "):
        attend(spec, x, "flash")
    out, _ = jax.jit(attend, static_argnums=0)(spec, x)  # auto: another implementation
    wanted, _ = jax.jit(attend_reference, static_argnums=0)(spec, x)
    np.testing.assert_allclose(out, wanted, atol=1e-5)


def test_sinks_beside_a_network(on_tpu):
    mask = masks.lambda_shaped(130, 2)
    spec = dataclasses.replace(SPEC, mask=mask, score=score_by_row, score_form="network")
    assert flash.unsupported(spec, inputs(T=140)) == "2 sinks and a network"


def test_a_ceiling_within_the_window(on_tpu):
    spec = dataclasses.replace(SPEC, mask=masks.sliding_window(8), ceiling=5)
    x = inputs(T=8)
    assert flash.unsupported(spec, x) is None  # near and far are one
    x = dataclasses.replace(x, q_far=x.q, k_far=x.k)
    assert flash.unsupported(spec, x) == "ceiling=5 with window=8"


def test_other_keys_at_the_ceiling_in_any_order(on_tpu):
    x = inputs(T=8)
    x = dataclasses.replace(x, q_far=x.q, k_far=x.k)
    spec = dataclasses.replace(SPEC, aligned=False)
    assert "other keys at the distance ceiling" in (flash.unsupported(spec, x) or "")


def test_a_head_dim_that_the_kernels_do_not_take(on_tpu):
    with pytest.raises(ValueError, match="implementation='flash' for head_dim=24; allowed: "):
        attend(SPEC, inputs(T=8, H=24), "flash")


def test_a_dtype_that_the_kernels_do_not_take(on_tpu):
    x = jax.tree.map(lambda a: a.astype(jnp.float16) if a.ndim == 4 else a, inputs(T=8))
    assert flash.unsupported(SPEC, x) == "dtype=float16"


def test_without_a_tpu():
    with pytest.raises(ValueError, match="implementation='flash' for a device that is no TPU"):
        attend(SPEC, inputs(T=8), "flash")
