"""Causal attention with grouped queries, sliding windows and rotary positions, and the cache of keys and values."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from kd_jax.models.config import ModelConfig
from kd_jax.models.norms import Norm, applied
from kd_jax.models.parts import LinearOf, NormOf, residual_init
from kd_jax.models.rotary import rotate

LayerCache = tuple[Array, Array, Array]  # keys and values of one layer, and the number of filled slots


class Cache(NamedTuple):
    """Keys and values of the tokens that the model has read, one array per layer.

    `index` of the S slots are filled, padding included. Each array has the layout of the matrix product that reads the
    array, so that no decoding step transposes earlier entries. `tokens` are the ids that the model has read, if a longer
    sequence changes the keys and values of earlier tokens (`Rotary.restart_length`), and None otherwise.
    """

    keys: tuple[Float[Array, "B K H S"], ...]
    values: tuple[Float[Array, "B K S H"], ...]
    mask: Bool[Array, "B S"]
    index: Int[Array, ""]
    tokens: Int[Array, "B S"] | None = None


class Slots(NamedTuple):
    """The slots that each query attends to, which are the same in all layers of a kind.

    Attributes:
      visible: the slots for a layer without a window.
      in_window: the slots for a layer with the window.
      positions: each token's position.
    """

    visible: Bool[Array, "#B L S"]
    in_window: Bool[Array, "#B L S"]
    positions: Int[Array, "#B L"]


class Context(NamedTuple):
    """The arrays that all blocks read: masks and rotary factors, for layers without a window and with the window."""

    slots: Slots
    rotary: tuple[Array, Array] | None
    window_rotary: tuple[Array, Array] | None


class Attention(nnx.Module):
    """Causal attention with grouped queries of one layer."""

    def __init__(self, config: ModelConfig, layer: int, linear: LinearOf, norm: NormOf, implementation: str):
        # The implementations of JAX have no cap.
        self.implementation = "plain" if config.attention_cap else implementation
        self.has_window = layer in config.layers_with_window
        self.rotates = layer not in config.unrotated_layers
        width, queries = config.hidden_size, config.num_heads * config.head_dim
        shared = config.num_kv_heads * config.head_dim
        self.head_dim, self.scale, self.cap = config.head_dim, config.attention_scale, config.attention_cap
        self.query = linear(width, queries, use_bias=config.attention_bias)
        self.key = linear(width, shared, use_bias=config.attention_bias)
        self.value = linear(width, shared, use_bias=config.attention_bias)
        self.output = linear(queries, width, use_bias=config.output_bias, kernel_init=residual_init(config))
        self.qk_norm = config.qk_norm
        of_heads = functools.partial(_norm_of_heads, config, norm)
        self.query_norm, self.key_norm = of_heads(config.num_heads), of_heads(config.num_kv_heads)

    def __call__(
        self, x: Float[Array, "B L D"], context: Context, cache: LayerCache | None = None
    ) -> tuple[Float[Array, "B L D"], tuple[Array, Array] | None]:
        """Returns the output, and the keys and values of all tokens."""
        query = self._heads(self.query(x), self.query_norm)
        key = self._heads(self.key(x), self.key_norm)
        value = self._heads(self.value(x), None)
        mask = context.slots.in_window if self.has_window else context.slots.visible
        rotary = context.window_rotary if self.has_window else context.rotary
        if rotary is not None and self.rotates:
            query, key = rotate(query, *rotary), rotate(key, *rotary)
        if cache is None and self.implementation != "plain":
            # These implementations use a finite bias as mask, so a row that attends to nothing is finite, too.
            implementation = "cudnn" if self.implementation == "cudnn" else "xla"
            attended = jax.nn.dot_product_attention(
                query, key, value, mask=mask[:, None], scale=self.scale, implementation=implementation
            )
            return self.output(attended.reshape(*x.shape[:2], -1)), None
        key, value = key.transpose(0, 2, 3, 1), value.transpose(0, 2, 1, 3)
        if cache is not None:
            keys, values, index = cache
            # The function takes only one index. In 64-bit mode a tuple (0, 0, 0, index) would mix two integer types.
            key = jax.lax.dynamic_update_slice_in_dim(keys, key, index, axis=3)
            value = jax.lax.dynamic_update_slice_in_dim(values, value, index, axis=2)
        attended = _attend(query, key, value, mask, self.scale, self.cap)
        return self.output(attended.reshape(*x.shape[:2], -1)), (key, value)

    def _heads(self, x: Float[Array, "B L KH"], norm: Norm | None) -> Float[Array, "B L K H"]:
        """Returns normalised queries, keys or values, divided into heads."""
        x = applied(norm, x) if self.qk_norm == "width" else x
        heads = x.reshape(*x.shape[:2], -1, self.head_dim)
        return heads if self.qk_norm == "width" else applied(norm, heads)


def _norm_of_heads(config: ModelConfig, norm: NormOf, heads: int) -> Norm | None:
    """Returns the norm of queries or keys with a number of heads; None if there is no such norm."""
    width = config.head_dim
    shapes = {"head": (width,), "each_head": (heads, width), "width": (heads * width,)}
    return norm(shapes[str(config.qk_norm)], bias=False) if config.qk_norm in shapes else None


def visible_slots(
    tokens: Int[Array, "B L"], mask: Array | None, cache: Cache | None, window: int | None
) -> tuple[Slots, Cache | None]:
    """Returns the slots that each query attends to, each token's position, and the cache with the new mask.

    Positions count only real tokens, so padding on either side moves no token. A mask of integers divides a row into
    segments. Each segment attends only to itself, and the positions of a segment start at 0. A window of W tokens
    excludes the tokens that are W positions or more before the query.

    Args:
      tokens: the new tokens.
      mask: True where there is a token, or the number of each token's segment; None if there is no padding.
      cache: the tokens that the model has read, or None.
      window: the number of tokens in the window, or None.
    """
    length = tokens.shape[1]
    causal = jnp.tril(jnp.ones((1, length, length), bool))
    if mask is None and cache is None:
        positions = jnp.arange(length)[None]
        return _with_window(causal, positions, positions, window), None
    if mask is not None and cache is None and mask.dtype != bool:
        visible = causal & (mask[:, :, None] == mask[:, None, :]) & (mask != 0)[:, None, :]
        positions = jnp.maximum(visible.sum(axis=-1) - 1, 0)
        return _with_window(visible, positions, positions, window), None
    mask = jnp.ones(tokens.shape, bool) if mask is None else mask.astype(bool)
    seen = jnp.cumsum(mask, axis=1)
    if cache is None:
        filled, first, of_slots = mask, 0, seen
    else:
        seen = seen + cache.mask.sum(axis=1, keepdims=True)
        filled, first = jax.lax.dynamic_update_slice_in_dim(cache.mask, mask, cache.index, axis=1), cache.index
        cache, of_slots = cache._replace(mask=filled), jnp.cumsum(filled, axis=1)
    causal = jnp.arange(filled.shape[1]) <= first + jnp.arange(length)[:, None]
    visible, positions = causal & filled[:, None, :], jnp.maximum(seen - 1, 0)
    return _with_window(visible, positions, of_slots - 1, window), cache


def _with_window(visible: Array, positions: Array, of_slots: Array, window: int | None) -> Slots:
    """Returns `Slots`, from the positions of the queries and of the slots."""
    if window is None or window >= visible.shape[-1]:  # the window excludes nothing
        return Slots(visible, visible, positions)
    return Slots(visible, visible & (of_slots[:, None, :] > positions[:, :, None] - window), positions)


def _attend(query, key, value, mask, scale, cap):
    """Returns softmax(scale q k) v, with scores below the cap if there is a cap.

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
    scores = scores.reshape(batch, groups, heads // groups, length, slots) * scale
    if cap is not None:
        scores = cap * jnp.tanh(scores / cap)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype).reshape(batch, groups, -1, slots)
    attended = jnp.matmul(weights, value).reshape(batch, groups, heads // groups, length, width)
    return attended.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, width)
