"""The tensors of a Hugging Face folder: safetensors, in one file or several with an index."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jaxlm.data.optional import optional
from jaxlm.interop.hub_config import read_json

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
MAX_NAME = 255  # bytes of a file's name, where files are
# Safetensors' names.
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
# A norm's parameters in BERT's first files.
OLD_NAME = re.compile(r"(?<=LayerNorm\.)(gamma|beta)$")
NEW_NAMES = {"gamma": "weight", "beta": "bias"}
# A head's tensors, which stand beside the model's own prefix.
HEAD = re.compile(r"(lm_head|embed_out|cls)\.")
# Formats that run code when they are opened.
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class SafetensorsFolder:
    """Named arrays of all the folder's shards.

    Args:
        folder: with the shards.

    Raises:
        FileNotFoundError: no weights, only pickled ones, or a shard is missing.
        ValueError: a file is damaged, or the index is no such, names a file outside of the folder,
            or a tensor that its shard has not; two hold one that the index does not name.
    """

    def __init__(self, folder: Path):
        self.name = str(folder)
        self._stored: dict[str, tuple[Path, str]] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        dtypes: dict[str, str] = {}
        safetensors = optional("safetensors", self.name)
        index = _index(folder / INDEX) if (folder / INDEX).is_file() else {}
        for path in _shards(folder, index):
            try:
                with safetensors.safe_open(path, framework="numpy") as file:
                    for stored in file.keys():  # noqa: SIM118  no mapping
                        header = file.get_slice(stored)
                        name = OLD_NAME.sub(lambda m: NEW_NAMES[m[0]], stored)
                        if index.get(stored, path.name) != path.name:
                            continue  # the index takes it from another shard
                        if name in shapes:
                            raise ValueError(f"{path} and {self._stored[name][0]} hold {name}")
                        shapes[name] = tuple(header.get_shape())
                        dtypes[name] = DTYPES.get(header.get_dtype(), header.get_dtype())
                        self._stored[name] = path, stored
            except safetensors.SafetensorError as error:
                raise ValueError(f"{path} is no whole safetensors file: {error}") from error
        found = {(stored, path.name) for path, stored in self._stored.values()}
        absent = [(n, f) for n, f in index.items() if (n, f) not in found]
        if absent:
            name, file = absent[0]
            raise ValueError(
                f"{folder / INDEX} names {name!r} in {file}; allowed: tensors that are there "
                f"({len(absent)} are not)"
            )
        self.shapes: Mapping[str, tuple[int, ...]] = shapes
        self.dtypes: Mapping[str, str] = dtypes

    def under(self, prefix: str) -> SafetensorsFolder:
        """All but the head's tensors under names with this prefix: a file of the model without its
        head leaves it out.
        """
        if not any(name.startswith(prefix) for name in self.shapes):
            full = {name: name if HEAD.match(name) else prefix + name for name in self.shapes}
            self.shapes = {full[name]: shape for name, shape in self.shapes.items()}
            self.dtypes = {full[name]: dtype for name, dtype in self.dtypes.items()}
            self._stored = {full[name]: at for name, at in self._stored.items()}
        return self

    def read(self, name: str) -> np.ndarray:
        """One tensor, as it is stored."""
        safetensors = optional("safetensors", self.name)
        path, stored = self._stored[name]
        with safetensors.safe_open(path, framework="numpy") as file:
            return file.get_tensor(stored)


def _index(path: Path) -> dict[str, str]:
    """The shard of each tensor, by the index."""
    found = read_json(path).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(n, str) for n in found.values()):
        raise ValueError(f"{path}: weight_map; allowed: the name of a file for each tensor")
    for name in sorted(set(found.values())):
        fits = Path(name).name == name and len(name.encode(errors="replace")) <= MAX_NAME
        if not fits or not name.endswith(".safetensors"):
            raise ValueError(f"{path} names {name[:100]!r}; allowed: .safetensors files beside it")
    if not found:
        raise ValueError(f"{path}: weight_map names no tensor; allowed: all of the model's")
    return found


def _shards(folder: Path, index: Mapping[str, str]) -> list[Path]:
    names = sorted(set(index.values()))
    if not names and (folder / WHOLE).is_file():
        names = [WHOLE]
    if not names:
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
