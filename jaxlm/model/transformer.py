"""The whole model: a Transformer as one pure function of parameters and tokens.

logits, cache = model.apply({"params": params}, tokens, positions=..., segment_ids=...)
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlm import positions as position_encodings
from jaxlm.attention.layer_view import LayerView
from jaxlm.attention.mask import AttentionMask
from jaxlm.caches.kind import KVCache
from jaxlm.caches.on_mesh import commit
from jaxlm.caches.rows import padding_last
from jaxlm.model.attention import Attention, Probe, Tokens
from jaxlm.model.config import ModelConfig
from jaxlm.model.cross_attention import CrossAttention, Source
from jaxlm.model.feed_forward import FeedForward
from jaxlm.model.head_transform import HeadTransform
from jaxlm.model.layouts import num_scanned
from jaxlm.model.moe import MixtureOfExperts
from jaxlm.model.norms import Norm
from jaxlm.model.quantized import contract_quantized, dequantized, scale_name
from jaxlm.positions import PositionEncoding
from jaxlm.positions.document_lengths import document_lengths
from jaxlm.positions.lm_infinite import LMInfinite

REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Block(nn.Module):
    """One layer: attention and an MLP (or experts), each with its norms and residual.

    A crossed one attends to an encoder's output between the two.
    """

    config: ModelConfig
    kind: str

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        tokens: Tokens,
        cached: LayerView | None,
        source: Source | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple[Array, ...]]:
        """The layer's output and its new keys and values, then those of `source`."""
        c = self.config
        kv: Any = None

        def norm(name: str, y: Array) -> Array:
            return Norm(c.norm, c.param_dtype, name=name)(y)

        def attention(y: Array) -> Array:
            nonlocal kv
            layer = Attention(c, self.kind, name="attention")
            y, kv = layer(y, tokens, cached)
            return y

        def cross_attention(y: Array) -> Array:
            nonlocal kv
            layer = CrossAttention(c, name="cross_attention")
            y, source_kv = layer(y, tokens.segment_ids, source)
            kv = (*kv, *source_kv)
            return y

        def feed_forward(y: Array) -> Array:
            if c.moe is None:
                return FeedForward(c, c.d_ff, name="feed_forward")(y)
            return MixtureOfExperts(c, name="experts")(y, tokens.segment_ids != 0)

        def drop(y: Array) -> Array:
            return nn.Dropout(c.dropout, deterministic=not self.has_rng("dropout"))(y)

        if c.feed_forward.parallel != "none":
            first = norm("attention_norm", x)
            shared = c.feed_forward.parallel == "shared"
            second = first if shared else norm("feed_forward_norm", x)
            y = attention(first) + feed_forward(second)
            y = norm("post_norm", y) if c.norm.placement == "sandwich" else y
            return x + drop(y), kv
        sublayers = [("attention", attention), ("feed_forward", feed_forward)]
        if self.kind == "crossed":
            sublayers.insert(1, ("cross_attention", cross_attention))
        for name, sublayer in sublayers:
            y = norm(f"{name}_norm", x) if c.norm.placement in ("pre", "sandwich") else x
            y = sublayer(y)
            y = norm(f"{name}_post_norm", y) if c.norm.placement in ("post", "sandwich") else y
            x = x + drop(y)
            x = norm(f"{name}_residual_norm", x) if c.norm.placement == "residual" else x
        return x, kv


class Period(nn.Module):
    """One repetition of the layer pattern: what is scanned over.

    Attributes:
        kinds: of the blocks.
        first: which layer of the model the first block is; None: it is the body of a loop, which
            says so at each turn.
    """

    config: ModelConfig
    kinds: tuple[str, ...]
    first: int | None

    @nn.compact
    def __call__(self, x, tokens, cache, source, layers):
        """Runs the blocks in turn; their new keys and values are stacked on axis 0."""
        block = Block
        if self.config.numerics.remat != "none":
            policy = REMAT_POLICIES[self.config.numerics.remat]
            # Outside of a loop the compiler would merge what is recomputed with the original.
            block = nn.remat(Block, policy=policy, prevent_cse=self.first is not None)
        new = []
        for i, kind in enumerate(self.kinds):
            number = layers[i] if self.first is None else self.first + i
            cached = None if cache is None else cache.layer(number)
            layer = block(self.config, kind, name=f"block_{i}")
            at = None if source is None else source.of_layer(number)
            x, kv = layer(x, tokens, cached, at)
            new.append(kv)
        return x, jax.tree.map(lambda *a: jnp.stack(a), *new)


class PositionParameters(nn.Module):
    """The position encoding's learned arrays.

    In a scope of their own, so that their number changes no other parameter's random key.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self) -> dict[str, Array]:
        """By name; empty for most encodings."""
        c = self.config
        return {
            name: self.param(
                name, nn.with_logical_partitioning(p.init, p.axes), p.shape, c.param_dtype
            )
            for name, p in c.encoding.parameters(c.dimensions).items()
        }


class Transformer(nn.Module):
    """The model. Methods are pure functions through `apply`; see `jaxlm.init_params`.

    Attributes:
        config: every choice.
        embedding_of: a model whose embedding is this one's too; None: it has its own.
    """

    config: ModelConfig
    embedding_of: Transformer | None = None

    def setup(self):  # noqa: D102  Linen's own
        c = self.config
        embed = nn.initializers.normal(c.d_model**-0.5)

        def table(name: str, rows: int, axis: str | None) -> Array:
            init = nn.with_logical_partitioning(embed, (axis, "embed"))
            return self.param(name, init, (rows, c.d_model), c.param_dtype)

        if self.embedding_of is None:
            self.embedding = table("embedding", c.vocab_size, "vocab")
            self.embedding_scale = self.get_variable("params", scale_name("embedding"))
        else:
            self.embedding = self.embedding_of.embedding
            self.embedding_scale = self.embedding_of.embedding_scale
        if c.embedding.num_token_types:
            self.token_types = table("token_types", c.embedding.num_token_types, None)
        if c.embedding.norm:
            self.embedding_norm = Norm(c.norm, c.param_dtype)
        self.position = PositionParameters(c)
        self.dropout = nn.Dropout(c.dropout)
        pattern = c.attention.layer_pattern
        scanned = num_scanned(c)
        if scanned:
            self.layers = nn.scan(
                Period,
                variable_axes={"params": 0, "losses": 0, "probes": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(*(nn.broadcast,) * 3, 0),
                length=scanned // len(pattern),
                metadata_params={nn.PARTITION_NAME: "layers"},
                check_constancy_invariants=False,  # there are none, and the body is traced once
            )(c, pattern, None)
        rest = range(scanned, c.num_layers)
        if rest:
            self.last_layers = Period(c, tuple(c.layer_kind(i) for i in rest), rest.start)
        if c.norm.placement != "residual":
            self.final_norm = Norm(c.norm, c.param_dtype)
        if c.embedding.head_transform:
            self.head_transform = HeadTransform(c)
        if not c.embedding.tied:
            self.head = self.param(
                "head",
                nn.with_logical_partitioning(embed, ("embed", "vocab")),
                (c.d_model, c.vocab_size),
                c.param_dtype,
            )
            self.head_scale = self.get_variable("params", scale_name("head"))
        if c.embedding.head_bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("vocab",))
            self.head_bias = self.param("head_bias", zeros, (c.vocab_size,), c.param_dtype)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: KVCache | None = None,
        contiguous: bool = True,
        token_types: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T V"], KVCache | None]:
        """Logits of the next token at every token; of the token itself in a bidirectional model.

        Dropout and block sampling apply if and only if `rngs={"dropout": key}` is given.

        Args:
            tokens: token ids [batch, length].
            positions: of each token in its document; None counts on from the cache, or from 0.
            segment_ids: tokens see only their own segment; 0 is padding. None: all 1.
            cache: earlier tokens' keys and values; the new ones are committed to it.
            contiguous: within a segment positions grow by one a slot, as packing, padding and
                counting give; False for any other order, which attention then cannot exploit.
            token_types: rows of the table of token types, where the config has one. None: all 0.

        Returns:
            float32 logits [batch, length, vocab] and the cache with these tokens (None without).
        """
        if positions is None:
            start = 0 if cache is None else cache.lengths[:, None]
            positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1])[None], tokens.shape)
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        hidden, kv = self.hidden(
            tokens,
            positions,
            segment_ids,
            cache,
            contiguous,
            return_kv=cache is not None,
            token_types=token_types,
        )
        if cache is not None and kv is not None:
            cache = commit(cache, *padding_last(kv, positions, segment_ids))
        return self.logits(hidden), cache

    def extend(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        cache: KVCache,
        tree: Bool[Array, "B T T"] | None = None,
    ) -> tuple[Float[Array, "B T V"], tuple[Array, ...]]:
        """Logits behind each token of a draft, and the keys and values of its tokens, which are not
        committed: which of them are kept depends on the logits.

        Args:
            tokens, positions, segment_ids, cache: as in a call.
            tree: which tokens of the draft each of them sees, itself too; None: those at positions
                up to its own.
        """
        hidden, kv = self.hidden(tokens, positions, segment_ids, cache, return_kv=True, tree=tree)
        assert kv is not None
        return self.logits(hidden), kv

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        cache: KVCache | None = None,
        contiguous: bool = True,
        return_kv: bool = False,
        token_types: Int[Array, "B T"] | None = None,
        source: Source | None = None,
        tree: Bool[Array, "B T T"] | None = None,
        kept: AttentionMask | None = None,
        probe: Probe | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple[Array, ...] | None]:
        """The normalised last hidden states, and with `return_kv` the tokens' keys and values
        [layers, batch, length, kv_heads, head_dim], not yet committed to the cache. Crossed layers
        attend to `source` and add its keys and values. `tree` is as in `extend`; `kept` is what a
        cache that these tokens will go to keeps for each query. With `mutable=["probes"]` what
        `probe` finds in each layer's attention is collected, in the layout of the parameters.
        """
        c, encoding = self.config, self.config.encoding
        self._check_given(token_types, source)
        # Gathered rows are cast, not the table: a bfloat16 copy of the whole table costs more.
        x = self.embedding[tokens]
        if self.embedding_scale is not None:
            scale = self.embedding_scale[tokens]
            x = dequantized(x, scale, scale.dtype)
        x = x.astype(c.dtype)
        if c.embedding.scale is not None:
            x = x * jnp.asarray(c.embedding.scale, c.dtype)
        if c.embedding.num_token_types:
            rows = jnp.zeros_like(tokens) if token_types is None else token_types
            x = x + self.token_types[rows].astype(c.dtype)
        position = self.position()
        x = encoding.embed(position, x, positions)
        x = self.embedding_norm(x) if c.embedding.norm else x
        x = self.dropout(x, deterministic=not self.has_rng("dropout"))
        if cache is None:
            lengths = document_lengths(positions, segment_ids)
        else:  # one document a row: the newest tokens tell how long it is by now
            there = jnp.where(segment_ids != 0, positions, -1)
            lengths = there.max(-1, keepdims=True) + 1
        rotations, heads = {}, {}
        for kind in encoding.kinds:
            own = encoding.of_kind(kind)
            rotations[kind] = own.rotation(positions, lengths, c.head_dim)
            heads[kind] = own.head_parameters(position, c.attention.num_heads)
        now = Tokens(
            positions, segment_ids, lengths, rotations, heads, tree, contiguous, kept, probe
        )
        x, kv = self._run_layers(x, (now, cache, source))
        x = x if c.norm.placement == "residual" else self.final_norm(x)
        return x, kv if return_kv else None

    def _check_given(self, token_types: Array | None, source: Source | None) -> None:
        """Refuses what this model has no use for, and asks for what it needs."""
        if token_types is not None and not self.config.embedding.num_token_types:
            raise ValueError("token_types is given; allowed: None with num_token_types=0")
        crossed = "crossed" in self.config.attention.layer_pattern
        if crossed != (source is not None):
            allowed = "an encoder's output" if crossed else "None without crossed layers"
            raise ValueError(f"source is {'absent' if crossed else 'given'}; allowed: {allowed}")

    def _run_layers(self, x, shared):
        """The scanned repetitions of the layer pattern, then what is left of one."""
        scanned, period = num_scanned(self.config), len(self.config.attention.layer_pattern)
        new = []
        if scanned:
            x, kv = self.layers(x, *shared, jnp.arange(scanned).reshape(-1, period))
            new.append(jax.tree.map(lambda a: a.reshape(scanned, *a.shape[2:]), kv))
        if scanned < self.config.num_layers:
            x, kv = self.last_layers(x, *shared, None)
            new.append(kv)
        return x, jax.tree.map(lambda *a: jnp.concatenate(a) if len(a) > 1 else a[0], *new)

    def head_input(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Hidden states as the head's matrix meets them."""
        c = self.config
        x = self.head_transform(hidden) if c.embedding.head_transform else hidden
        scale = c.embedding.logit_scale
        return x if scale is None else x * jnp.asarray(scale, c.dtype)

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """float32 logits of hidden states."""
        c, hidden = self.config, self.head_input(hidden)
        y = self._head(hidden)
        if c.embedding.head_bias:
            y = y + self.head_bias.astype(jnp.float32)[None, None]
        cap = c.embedding.logit_softcap
        return y if cap is None else cap * jnp.tanh(y / cap)

    def _head(self, hidden):
        if self.config.embedding.tied:
            matrix, scale, inputs = self.embedding, self.embedding_scale, 1
        else:
            matrix, scale, inputs = self.head, self.head_scale, 0
        if scale is not None:
            return contract_quantized(hidden.astype(jnp.float32), matrix, scale, (inputs,))
        return jax.lax.dot_general(
            hidden,
            matrix.astype(hidden.dtype),
            (((2,), (inputs,)), ((), ())),
            preferred_element_type=jnp.float32,
        )

    @nn.nowrap
    def with_position_encoding(
        self, encoding: str | PositionEncoding, **options: Any
    ) -> Transformer:
        """The same model, the same parameters, another position encoding.

        `lm_infinite` wraps the present encoding unless `inner` names another, and takes the place
        of an `lm_infinite` that is already there; of `by_kind` it wraps that of global layers:

            longer = model.with_position_encoding("lm_infinite", window=256, num_sinks=4)

        Args:
            encoding: an encoding, its name, or its text such as "lm_infinite(window=256)".
            options: more of the encoding's fields.

        Raises:
            ValueError: unknown encoding or option, an option given twice, or an encoding with
                learned parameters of its own.
        """
        new = position_encodings.parse(encoding, **options)
        if isinstance(new, LMInfinite) and new.inner is None:
            new = new.around(position_encodings.parse(self.config.position_encoding))
        config = self.config.replace(position_encoding=new)
        own, needed = (c.encoding.parameters(c.dimensions) for c in (self.config, config))
        missing = [n for n, p in needed.items() if n not in own or own[n].shape != p.shape]
        if missing:
            raise ValueError(
                f"position_encoding={new} has learned parameters ({', '.join(missing)}) which a "
                f"model with {self.config.encoding} lacks; allowed: an encoding without, or one "
                "with the same parameters"
            )
        return Transformer(config, parent=None)
