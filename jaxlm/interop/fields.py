"""A table of config.json's keys, and what they say of a model, that is read in both directions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from jaxlm import positions
from jaxlm.interop.hub_config import HubConfig
from jaxlm.model.config import ModelConfig
from jaxlm.model.encoder_decoder import EncoderDecoderConfig
from jaxlm.positions.by_kind import ByKind


@runtime_checkable
class Field(Protocol):
    """Some keys of config.json and the fields of ModelConfig, by dotted path, that they fill."""

    def read(self, config: HubConfig) -> dict[str, Any]:
        """The fields' values.

        Raises:
            ValueError: a key is absent, or has a value that is not known.
        """
        ...

    def write(self, config: Any) -> dict[str, Any]:
        """The keys' values.

        Args:
            config: a ModelConfig or an EncoderDecoderConfig, with its widths and its number of
                key/value heads filled in.

        Raises:
            ValueError: the keys cannot say it.
        """
        ...


_REQUIRED = object()


@dataclasses.dataclass(frozen=True)
class Key:
    """A key whose value is taken as it is.

    Attributes:
        theirs: the key; other names it goes by after it, with spaces between.
        ours: the field or, with spaces between, the fields.
        default: what its absence means; without one it must be there.
    """

    theirs: str
    ours: str
    default: Any = _REQUIRED

    def read(self, config: HubConfig) -> dict[str, Any]:
        """The value, in every field."""
        first, *others = self.theirs.split()
        default = None if self.default is _REQUIRED else self.default
        for name in reversed(others):
            default = config.get(name, default)
        value = config.get(first, default)
        if value is None and self.default is _REQUIRED:
            value = config.require(first)
        return dict.fromkeys(self.ours.split(), value)

    def write(self, config: ModelConfig | EncoderDecoderConfig) -> dict[str, Any]:
        """The first field's value."""
        return {self.theirs.split()[0]: value_of(config, self.ours.split()[0])}


@dataclasses.dataclass(frozen=True)
class Fixed:
    """What every model of the family has, so that no key says it."""

    ours: str
    value: Any

    def read(self, config: HubConfig) -> dict[str, Any]:
        """The value."""
        return {self.ours: self.value}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Nothing."""
        return {}


class Only:
    """A choice of which the models here have one.

    Args:
        theirs: the key.
        allowed: its values; the first is what absence means, and what is written.
    """

    def __init__(self, theirs: str, *allowed: Any):
        self.theirs, self.allowed = theirs, allowed

    def read(self, config: HubConfig) -> dict[str, Any]:
        """Nothing, once it is checked."""
        value = config.get(self.theirs, self.allowed[0])
        if value not in self.allowed:
            shown = ", ".join(str(a) for a in self.allowed)
            raise ValueError(f"{config.name}: {self.theirs}={value!r}; allowed: {shown}")
        return {}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The value."""
        return {self.theirs: self.allowed[0]}


@dataclasses.dataclass(frozen=True)
class Ignored:
    """Keys that transformers' class of the family keeps and never uses, with spaces between."""

    theirs: str

    def read(self, config: HubConfig) -> dict[str, Any]:
        """Nothing, whatever they say."""
        for key in self.theirs.split():
            config.get(key)
        return {}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Nothing."""
        return {}


@dataclasses.dataclass(frozen=True)
class Derived:
    """What takes a line of arithmetic; `write` is left out where other keys say it already."""

    read: Callable[[HubConfig], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]] = lambda config: {}


@dataclasses.dataclass(frozen=True)
class Within:
    """A field of one half of an encoder–decoder, "encoder" or "decoder"."""

    half: str
    field: Field

    def read(self, config: HubConfig) -> dict[str, Any]:
        """The field's values, one level down."""
        return {f"{self.half}.{path}": value for path, value in self.field.read(config).items()}

    def write(self, config: EncoderDecoderConfig) -> dict[str, Any]:
        """The keys' values, by that half."""
        return self.field.write(getattr(config, self.half))


# Names of activations: of the MLPs that they gate, of plain ones. The first of a kind is written.
GATED = {
    "silu": "swiglu",
    "gelu": "geglu",
    "gelu_pytorch_tanh": "geglu_tanh",
    "gelu_new": "geglu_tanh",
}
PLAIN = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}


@dataclasses.dataclass(frozen=True)
class Activation:
    """The MLP's kind.

    Attributes:
        names: theirs and ours.
        theirs: the key.
        default: what its absence means; None: it must be there.
    """

    names: Mapping[str, str]
    theirs: str = "hidden_act"
    default: str | None = None

    def read(self, config: HubConfig) -> dict[str, Any]:
        """FeedForwardConfig's kind."""
        name = config.get(self.theirs, self.default, str) or config.require(self.theirs, str)
        if name not in self.names:
            known = ", ".join(self.names)
            raise ValueError(f"{config.name}: {self.theirs}={name!r}; allowed: {known}")
        return {"feed_forward.kind": self.names[name]}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The first name of that kind."""
        kind = config.feed_forward.kind
        for name, known in self.names.items():
            if known == kind:
                return {self.theirs: name}
        raise ValueError(f"feed_forward.kind={kind!r}; allowed: {', '.join(self.names.values())}")


KINDS = {"full_attention": "global", "sliding_attention": "sliding"}


@dataclasses.dataclass(frozen=True)
class Layers:
    """Which layers slide, and how far they see.

    Attributes:
        pattern: the layers' kinds, repeated, in a config without layer_types.
        listed: whether the family knows layer_types, one for each layer.
    """

    pattern: tuple[str, ...]
    listed: bool

    def read(self, config: HubConfig) -> dict[str, Any]:
        """AttentionConfig's layer_pattern and sliding_window."""
        window = config.get("sliding_window", None, int)
        layers = config.require("num_hidden_layers", int)
        kinds = [self.pattern[i % len(self.pattern)] for i in range(layers)]
        if self.listed and (types := config.get("layer_types", None, list)) is not None:
            if not all(isinstance(t, str) and t in KINDS for t in types) or len(types) != layers:
                known = f"{layers} of {', '.join(KINDS)}"
                raise ValueError(f"{config.name}: layer_types={types!r}; allowed: {known}")
            kinds = [KINDS[t] for t in types]
        return layer_fields(kinds, window)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """sliding_window and, where they are known, layer_types."""
        keys = {"sliding_window": config.attention.sliding_window}
        return keys | ({"layer_types": layer_types(config)} if self.listed else {})


def layer_fields(kinds: Sequence[str], window: int | None) -> dict[str, Any]:
    """AttentionConfig's fields for layers of these kinds; without a window none slides."""
    if window is None:
        kinds = ["global" if kind == "sliding" else kind for kind in kinds]
    period = next(n for n in range(1, len(kinds) + 1) if _repeats(kinds, n))
    return {
        "attention.layer_pattern": tuple(kinds[:period]),
        "attention.sliding_window": window if "sliding" in kinds else None,
    }


def layer_types(config: ModelConfig) -> list[str]:
    """Every layer's kind, in the hub's words.

    Raises:
        ValueError: a kind that has no such word.
    """
    names = {ours: theirs for theirs, ours in KINDS.items()}
    kinds = [config.layer_kind(i) for i in range(config.num_layers)]
    if set(kinds) - names.keys():
        raise ValueError(f"layer_pattern={tuple(kinds)}; allowed: {', '.join(names)}")
    return [names[kind] for kind in kinds]


def _repeats(kinds: Sequence[str], period: int) -> bool:
    return all(kind == kinds[i % period] for i, kind in enumerate(kinds))


def value_of(config: ModelConfig | EncoderDecoderConfig, path: str) -> Any:
    """The value at a dotted path; None within a part that is None."""
    value: Any = config
    for name in path.split("."):
        value = None if value is None else getattr(value, name)
    return value


def read_fields(
    fields: Sequence[Field],
    config: HubConfig,
    kind: type[ModelConfig] | type[EncoderDecoderConfig] = ModelConfig,
) -> Any:
    """The model's config, of class `kind`, that a config.json describes.

    Raises:
        ValueError: a key is absent, or has a value that is not known.
    """
    nested: dict[str, Any] = {}
    for field in fields:
        for path, value in field.read(config).items():
            *parts, last = path.split(".")
            here = nested
            for part in parts:
                here = here.setdefault(part, {})
            here[last] = value
    return kind.from_dict(nested)


def write_fields(
    fields: Sequence[Field],
    config: ModelConfig | EncoderDecoderConfig,
    absent: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The config.json that describes a model.

    What the keys do not say (numerics, dropout, weights of the router's losses) is left out.

    Args:
        fields: of its family.
        config: of the model.
        absent: what the absence of keys means, see `Family`.

    Raises:
        ValueError: the keys say something else than the model's config; the field is named.
    """
    config = _canonical(config)
    keys: dict[str, Any] = {}
    for field in fields:
        written = field.write(config).items()
        keys |= {k: v for k, v in written if v is not None or k in (absent or {})}
    said = HubConfig(keys, "config.json", absent=absent)
    again = _canonical(read_fields(fields, said, type(config)))
    mine, theirs = (_flat(c.to_dict()) for c in (config, again))
    for path in sorted(mine.keys() | theirs.keys()):
        if not _same(path, mine.get(path), theirs.get(path)):
            raise ValueError(f"{path}={mine.get(path)!r}; allowed: {theirs.get(path)!r}")
    return keys


def _canonical(config: Any) -> Any:
    """The same function of the same parameters, every choice spelled out."""
    if isinstance(config, EncoderDecoderConfig):
        halves = {n: _canonical(getattr(config, n)) for n in ("encoder", "decoder")}
        return config.replace(**halves)
    a, f, moe = config.attention, config.feed_forward, config.moe
    kinds = [config.layer_kind(i) for i in range(config.num_layers)]
    pattern = layer_fields(kinds, a.sliding_window)
    encoding = positions.parse(config.position_encoding)
    if isinstance(encoding, ByKind):
        alike = "sliding" not in kinds or encoding.full == encoding.sliding
        encoding = encoding.full if alike else encoding
    return ModelConfig(
        vocab_size=config.vocab_size,
        num_layers=config.num_layers,
        d_model=config.d_model,
        context_length=config.context_length,
        position_encoding=encoding,
        attention=dataclasses.replace(
            a,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            layer_pattern=pattern["attention.layer_pattern"],
            sliding_window=pattern["attention.sliding_window"],
            scale=config.head_dim**-0.5 if a.scale is None else a.scale,
            implementation="auto",
        ),
        feed_forward=dataclasses.replace(f, d_ff=config.d_ff),
        moe=None
        if moe is None
        else dataclasses.replace(
            moe,
            d_ff=config.d_ff,
            num_shared_experts=min(moe.num_shared_experts, 1),
            shared_d_ff=config.shared_d_ff or None,
            load_balance_weight=0.0,
            router_z_weight=0.0,
        ),
        norm=config.norm,
        embedding=config.embedding,
    )


def _same(path: str, a: Any, b: Any) -> bool:
    """Equal; floats may have gone through a formula and back, and encodings' options be whole."""
    if path.endswith("position_encoding"):
        return positions.parse(a) == positions.parse(b)
    both = isinstance(a, float) and isinstance(b, float)
    return math.isclose(a, b, rel_tol=1e-12) if both else a == b


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
