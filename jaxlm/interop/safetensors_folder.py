"""The tensors of a Hugging Face folder: safetensors, in one file or several with an index."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jaxlm.data.optional import optional

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
# Safetensors' names.
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
# A norm's parameters in BERT's first files.
OLD_NAME = re.compile(r"(?<=LayerNorm\.)(gamma|beta)$")
NEW_NAMES = {"gamma": "weight", "beta": "bias"}
# Formats that run code when they are opened.
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class SafetensorsFolder:
    """Named arrays of all the folder's shards.

    Args:
        folder: with the shards.

    Raises:
        FileNotFoundError: no weights, only pickled ones, or a shard is missing.
        ValueError: a file is damaged, or the index names a file outside of the folder.
    """

    def __init__(self, folder: Path):
        self.name = str(folder)
        self._stored: dict[str, tuple[Path, str]] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        dtypes: dict[str, str] = {}
        safetensors = optional("safetensors", self.name)
        for path in self._shards(folder):
            try:
                with safetensors.safe_open(path, framework="numpy") as file:
                    for stored in file.keys():  # noqa: SIM118  no mapping
                        header = file.get_slice(stored)
                        name = OLD_NAME.sub(lambda m: NEW_NAMES[m[0]], stored)
                        shapes[name] = tuple(header.get_shape())
                        dtypes[name] = DTYPES.get(header.get_dtype(), header.get_dtype())
                        self._stored[name] = path, stored
            except safetensors.SafetensorError as error:
                raise ValueError(f"{path} is no whole safetensors file: {error}") from error
        self.shapes: Mapping[str, tuple[int, ...]] = shapes
        self.dtypes: Mapping[str, str] = dtypes

    def under(self, prefix: str) -> SafetensorsFolder:
        """All but the head's tensors under names with this prefix: a file of the model without its
        head leaves it out.
        """
        if not any(name.startswith(prefix) for name in self.shapes):
            self.shapes = {prefix + name: shape for name, shape in self.shapes.items()}
            self.dtypes = {prefix + name: dtype for name, dtype in self.dtypes.items()}
            self._stored = {prefix + name: at for name, at in self._stored.items()}
        return self

    def _shards(self, folder: Path) -> list[Path]:
        if (folder / INDEX).is_file():
            names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
            outside = [n for n in names if Path(n).name != n]
            if outside:
                raise ValueError(f"{folder / INDEX} names {outside[0]!r}; allowed: files beside it")
        elif (folder / WHOLE).is_file():
            names = [WHOLE]
        else:
            pickled = [p.name for p in sorted(folder.iterdir()) if p.suffix in PICKLED]
            why = "no safetensors"
            if pickled:
                why = f"only pickled weights ({pickled[0]}), which may run code when opened"
            raise FileNotFoundError(f"{folder} has {why}; allowed: {WHOLE}, or shards and {INDEX}")
        missing = [n for n in names if not (folder / n).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{folder}: {len(missing)} of {len(names)} shards are missing, such as {missing[0]}"
            )
        return [folder / n for n in names]

    def read(self, name: str) -> np.ndarray:
        """One tensor, as it is stored."""
        safetensors = optional("safetensors", self.name)
        path, stored = self._stored[name]
        with safetensors.safe_open(path, framework="numpy") as file:
            return file.get_tensor(stored)
