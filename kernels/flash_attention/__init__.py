"""Flash attention on TPU."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.flash_attention import forward
from kernels.flash_attention.blocks import Blocks, choose_blocks
from kernels.flash_attention.call import LANES, Call
from kernels.flash_attention.pattern import Band


def flash_attention(q, k, v, *, ahead=0, window=None, scale, softcap=None, blocks=None, interpret=False):
    B, N, T, H = q.shape
    K, S = k.shape[1:3]
    n = blocks or choose_blocks(T, S)
    pad = lambda x, m: jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % m), (0, 0)))
    q, k, v = pad(q, n.block_q), pad(k, n.stretch), pad(v, n.stretch)
    band = Band(ahead, window, n.block_q, n.block_k, q.shape[2] // n.block_q, k.shape[2] // n.block_k)
    call = Call(band, n, S, H, scale, softcap, False, False)
    group = N // K
    q_spec = pl.BlockSpec((None, None, n.block_q, H), lambda b, h, i, j: (b, h, i, 0))
    kv_spec = pl.BlockSpec((None, None, n.stretch, H), lambda b, h, i, j: (b, h // group, j, 0))
    lse_spec = pl.BlockSpec((None, None, 1, n.block_q), lambda b, h, i, j: (b, h, 0, i))
    out, lse = pl.pallas_call(
        functools.partial(forward.kernel, call),
        grid=(B, N, band.num_blocks_q, call.num_stretches),
        in_specs=[q_spec, kv_spec, kv_spec],
        out_specs=[q_spec, lse_spec],
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, N, 1, q.shape[2]), jnp.float32)],
        scratch_shapes=[pltpu.VMEM((n.block_q, LANES), jnp.float32), pltpu.VMEM((n.block_q, LANES), jnp.float32), pltpu.VMEM((n.block_q, H), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=64 << 20),
        name="flash_attention_forward",
        interpret=interpret,
    )(q, k, v)
    return out[:, :, :T], lse[:, :, 0, :T]
