"""MXFP4, in which gpt-oss stores its experts: blocks of 32 numbers of 4 bits, and a scale of each.

(OCP Microscaling Formats 1.0, section 5.) A number is FP4 E2M1: a sign, two bits of exponent, one
of mantissa. A scale is E8M0: a power of two. Both together are exact in bfloat16, but for scales at
the ends of its range.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped, UInt8

from jaxlm.interop.rows import Shape
from jaxlm.interop.safetensors_folder import SafetensorsFolder

BLOCK = 32
POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# By its four bits.
FP4 = np.array([*POSITIVE, *(-x for x in POSITIVE)], np.float32)
# By its byte; the last one is no number.
E8M0 = np.array([*(2.0 ** (i - 127) for i in range(255)), np.nan], np.float32)
BLOCKS, SCALES = "_blocks", "_scales"


def dequantize(
    blocks: UInt8[np.ndarray, "*rows groups 16"], scales: UInt8[np.ndarray, "*rows groups"]
) -> Shaped[np.ndarray, "*rows columns"]:
    """The numbers, bfloat16, 32 for each group.

    Args:
        blocks: two numbers a byte, the first in its low bits.
        scales: each group's exponent.
    """
    pairs = np.stack([FP4[blocks & 15], FP4[blocks >> 4]], -1).reshape(*scales.shape, BLOCK)
    with np.errstate(over="ignore"):  # infinite then
        numbers = pairs * E8M0[scales][..., None]
    return numbers.reshape(*scales.shape[:-1], -1).astype(jnp.bfloat16)


class Unpacked:
    """A folder's tensors, pairs of blocks and scales as the matrices that they stand for.

    Blocks are of [experts, outputs, inputs]; the matrices of [experts, inputs, outputs], as gpt-oss
    has them without quantization.

    Attributes:
        name, shapes, dtypes: of all tensors, pairs under the name that they share.

    Raises:
        ValueError: blocks without fitting scales.
    """

    def __init__(self, folder: SafetensorsFolder):
        self.name, self._folder = folder.name, folder
        shapes, dtypes = dict(folder.shapes), dict(folder.dtypes)
        for blocks in [n for n in shapes if n.endswith(BLOCKS)]:
            name = blocks.removesuffix(BLOCKS)
            shape, scales = shapes.pop(blocks), shapes.pop(name + SCALES, None)
            kinds = {dtypes.pop(blocks), dtypes.pop(name + SCALES, None)}
            if len(shape) != 4 or shape[3] != BLOCK // 2 or scales != shape[:3] or kinds != {"U8"}:
                raise ValueError(
                    f"{self.name}: {blocks} has shape {list(shape)}, its scales {scales}; allowed: "
                    f"bytes of shape [experts, outputs, groups, {BLOCK // 2}], and one less axis"
                )
            shapes[name], dtypes[name] = (shape[0], shape[2] * BLOCK, shape[1]), "bfloat16"
        self.shapes: Mapping[str, Shape] = shapes
        self.dtypes: Mapping[str, str] = dtypes

    def read(self, name: str) -> np.ndarray:
        """One tensor, as it is stored, or unpacked an expert at a time."""
        if name in self._folder.shapes:
            return self._folder.read(name)
        blocks, scales = self._folder.read(name + BLOCKS), self._folder.read(name + SCALES)
        whole = np.empty(self.shapes[name], jnp.bfloat16)
        for i in range(len(whole)):
            whole[i] = dequantize(blocks[i], scales[i]).T
        return whole
