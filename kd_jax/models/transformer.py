"""The decoder-only transformer of all families. `ModelConfig` decides the norms, positions and biases."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from kd_jax.models import lora
from kd_jax.models.config import ModelConfig

_ACTIVATIONS = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


class Cache(NamedTuple):
    """Keys and values of the tokens that the model has read, one array per layer.

    `index` of the S slots are filled, padding included. Each array has the layout of the matrix product that reads the
    array, so that no decoding step transposes earlier entries.
    """

    keys: tuple[Float[Array, "B K H S"], ...]
    values: tuple[Float[Array, "B K S H"], ...]
    mask: Bool[Array, "B S"]
    index: Int[Array, ""]


class Attention(nnx.Module):
    """Causal attention with grouped queries."""

    def __init__(self, config: ModelConfig, linear: "_Linear", norm: "_Norm", implementation: str):
        self.implementation = implementation
        width, queries = config.hidden_size, config.num_heads * config.head_dim
        shared = config.num_kv_heads * config.head_dim
        self.head_dim = config.head_dim
        self.query = linear(width, queries, use_bias=config.attention_bias)
        self.key = linear(width, shared, use_bias=config.attention_bias)
        self.value = linear(width, shared, use_bias=config.attention_bias)
        self.output = linear(queries, width, use_bias=config.output_bias, kernel_init=_residual_init(config))
        self.query_norm = norm(config.head_dim) if config.qk_norm else None
        self.key_norm = norm(config.head_dim) if config.qk_norm else None

    def __call__(self, x, rotary, mask, cache=None):
        query, key, value = (
            projection(x).reshape(*x.shape[:2], -1, self.head_dim) for projection in (self.query, self.key, self.value)
        )
        if self.query_norm is not None and self.key_norm is not None:
            query = self.query_norm(query).astype(x.dtype)
            key = self.key_norm(key).astype(x.dtype)
        if rotary is not None:
            query, key = _rotate(query, *rotary), _rotate(key, *rotary)
        if cache is None and self.implementation != "plain":
            # These implementations use a finite bias as mask, so a row that attends to nothing is finite, too.
            implementation = "cudnn" if self.implementation == "cudnn" else "xla"
            attended = jax.nn.dot_product_attention(
                query, key, value, mask=mask[:, None], implementation=implementation
            )
            return self.output(attended.reshape(*x.shape[:2], -1)), None
        key, value = key.transpose(0, 2, 3, 1), value.transpose(0, 2, 1, 3)
        if cache is not None:
            keys, values, index = cache
            # The function takes only one index. In 64-bit mode a tuple (0, 0, 0, index) would mix two integer types.
            key = jax.lax.dynamic_update_slice_in_dim(keys, key, index, axis=3)
            value = jax.lax.dynamic_update_slice_in_dim(values, value, index, axis=2)
        attended = _attend(query, key, value, mask)
        return self.output(attended.reshape(*x.shape[:2], -1)), (key, value)


class MLP(nnx.Module):
    """The multilayer perceptron down(act(gate x) * up x), or down(act(up x)) without a gate."""

    def __init__(self, config: ModelConfig, linear: "_Linear"):
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.activation = config.activation
        self.gate = linear(width, inner, use_bias=bias) if config.gated_mlp else None
        self.up = linear(width, inner, use_bias=bias)
        self.down = linear(inner, width, use_bias=bias, kernel_init=_residual_init(config))

    def __call__(self, x):
        activation = _ACTIVATIONS[str(self.activation)]
        up = self.up(x)
        return self.down(activation(up) if self.gate is None else activation(self.gate(x)) * up)


class Block(nnx.Module):
    """A transformer block that normalises before attention and before the MLP."""

    def __init__(self, config: ModelConfig, linear: "_Linear", norm: "_Norm", implementation: str):
        self.attention_norm = norm(config.hidden_size)
        self.attention = Attention(config, linear, norm, implementation)
        self.mlp_norm = norm(config.hidden_size)
        self.mlp = MLP(config, linear)

    def __call__(self, x, rotary, mask, cache=None):
        attended, cache = self.attention(self.attention_norm(x).astype(x.dtype), rotary, mask, cache)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x).astype(x.dtype)), cache


class Transformer(nnx.Module):
    """Maps tokens to hidden states after the final norm. Products are in `dtype`, norms and softmax in float32."""

    def __init__(
        self, config: ModelConfig, dtype: DTypeLike, param_dtype: DTypeLike, remat: str, attention: str, rngs: nnx.Rngs
    ):
        linear = functools.partial(
            nnx.Linear,
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=nnx.initializers.normal(0.02),
            promote_dtype=lora.promote,
            dot_general=lora.product,
            rngs=rngs,
        )
        # With dtype=float32 the norm is computed in float32, and the caller casts the result. The fast variance would
        # lose digits.
        norm: _Norm = functools.partial(
            nnx.LayerNorm if config.layer_norm else nnx.RMSNorm,
            epsilon=config.norm_eps,
            dtype=jnp.float32,
            param_dtype=param_dtype,
            use_fast_variance=False,
            rngs=rngs,
        )
        # nnx.Embed would cast the complete table in every call. So the table has the parameters' type, and only the
        # rows are cast.
        embed = functools.partial(
            nnx.Embed,
            features=config.hidden_size,
            dtype=param_dtype,
            param_dtype=param_dtype,
            embedding_init=nnx.initializers.normal(0.02),
            rngs=rngs,
        )
        self.config, self.dtype, self.remat = config, dtype, remat
        self.embed = embed(config.vocab_size)
        self.positions = embed(config.max_positions) if config.learned_positions else None
        self.layers = nnx.Dict({str(i): Block(config, linear, norm, attention) for i in range(config.num_layers)})
        self.norm = norm(config.hidden_size)
        self.head = None if config.tie_embeddings else linear(config.hidden_size, config.vocab_size, use_bias=False)

    def __call__(
        self,
        tokens: Int[Array, "B L"],
        mask: Bool[Array, "B L"] | Int[Array, "B L"] | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "B L D"], Cache | None]:
        x, rotary, attend, cache = self.begin(tokens, mask, cache)
        written = []
        for i in range(self.config.num_layers):
            block = self.layers[str(i)]
            if cache is None and self.remat != "none":
                policy = getattr(jax.checkpoint_policies, self.remat)
                x = jax.checkpoint(lambda x, block=block: block(x, rotary, attend)[0], policy=policy)(x)
                continue
            layer_cache = None if cache is None else (cache.keys[i], cache.values[i], cache.index)
            x, keys_and_values = block(x, rotary, attend, layer_cache)
            written.append(keys_and_values)
        if cache is not None:
            keys, values = zip(*written, strict=True)
            cache = cache._replace(keys=keys, values=values, index=cache.index + tokens.shape[1])
        return self.end(x), cache

    def begin(
        self, tokens: Array, mask: Array | None, cache: Cache | None
    ) -> tuple[Array, tuple[Array, Array] | None, Array, Cache | None]:
        """Returns the embedded tokens, the rotary factors, the attention mask and the cache for the first block."""
        attend, positions, cache = _visible_slots(tokens, mask, cache)
        if mask is not None:  # a masked id may be outside the vocabulary
            tokens = jnp.where(mask != 0, tokens, 0)
        x = self.embed(tokens).astype(self.dtype)
        rotary = None
        if self.positions is None:
            angles = positions[..., None, None] * rotary_frequencies(self.config)
            rotary = jnp.cos(angles), jnp.sin(angles)
        else:
            x = x + self.positions(jnp.minimum(positions, self.config.max_positions - 1)).astype(self.dtype)
        return x, rotary, attend, cache

    def end(self, x: Array) -> Array:
        """Returns the hidden states after the final norm, from the output of the last block."""
        return self.norm(x).astype(self.dtype)


def _visible_slots(
    tokens: Array, mask: Array | None, cache: Cache | None
) -> tuple[Bool[Array, "..."], Int[Array, "..."], Cache | None]:
    """Returns the slots that each query attends to, each token's position, and the cache with the new mask.

    The slots are [B or 1, L, S], and the positions are [B or 1, L]. Positions count only real tokens, so padding on
    either side moves no token. A mask of integers divides a row into segments. Each segment attends only to itself, and
    the positions of a segment start at 0.
    """
    length = tokens.shape[1]
    causal = jnp.tril(jnp.ones((1, length, length), bool))
    if mask is None and cache is None:
        return causal, jnp.arange(length)[None], None
    if mask is not None and cache is None and mask.dtype != bool:
        attend = causal & (mask[:, :, None] == mask[:, None, :]) & (mask != 0)[:, None, :]
        return attend, jnp.maximum(attend.sum(axis=-1) - 1, 0), None
    mask = jnp.ones(tokens.shape, bool) if mask is None else mask.astype(bool)
    seen = jnp.cumsum(mask, axis=1)
    if cache is None:
        slots, first = mask, 0
    else:
        seen = seen + cache.mask.sum(axis=1, keepdims=True)
        slots, first = jax.lax.dynamic_update_slice_in_dim(cache.mask, mask, cache.index, axis=1), cache.index
        cache = cache._replace(mask=slots)
    causal = jnp.arange(slots.shape[1]) <= first + jnp.arange(length)[:, None]
    return causal & slots[:, None, :], jnp.maximum(seen - 1, 0), cache


def _attend(query, key, value, mask):
    """Returns softmax(q k / sqrt(H)) v.

    A row that attends to nothing averages all values. The average is finite, and is never read.

    query is [B, L, heads, H], key [B, K, H, S], value [B, K, S, H]. The queries that share a key are concatenated along
    the length. So both products are batched matrix products, and no key is repeated. On a CPU this is a quarter faster
    than `jax.nn.dot_product_attention`.
    """
    batch, length, heads, width = query.shape
    groups, slots = key.shape[1], key.shape[3]
    query = query.reshape(batch, length, groups, heads // groups, width).transpose(0, 2, 3, 1, 4)
    query = query.reshape(batch, groups, -1, width)
    scores = jnp.matmul(query, key, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, groups, heads // groups, length, slots) * width**-0.5
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype).reshape(batch, groups, -1, slots)
    attended = jnp.matmul(weights, value).reshape(batch, groups, heads // groups, length, width)
    return attended.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, width)


def rotary_frequencies(config: ModelConfig) -> Float[np.ndarray, " H/2"]:
    """Returns the frequencies theta^(-2i/H), in radians per position.

    The frequencies are scaled as in Llama 3.1 if the config asks for this. The scaling depends on the wavelength.

    - A wavelength above original / low_freq_factor is multiplied by `factor`.
    - A wavelength below original / high_freq_factor is not changed.
    - Between these bounds the frequencies are interpolated linearly in original / wavelength.

    References:
      Su et al., "RoFormer", https://arxiv.org/abs/2104.09864, 2021, eq. 15.
      Grattafiori et al., "The Llama 3 Herd of Models", https://arxiv.org/abs/2407.21783, 2024.
    """
    frequencies = config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    if scaling := config.rope_scaling:
        turns = scaling.original_max_positions * frequencies / (2 * np.pi)
        unscaled = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        unscaled = np.clip(unscaled, 0.0, 1.0)  # the share of each frequency that is not scaled
        frequencies = frequencies * (unscaled + (1 - unscaled) / scaling.factor)
    return frequencies.astype(np.float32)


def _rotate(x, cos, sin):
    """Rotates coordinates i and i + H/2 of each head as one pair, in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _residual_init(config: ModelConfig) -> nnx.Initializer:
    """Returns GPT-2's initialiser of the matrices that write to the residual stream.

    There are 2 * num_layers such matrices, so the standard deviation is divided by the square root of this number.

    References:
      Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, section 2.3.
    """
    return nnx.initializers.normal(0.02 / (2 * config.num_layers) ** 0.5)


_Linear = functools.partial[nnx.Linear]
_Norm = functools.partial[nnx.LayerNorm | nnx.RMSNorm]
