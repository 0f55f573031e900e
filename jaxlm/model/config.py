"""Every choice a model is made of: frozen, validated once, hashable.

`ModelConfig.from_dict` is the only place where a dictionary (a ConfigDict, a checkpoint's JSON)
becomes a config; no other code reads the dictionary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxlm import positions
from jaxlm.attention.context import FORMS
from jaxlm.attention.mask import causal
from jaxlm.attention.sampled import SAMPLINGS, BlockSampling
from jaxlm.config import at_least, build, check, check_types, one_of
from jaxlm.positions import PositionEncoding

KINDS = {"global", "sliding", "bidirectional", "crossed"}  # of layers


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Self-attention.

    Attributes:
        num_heads: query heads.
        num_kv_heads: key/value heads; None is num_heads (MHA), 1 is MQA, between is GQA.
        head_dim: None is d_model / num_heads.
        qkv_bias, out_bias: biases of the projections.
        qk_norm: "none"; "head": queries and keys normalised over head_dim before the position
            encoding (Qwen 3, Gemma 3); "full": over all heads at once (OLMo 2).
        softcap: scores become softcap·tanh(scores/softcap) (Gemma 2); None: off.
        scale: of q·k; None is head_dim**-0.5.
        sink_logits: a learned logit per head in the softmax that carries no value (gpt-oss).
        layer_pattern: kinds of attention, repeated over the layers: "global" sees all earlier
            tokens (that the position encoding shows), "sliding" the last `sliding_window`,
            "bidirectional" later ones too (BERT); "crossed" is global and then attends to an
            encoder's output (`jaxlm.model.encoder_decoder`).
        sliding_window: tokens that a "sliding" layer sees, the query's own included.
        implementation: of self-attention: "auto", "flash" (TPU), "blockwise", "reference"; decoding
            with a cache has its own. "ring", "all_to_all": "auto", but devices that share a row
            (mesh.context) exchange keys in another way; see `jaxlm.attention.context`.
            "block_sampled(block=512)": "auto", but in training far blocks of tokens take part only
            now and then; see `jaxlm.attention.sampled`.
    """

    num_heads: int = 8
    num_kv_heads: int | None = None
    head_dim: int | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: str = "none"
    softcap: float | None = None
    scale: float | None = None
    sink_logits: bool = False
    layer_pattern: tuple[str, ...] = ("global",)
    sliding_window: int | None = None
    implementation: str = "auto"

    IMPLEMENTATIONS = ("auto", "flash", "blockwise", "reference", *FORMS)

    def __post_init__(self):
        check_types(type(self), vars(self), "attention")
        kv, window, kinds = self.num_kv_heads, self.sliding_window, set(self.layer_pattern)
        check(
            "attention",
            num_heads=at_least(self.num_heads, 1),
            num_kv_heads=(
                kv,
                kv is None or (kv >= 1 and self.num_heads % kv == 0),
                f"None or a divisor of num_heads={self.num_heads}",
            ),
            head_dim=(
                self.head_dim,
                self.head_dim is None or self.head_dim >= 1,
                "None or an integer >= 1",
            ),
            qk_norm=one_of(self.qk_norm, "none", "head", "full"),
            softcap=(self.softcap, self.softcap is None or self.softcap > 0, "None or > 0"),
            scale=(self.scale, self.scale is None or self.scale > 0, "None or > 0"),
            layer_pattern=(
                self.layer_pattern,
                bool(kinds) and kinds <= KINDS and (kinds == {"crossed"} or "crossed" not in kinds),
                "a sequence of global, sliding, bidirectional; or of crossed alone",
            ),
            sliding_window=(
                window,
                window is None if "sliding" not in kinds else window is not None and window >= 1,
                "an integer >= 1 if layer_pattern has a sliding layer, else None",
            ),
            implementation=(
                self.implementation,
                self.implementation in self.IMPLEMENTATIONS
                or self.implementation.startswith(BlockSampling.name),
                ", ".join((*self.IMPLEMENTATIONS, BlockSampling.name)),
            ),
        )
        plain = kinds == {"global"} and self.softcap is None and not self.sink_logits
        allowed = "with block_sampled global layers, no softcap and no sink_logits"
        fits = self.sampling is None or plain
        check("attention", implementation=(self.implementation, fits, allowed))

    @property
    def sampling(self) -> BlockSampling | None:
        """Of blocks of tokens, in training; None: all take part."""
        if self.implementation in self.IMPLEMENTATIONS:
            return None
        return SAMPLINGS.parse(self.implementation)


@dataclasses.dataclass(frozen=True)
class FeedForwardConfig:
    """The MLP of a block.

    Attributes:
        d_ff: hidden width; None is 4·d_model for a plain MLP, and for a gated one 8/3·d_model
            rounded up to a multiple of 128, which costs about the same.
        kind: gated: "swiglu", "geglu", "geglu_tanh", "clamped_swiglu" (gpt-oss); plain: "gelu",
            "gelu_tanh", "relu", "relu2".
        bias: biases of all its projections.
        parallel: "none": it follows the attention; "shared": it stands beside it, both read one
            norm of the block's input and are added together (GPT-J, Falcon); "separate": the same
            with a norm each (GPT-NeoX).
    """

    d_ff: int | None = None
    kind: str = "swiglu"
    bias: bool = False
    parallel: str = "none"

    GATED = ("swiglu", "geglu", "geglu_tanh", "clamped_swiglu")
    PLAIN = ("gelu", "gelu_tanh", "relu", "relu2")

    def __post_init__(self):
        check_types(type(self), vars(self), "feed_forward")
        check(
            "feed_forward",
            d_ff=(self.d_ff, self.d_ff is None or self.d_ff >= 1, "None or an integer >= 1"),
            kind=one_of(self.kind, *self.GATED, *self.PLAIN),
            parallel=one_of(self.parallel, "none", "shared", "separate"),
        )

    @property
    def gated(self) -> bool:
        """Whether a second projection gates the first."""
        return self.kind in self.GATED


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """A mixture of experts in place of the MLP: every token goes to its `top_k` experts, none is
    dropped (`jax.lax.ragged_dot` over tokens sorted by expert).

    Attributes:
        num_experts: routed experts; each is an MLP of `feed_forward`'s kind and width `d_ff`.
        top_k: experts a token uses.
        d_ff: width of an expert; None is the feed-forward width.
        num_shared_experts: experts that every token uses beside the routed ones.
        shared_d_ff: width of all shared experts together; None is num_shared_experts·d_ff.
        shared_gate: each token weighs the shared experts by the sigmoid of a learned product
            (Qwen2-MoE).
        router_bias: a bias on the router's logits (gpt-oss).
        normalize: the chosen experts' probabilities are rescaled to sum 1.
        load_balance_weight: of the Switch balance loss E·Σ_e f_e·p_e (Fedus et al. 2021).
        router_z_weight: of mean logsumexp(router logits)² (ST-MoE, Zoph et al. 2022).
    """

    num_experts: int
    top_k: int = 2
    d_ff: int | None = None
    num_shared_experts: int = 0
    shared_d_ff: int | None = None
    shared_gate: bool = False
    router_bias: bool = False
    normalize: bool = True
    load_balance_weight: float = 0.01
    router_z_weight: float = 0.001

    def __post_init__(self):
        check_types(type(self), vars(self), "moe")
        shared, width, gate = self.num_shared_experts >= 1, self.shared_d_ff, self.shared_gate
        check(
            "moe",
            num_experts=at_least(self.num_experts, 1),
            top_k=(
                self.top_k,
                1 <= self.top_k <= self.num_experts,
                f"1 to num_experts={self.num_experts}",
            ),
            d_ff=(self.d_ff, self.d_ff is None or self.d_ff >= 1, "None or an integer >= 1"),
            num_shared_experts=at_least(self.num_shared_experts, 0),
            shared_d_ff=(
                width,
                width is None or (width >= 1 and shared),
                "None or, with num_shared_experts >= 1, an integer >= 1",
            ),
            shared_gate=(gate, not gate or shared, "False without num_shared_experts"),
            load_balance_weight=at_least(self.load_balance_weight, 0),
            router_z_weight=at_least(self.router_z_weight, 0),
        )


@dataclasses.dataclass(frozen=True)
class NormConfig:
    """Normalisation.

    Attributes:
        kind: "rmsnorm" or "layernorm".
        placement: "pre" (before each sublayer), "post" (after each sublayer, before the residual
            is added; OLMo 2), "sandwich" (both; Gemma 2) or "residual" (of each sum with the
            residual, so that no norm follows the last layer; BERT).
        epsilon: added to the mean square or variance.
        scale: a learned scale; False: none (OLMo 1).
        scale_plus_one: the learned scale is stored minus one (Gemma).
        bias: a learned bias (LayerNorm only).
        clip_qkv: queries, keys and values are cut to ±this, before any norm of theirs (OLMo 1,
            MPT); None: off.
    """

    kind: str = "rmsnorm"
    placement: str = "pre"
    epsilon: float = 1e-5
    scale: bool = True
    scale_plus_one: bool = False
    bias: bool = False
    clip_qkv: float | None = None

    def __post_init__(self):
        check_types(type(self), vars(self), "norm")
        plus, clip = self.scale_plus_one, self.clip_qkv
        check(
            "norm",
            kind=one_of(self.kind, "rmsnorm", "layernorm"),
            placement=one_of(self.placement, "pre", "post", "sandwich", "residual"),
            epsilon=(self.epsilon, self.epsilon > 0, "a number > 0"),
            scale_plus_one=(plus, not plus or self.scale, "False without scale"),
            bias=(self.bias, not self.bias or self.kind == "layernorm", "False with rmsnorm"),
            clip_qkv=(clip, clip is None or clip > 0, "None or a number > 0"),
        )


@dataclasses.dataclass(frozen=True)
class EmbeddingConfig:
    """The two ends of the model.

    Attributes:
        tied: the output head is the embedding's transpose.
        scale: multiplies the embeddings (Gemma: √d_model); None: 1.
        num_token_types: rows of a table of which one is added to each embedding (BERT); 0: none.
        norm: the embeddings are normalised, positions included (BERT, BLOOM).
        head_transform: before the head, hidden states pass a dense layer, the MLP's activation and
            a norm (BERT).
        logit_scale: multiplies the hidden states before the head (T5: d_model**-0.5); None: 1.
        head_bias: a bias on the output logits.
        logit_softcap: logits become cap·tanh(logits/cap) (Gemma 2); None: off.
    """

    tied: bool = False
    scale: float | None = None
    num_token_types: int = 0
    norm: bool = False
    head_transform: bool = False
    logit_scale: float | None = None
    head_bias: bool = False
    logit_softcap: float | None = None

    def __post_init__(self):
        check_types(type(self), vars(self), "embedding")
        scale, last, cap = self.scale, self.logit_scale, self.logit_softcap
        check(
            "embedding",
            scale=(scale, scale is None or scale > 0, "None or a number > 0"),
            num_token_types=at_least(self.num_token_types, 0),
            logit_scale=(last, last is None or last > 0, "None or a number > 0"),
            logit_softcap=(cap, cap is None or cap > 0, "None or a number > 0"),
        )


@dataclasses.dataclass(frozen=True)
class NumericsConfig:
    """How the model is computed, none of which changes what it computes.

    Attributes:
        dtype: of activations and matmuls; norms, softmax and loss are float32 in any case.
        param_dtype: of the parameters.
        remat: what the backward pass recomputes: "none"; "dots": all but matmul results; "full":
            each layer from its input.
        scan_layers: one compiled layer looped over; False unrolls, for capture and debugging.
    """

    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"
    scan_layers: bool = True

    def __post_init__(self):
        check_types(type(self), vars(self), "numerics")
        kinds = ("float32", "bfloat16", "float16")
        check(
            "numerics",
            dtype=one_of(self.dtype, *kinds),
            param_dtype=one_of(self.param_dtype, *kinds),
            remat=one_of(self.remat, "none", "dots", "full"),
        )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A Transformer: a decoder, an encoder, or one half of an encoder–decoder.

    A field that is None stays None, and the property of its name (`head_dim`, `num_kv_heads`,
    `d_ff`) tells the width meant; so does `encoding` for the position encoding. A copy made by
    `replace` then derives them anew.

    Attributes:
        vocab_size: rows of the embedding; at least the tokenizer's.
        num_layers, d_model: depth and width.
        context_length: tokens the model is trained on at a time.
        position_encoding: an encoding or its text, e.g. "rope(base=500000)", "alibi", "nope".
        attention, feed_forward, norm, embedding, numerics: see there.
        moe: a mixture of experts instead of the MLP; None: dense.
        dropout: of embeddings and of each sublayer's output, in training.
    """

    vocab_size: int
    num_layers: int = 4
    d_model: int = 256
    context_length: int = 512
    position_encoding: PositionEncoding | str = "rope"
    attention: AttentionConfig = AttentionConfig()
    feed_forward: FeedForwardConfig = FeedForwardConfig()
    moe: MoEConfig | None = None
    norm: NormConfig = NormConfig()
    embedding: EmbeddingConfig = EmbeddingConfig()
    numerics: NumericsConfig = NumericsConfig()
    dropout: float = 0.0

    PARTS = {
        "attention": AttentionConfig,
        "feed_forward": FeedForwardConfig,
        "moe": MoEConfig,
        "norm": NormConfig,
        "embedding": EmbeddingConfig,
        "numerics": NumericsConfig,
    }

    def __post_init__(self):
        check_types(type(self), vars(self), "model")
        heads, parallel = self.attention.num_heads, self.feed_forward.parallel
        check(
            "model",
            vocab_size=at_least(self.vocab_size, 1),
            num_layers=at_least(self.num_layers, 1),
            d_model=at_least(self.d_model, 1),
            context_length=at_least(self.context_length, 1),
            dropout=(self.dropout, 0 <= self.dropout < 1, "a number in [0, 1)"),
        )
        divides = self.attention.head_dim is not None or self.d_model % heads == 0
        placement, kinds = self.norm.placement, set(self.attention.layer_pattern)
        fits = placement not in ("post", "residual") and kinds != {"crossed"}
        check(
            "model",
            d_model=(
                self.d_model,
                divides,
                f"a multiple of attention.num_heads={heads}, or set attention.head_dim",
            ),
        )
        allowed = "none with norm.placement='post' or 'residual', or with crossed layers"
        check("model.feed_forward", parallel=(parallel, parallel == "none" or fits, allowed))
        object.__setattr__(self, "position_encoding", positions.parse(self.position_encoding))
        known = self.encoding.two_sided or not self.sees_ahead  # binding it checks it
        allowed = "with bidirectional layers one that tells later tokens too, as learned or rope"
        check("model", position_encoding=(str(self.position_encoding), known, allowed))
        known = self.attention.sampling is None or self._sees_all_before_it()
        allowed = "with block_sampled attention one that changes no scores and hides nothing"
        check("model", position_encoding=(str(self.position_encoding), known, allowed))

    @functools.cached_property
    def encoding(self) -> PositionEncoding:
        """The position encoding, bound to this model's dimensions."""
        return positions.parse(self.position_encoding).bind(self.dimensions)

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        width = self.attention.head_dim
        return self.d_model // self.attention.num_heads if width is None else width

    @property
    def num_kv_heads(self) -> int:
        """Key/value heads."""
        heads = self.attention.num_kv_heads
        return self.attention.num_heads if heads is None else heads

    @property
    def d_ff(self) -> int:
        """Width of the MLP, or of one expert."""
        if self.moe is not None and self.moe.d_ff is not None:
            return self.moe.d_ff
        if self.feed_forward.d_ff is not None:
            return self.feed_forward.d_ff
        if self.feed_forward.gated:
            return -(-8 * self.d_model // (3 * 128)) * 128
        return 4 * self.d_model

    @property
    def shared_d_ff(self) -> int:
        """Width of the shared experts together; 0: there are none."""
        if self.moe is None:
            return 0
        width = self.moe.shared_d_ff
        return self.d_ff * self.moe.num_shared_experts if width is None else width

    @property
    def dimensions(self) -> positions.Dimensions:
        """What a position encoding may depend on."""
        return positions.Dimensions(
            self.attention.num_heads, self.head_dim, self.d_model, self.context_length
        )

    @property
    def dtype(self) -> jnp.dtype:
        """Of activations."""
        return jnp.dtype(self.numerics.dtype)

    @property
    def param_dtype(self) -> jnp.dtype:
        """Of parameters."""
        return jnp.dtype(self.numerics.param_dtype)

    def _sees_all_before_it(self) -> bool:
        """Whether the position encoding leaves scores and a causal mask as they are."""
        return not self.encoding.changes_scores and self.encoding.restrict(causal()) == causal()

    @property
    def sees_ahead(self) -> bool:
        """Whether tokens see later ones: then none can be predicted from those before it."""
        return "bidirectional" in self.attention.layer_pattern

    def layer_kind(self, layer: int) -> str:
        """One of `attention.layer_pattern`."""
        pattern = self.attention.layer_pattern
        return pattern[layer % len(pattern)]

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with other fields, validated anew."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """From a nested mapping such as `config.model` or a checkpoint's JSON.

        Raises:
            ValueError: an unknown field (the nearest name is told) or a value that is not allowed.
        """
        return build(cls, values, "model")

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able mapping that `from_dict` turns back into an equal config."""

        def plain(value: Any) -> Any:
            if isinstance(value, PositionEncoding):
                return str(value)
            if dataclasses.is_dataclass(value):
                return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
            return list(value) if isinstance(value, tuple) else value

        return plain(self)
