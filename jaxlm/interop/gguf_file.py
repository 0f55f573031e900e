"""A GGUF file: config, tensors and tokenizer in one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.data.optional import optional
from jaxlm.interop.rows import Row

# GGUF's name of an architecture → the hub's.
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# Whose queries and keys llama.cpp stores for a rotation of neighbouring dims (2i, 2i + 1).
PERMUTED = {"llama"}
# GGUF's names of what is no quantization.
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
# What the gguf package raises of headers that lie.
DAMAGED = (ValueError, KeyError, IndexError, TypeError, OverflowError)
# Metadata, after "{architecture}." → config.json.
KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}


class GGUFFile:
    """A GGUF file under the hub's names.

    Attributes:
        config: what config.json would say.
        metadata: all of the file's, by its names.

    Raises:
        ValueError: damaged; an architecture or a quantization that is not known.
    """

    def __init__(self, path: Path):
        self._gguf = optional("gguf", str(path))
        self.name = str(path)
        try:
            # Its fields hold an array for every token of the vocabulary: they go when it does.
            reader = self._gguf.GGUFReader(path)
            self.metadata: dict[str, Any] = {
                key: field.contents() for key, field in reader.fields.items()
            }
        except DAMAGED as error:
            raise ValueError(f"{path} is no whole GGUF file: {error}") from error
        self.architecture = self._require("general.architecture")
        if self.architecture not in ARCHITECTURES:
            raise ValueError(
                f"{path}: architecture={self.architecture!r}; allowed: {', '.join(ARCHITECTURES)}"
            )
        self._tensors = {t.name: t for t in reader.tensors}
        self._check_places()
        self._check_quantizations()
        self.config = self._config()

    def _require(self, key: str) -> Any:
        if key not in self.metadata:
            raise ValueError(f"{self.name}: {key} is absent; allowed: a GGUF file that has it")
        return self.metadata[key]

    def _check_places(self) -> None:
        end, last = 0, "the header"
        for tensor in sorted(self._tensors.values(), key=lambda t: int(t.data_offset)):
            if int(tensor.data_offset) < end:
                raise ValueError(f"{self.name}: {tensor.name} overlaps {last}")
            end, last = int(tensor.data_offset) + int(tensor.n_bytes), tensor.name

    def _check_quantizations(self) -> None:
        """One block of each kind is unpacked, before anything large is."""
        for kind in {t.tensor_type for t in self._tensors.values()}:
            _, size = self._gguf.GGML_QUANT_SIZES[kind]
            try:
                self._gguf.dequantize(np.zeros(size, np.uint8), kind)
            except (NotImplementedError, KeyError) as error:
                raise ValueError(
                    f"{self.name}: quantization {kind.name}; allowed: F32, F16, BF16 and what the "
                    "gguf package unpacks (Q4_0 to Q8_0, K-quants, …)"
                ) from error

    def _config(self) -> dict[str, Any]:
        found = {
            theirs: self.metadata[f"{self.architecture}.{ours}"]
            for ours, theirs in KEYS.items()
            if f"{self.architecture}.{ours}" in self.metadata
        }
        return found | {
            "architectures": [ARCHITECTURES[self.architecture]],
            "hidden_act": "silu",
            "vocab_size": len(self._require("tokenizer.ggml.tokens")),
            "tie_word_embeddings": "output.weight" not in self._tensors,
        }

    def tensors(self, rows: list[Row]) -> GGUFTensors:
        """Its tensors under the names that the rows give."""
        arch = next(a for a, n in self._gguf.MODEL_ARCH_NAMES.items() if n == self.architecture)
        layers = self._require(f"{self.architecture}.block_count")
        names = self._gguf.get_tensor_name_map(arch, layers)
        here = {}
        for row in rows:
            for layer in range(layers if "{layer}" in row.theirs else 1):
                name = row.theirs.format(layer=layer)
                short = names.get_name(name, try_suffixes=(".weight", ".bias"))
                if short in self._tensors:
                    here[name] = self._tensors[short]
        known = {t.name for t in here.values()}
        # llama.cpp's own table of angles, which follows from the config.
        here |= {n: t for n, t in self._tensors.items() if n not in known | {"rope_freqs.weight"}}
        heads = self.config["num_attention_heads"]
        heads = (heads, self.config.get("num_key_value_heads", heads))
        return GGUFTensors(self.name, self._gguf, here, heads, self.architecture in PERMUTED)


class GGUFTensors:
    """Named arrays, dequantized as they are read."""

    def __init__(
        self, name: str, gguf: Any, tensors: dict[str, Any], heads: tuple[int, int], permuted: bool
    ):
        self.name, self._gguf, self._tensors = name, gguf, tensors
        self._heads, self._permuted = heads, permuted
        self.shapes: Mapping[str, tuple[int, ...]] = {
            n: tuple(int(s) for s in reversed(t.shape)) for n, t in tensors.items()
        }
        # Quantized ones are read as float32.
        self.dtypes: Mapping[str, str] = {
            n: DTYPES.get(t.tensor_type.name, "float32") for n, t in tensors.items()
        }

    def read(self, name: str) -> np.ndarray:
        """One tensor, float32 unless it is stored in 16 bits; queries and keys as the hub's."""
        tensor = self._tensors[name]
        x = self._gguf.dequantize(tensor.data, tensor.tensor_type)
        for part, heads in zip((".q_proj.", ".k_proj."), self._heads, strict=True):
            if self._permuted and part in name:
                pairs = x.reshape(heads, -1, 2, *x.shape[1:])
                x = pairs.swapaxes(1, 2).reshape(x.shape)
        return x
