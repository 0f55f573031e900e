"""Flash attention's TPU kernels behind the one door."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.attention.inputs import AttentionInputs, AttentionSpec
from jaxlm.attention.on_mesh import on_mesh
from kernels.chip import target_chip
from kernels.flash_attention import DTYPES, HEAD_DIMS, flash_attention


def unsupported(spec: AttentionSpec, x: AttentionInputs) -> str | None:
    """What of a call the kernels do not do yet; None: they do it all."""
    if target_chip() is None:
        return "a device that is no TPU"
    bounds = spec.mask.intervals[0]
    if not spec.aligned:
        return "queries and keys that are not the same tokens"
    if len(spec.mask.intervals) > 1 or bounds.below is not None or bounds.chunk is not None:
        return f"mask={spec.mask}"
    if spec.score is not None or spec.ceiling is not None:
        return "a position encoding that changes scores or has a ceiling"
    if x.q.shape[-1] not in HEAD_DIMS:
        return f"head_dim={x.q.shape[-1]}"
    if x.q.dtype not in DTYPES:
        return f"dtype={x.q.dtype}"
    return None


def attend_flash(
    spec: AttentionSpec, x: AttentionInputs
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Softmax attention by the kernels of `kernels.flash_attention`.

    On a mesh set by `jax.set_mesh`, each device attends for its rows and its heads.

    Returns:
        As `attend_reference`.

    Raises:
        ValueError: a call that the kernels do not do, see `unsupported`.
    """
    reason, chip = unsupported(spec, x), target_chip()
    if reason is not None or chip is None:
        raise ValueError(
            f"implementation='flash' for {reason}; allowed: tokens attending to one another on a "
            "TPU, causal, full or sliding window, no bias, bfloat16 or float32, head_dim "
            f"{', '.join(map(str, HEAD_DIMS))}"
        )
    bounds = spec.mask.intervals[0]
    kernel = functools.partial(
        flash_attention,
        scale=spec.scale,
        ahead=bounds.ahead,
        window=bounds.window,
        softcap=spec.softcap,
        chip=chip,
    )
    q, k, v = (a.swapaxes(1, 2) for a in (x.q, x.k, x.v))
    sizes, array = {"batch": k.shape[0], "kv_heads": k.shape[1]}, ("batch", "kv_heads")
    run = on_mesh(kernel, sizes, [array, array, array, ("batch",)], [array, array])
    out, lse = run(q, k, v, x.q_segment_ids)
    if x.sink_logits is not None:
        sink = x.sink_logits.astype(jnp.float32)[None, :, None]
        whole = jnp.logaddexp(lse, sink)
        out = (out * jnp.exp(lse - whole)[..., None]).astype(out.dtype)
        lse = whole
    return out.swapaxes(1, 2), lse.swapaxes(1, 2)
