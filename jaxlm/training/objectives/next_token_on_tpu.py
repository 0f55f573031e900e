"""The next-token loss by the TPU kernels of `kernels.cross_entropy`."""

from __future__ import annotations

import math

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxlm.sharding.mesh import RULES, dividing_axes, dividing_spec
from jaxlm.training.objectives.next_token import LossSpec, LossSums
from kernels.chip import target_chip
from kernels.cross_entropy import DTYPES, cross_entropy
from kernels.cross_entropy.blocks import widest


def fits(hidden: Float[Array, "B T D"]) -> bool:
    """Whether the kernels take these hidden states, on the chip and mesh that are set.

    Where the head is cut along the vocabulary they do not: XLA's form keeps it cut, and the
    kernels would first have to gather it.
    """
    chip, mesh = target_chip(), jax.sharding.get_abstract_mesh()
    if chip is None or hidden.dtype not in DTYPES:
        return False
    whole = mesh.empty or mesh.shape.get(RULES["vocab"], 1) == 1
    return whole and hidden.shape[-1] <= widest(hidden.dtype.itemsize, chip)


def next_token_loss_on_tpu(
    spec: LossSpec,
    hidden: Float[Array, "B T D"],
    matrix: Float[Array, "D V"] | Float[Array, "V D"],
    bias: Float[Array, "V"] | None,
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    tied: bool = False,
) -> tuple[Float[Array, ""], LossSums]:
    """As `next_token_loss`, for what `fits`; no logits leave the chip's VMEM, so no `spec.chunk`.

    On a mesh set by `jax.set_mesh`, each device works for its tokens. A gradient of the matrix,
    and the sum of the devices' gradients, is in the matrix's dtype. Where the matrix is cut along
    the embedding's axis, each device gathers it and gets its own part of the sum alone.

    Args:
        tied: the matrix is the embedding [V, D]. It is read as it lies: its transpose would be a
            copy at every step, and another one of its gradient.
    """
    chip, mesh = target_chip() or "v5e", jax.sharding.get_abstract_mesh()
    embed_axis = 1 if tied else 0
    cut = () if mesh.empty else dividing_axes(mesh, "embed", matrix.shape[embed_axis])

    def of_rows(hidden, matrix, bias, targets):
        if math.prod(mesh.shape[name] for name in cut) > 1:
            # The transpose of a gather is a sum of which each device keeps its part.
            matrix = jax.lax.all_gather(matrix, cut, axis=embed_axis, tiled=True)
        flat = hidden.reshape(-1, hidden.shape[-1])
        losses = cross_entropy(
            flat,
            matrix,
            bias,
            targets.reshape(-1),
            vocab_axis=0 if tied else 1,
            softcap=spec.softcap,
            chip=chip,
        )
        return tuple(x.reshape(targets.shape) for x in losses)

    if not mesh.empty:
        rows = dividing_spec(mesh, ("batch", "length"), hidden.shape)
        part = PartitionSpec(*[None] * embed_axis, cut)
        of_rows = jax.shard_map(
            of_rows,
            in_specs=(rows, part, PartitionSpec(), rows),
            out_specs=(rows, rows, rows),
            check_vma=False,  # pallas_call does not say along which axes its results vary
        )
    nll, lse, correct = of_rows(hidden, matrix, bias, targets)
    z = (weights * lse**2).sum()
    total = (weights * nll).sum()
    sums = LossSums(total, z, (weights * correct.astype(weights.dtype)).sum())
    return total + spec.z_weight * z, jax.lax.stop_gradient(sums)
