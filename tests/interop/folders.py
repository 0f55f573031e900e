"""Folders as on the hub, of the goldens' models."""

import json
from pathlib import Path

import numpy as np
import tokenizers
from safetensors.numpy import load_file, save_file

from jaxlm.interop.tensors import flatten, places
from jaxlm.model.parameters import abstract_params, model_of
from tests.interop.weights import draw

FOLDER = Path(__file__).parent / "goldens"
GOLDENS = {p.stem: p for p in sorted(FOLDER.glob("*.npz"))}
ENCODERS = {p.stem: p for p in sorted((FOLDER / "encoders").glob("*.npz"))}
ENCODER_DECODERS = {p.stem: p for p in sorted((FOLDER / "encoder_decoders").glob("*.npz"))}
END = 96  # the token that ends a text
ALL = GOLDENS | ENCODERS | ENCODER_DECODERS


def write_folder(folder, config, shapes, parts=1):
    """A folder as on the hub, the tensors in `parts` files."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    vocabulary = {f"t{i}": i for i in range(config["vocab_size"]) if i != END} | {"</s>": END}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="t0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    names, index = sorted(shapes), {}
    for i in range(parts):
        file = "model.safetensors" if parts == 1 else f"model-{i + 1:05}-of-{parts:05}.safetensors"
        mine = {n: draw(n, shapes[n]) for n in names[i::parts]}
        save_file(mine, folder / file)
        index |= dict.fromkeys(mine, file)
    if parts > 1:
        text = json.dumps({"metadata": {}, "weight_map": index})
        (folder / "model.safetensors.index.json").write_text(text)
    return folder


def read_golden(case):
    with np.load(ALL[case]) as arrays:
        file = dict(arrays)
    return file, json.loads(str(file["config"])), json.loads(str(file["shapes"]))


def stored(folder):
    """All tensors of a folder, as bytes, by name."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= {n: (x.dtype, x.shape, x.tobytes()) for n, x in load_file(path).items()}
    return found


def parameters(checkpoint):
    """All parameters in full, as NumPy's, without compiling anything."""
    like = flatten(abstract_params(model_of(checkpoint.config)))
    found = {path: np.full(x.shape, np.nan, x.dtype) for path, x in like.items()}
    for row, name, paths, at in places(checkpoint.config, checkpoint.rows):
        shapes = [found[path][at].shape for path in paths]
        tensor = checkpoint.tensors.read(name)
        assert tensor.shape == checkpoint.tensors.shapes[name] == row.their_shape(shapes)
        for path, part in zip(paths, row.to_ours(tensor, shapes), strict=True):
            found[path][at] = part
    return found
