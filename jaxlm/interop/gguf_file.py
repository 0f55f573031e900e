"""A GGUF file: metadata and tensors, under its own names.

(The format's description is docs/gguf.md of the ggml project.) The gguf package unpacks the
quantizations; its reader is not used, which holds several arrays for every token of a vocabulary.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxlm.data.optional import optional

VERSIONS = (2, 3)
# Kinds of values in the metadata: struct's letters for numbers, and the two others.
NUMBERS = dict(zip((*range(8), 10, 11, 12), "BbHhIif?Qqd", strict=True))
FLOAT32, STRING, ARRAY = 6, 8, 9
MAX_AXES = 4
# GGUF's names of what is no quantization.
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
# Numbers that are unpacked at a time, so that the parts of their blocks stay small.
PART = 2**20


class Stored(NamedTuple):
    """One tensor: its quantization, its shape as NumPy has it, and its bytes in the file."""

    kind: Any
    shape: tuple[int, ...]
    start: int
    size: int


class GGUFFile:
    """A GGUF file.

    Attributes:
        name: its path.
        metadata: by its names; float32 as the shortest decimal that rounds to it.
        shapes, dtypes: of each tensor; quantized ones are read as float32.

    Raises:
        ValueError: damaged or in parts, tensors that overlap, a quantization that is not known.
    """

    def __init__(self, path: Path):
        self._gguf = optional("gguf", str(path))
        self._path, self.name = path, str(path)
        self.metadata: dict[str, Any] = {}
        self._tensors: dict[str, Stored] = {}
        try:
            with path.open("rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                self._read_header(_Cursor(data))
                data.close()
        except (struct.error, ValueError, OverflowError) as error:
            raise ValueError(f"{path} is no whole GGUF file: {error}") from error
        if self.metadata.get("split.count", 1) != 1:
            count = self.metadata["split.count"]
            raise ValueError(
                f"{path}: one of {count} parts; allowed: a whole file, as merged parts"
            )
        self._check_places()
        self._check_quantizations()
        self.shapes: Mapping[str, tuple[int, ...]] = {n: t.shape for n, t in self._tensors.items()}
        self.dtypes: Mapping[str, str] = {
            n: DTYPES.get(t.kind.name, "float32") for n, t in self._tensors.items()
        }

    def _read_header(self, at: _Cursor) -> None:
        if at.take(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version, tensors, values = (at.number(letter) for letter in "IQQ")
        if version not in VERSIONS:
            raise ValueError(f"version={version}; allowed: {', '.join(map(str, VERSIONS))}")
        for _ in range(values):
            key = at.string()
            if key in self.metadata:
                raise ValueError(f"{key} is there twice")
            self.metadata[key] = at.value(at.number("I"))
        found: dict[str, tuple[tuple[int, ...], Any, int]] = {}
        for _ in range(tensors):
            name, axes = at.string(), at.number("I")
            if name in found or axes > MAX_AXES:
                raise ValueError(f"{name} is there twice, or has more than {MAX_AXES} axes")
            turned = [at.number("Q") for _ in range(axes)]
            while len(turned) > 1 and turned[-1] == 1:  # of which ggml keeps no count
                turned.pop()
            kind = self._gguf.GGMLQuantizationType(at.number("I"))
            found[name] = tuple(reversed(turned)), kind, at.number("Q")
        align = self.metadata.get("general.alignment", 32)
        if not isinstance(align, int) or align < 1:
            raise ValueError(f"general.alignment={align!r}; allowed: an integer >= 1")
        first = -(-at.at // align) * align
        for name, (shape, kind, offset) in found.items():
            block, width = self._gguf.GGML_QUANT_SIZES[kind]
            size = math.prod(shape) // block * width
            if shape and shape[-1] % block:
                raise ValueError(f"{name}: rows of {shape[-1]} numbers in blocks of {block}")
            if first + offset + size > at.end:
                raise ValueError(f"{name} ends behind the file's end")
            self._tensors[name] = Stored(kind, shape, first + offset, size)

    def _check_places(self) -> None:
        end, last = 0, "the header"
        for name, tensor in sorted(self._tensors.items(), key=lambda item: item[1].start):
            if tensor.start < end:
                raise ValueError(f"{self.name}: {name} overlaps {last}")
            end, last = tensor.start + tensor.size, name

    def _check_quantizations(self) -> None:
        """One block of each kind is unpacked, before anything large is."""
        for kind in {t.kind for t in self._tensors.values()}:
            _, size = self._gguf.GGML_QUANT_SIZES[kind]
            try:
                self._gguf.dequantize(np.zeros(size, np.uint8), kind)
            except (NotImplementedError, KeyError) as error:
                raise ValueError(
                    f"{self.name}: quantization {kind.name}; allowed: F32, F16, BF16 and what the "
                    "gguf package unpacks (Q4_0 to Q8_0, K-quants, MXFP4, …)"
                ) from error

    def read(self, name: str) -> np.ndarray:
        """One tensor, float32 unless it is stored as other floats; a part of it at a time, so that
        little stands beside the result.
        """
        kind, shape, start, size = self._tensors[name]
        if kind.name in DTYPES:
            data = np.fromfile(self._path, np.uint8, size, offset=start)
            return data.view(jnp.dtype(DTYPES[kind.name])).reshape(shape)
        block, width = self._gguf.GGML_QUANT_SIZES[kind]
        whole = np.empty(math.prod(shape), np.float32)
        step = PART // block * block
        for i in range(0, whole.size, step):
            part = whole[i : i + step]
            count, offset = part.size // block * width, start + i // block * width
            data = np.fromfile(self._path, np.uint8, count, offset=offset)
            part[:] = self._gguf.dequantize(data, kind)
        return whole.reshape(shape)


class _Cursor:
    """Reads values one after another, and none behind the end."""

    def __init__(self, data: mmap.mmap):
        self._data, self.at, self.end = data, 0, len(data)

    def take(self, size: int) -> bytes:
        """So many bytes."""
        if size > self.end - self.at:
            raise ValueError(f"its header goes on behind its end ({self.end} bytes)")
        self.at += size
        return self._data[self.at - size : self.at]

    def number(self, letter: str) -> Any:
        """A number of one of struct's kinds."""
        (value,) = struct.unpack(f"<{letter}", self.take(struct.calcsize(f"<{letter}")))
        return value

    def string(self) -> str:
        """A text."""
        return self.take(self.number("Q")).decode()

    def value(self, kind: int) -> Any:
        """A number, a text, or a list of either."""
        if kind == STRING:
            return self.string()
        if kind == FLOAT32:
            return float(str(np.float32(self.number("f"))))
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        kind, count = (self.number("I"), self.number("Q")) if kind == ARRAY else (kind, 0)
        if kind == STRING:
            return [self.string() for _ in range(count)]
        if kind not in NUMBERS:
            raise ValueError(f"a value of kind {kind}; allowed: numbers, texts and lists of them")
        dtype = np.dtype(NUMBERS[kind]).newbyteorder("<")
        return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
