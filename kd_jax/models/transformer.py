"""The decoder-only transformer of all families. `ModelConfig` decides the norms, positions, biases and windows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from kd_jax.models import lora
from kd_jax.models.attention import Attention, Cache, Context, LayerCache, visible_slots
from kd_jax.models.config import ModelConfig
from kd_jax.models.experts import Experts
from kd_jax.models.norms import Norm, applied
from kd_jax.models.parts import ACTIVATIONS, LinearOf, NormOf, residual_init
from kd_jax.models.rotary import rotary_factors


class MLP(nnx.Module):
    """The multilayer perceptron down(act(gate x) * up x), or down(act(up x)) without a gate."""

    def __init__(self, config: ModelConfig, linear: LinearOf):
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.activation = config.activation
        self.gate = linear(width, inner, use_bias=bias) if config.gated_mlp else None
        self.up = linear(width, inner, use_bias=bias)
        self.down = linear(inner, width, use_bias=bias, kernel_init=residual_init(config))

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        activation = ACTIVATIONS[str(self.activation)]
        up = self.up(x)
        return self.down(activation(up) if self.gate is None else activation(self.gate(x)) * up)


class Block(nnx.Module):
    """A transformer block: attention and an MLP, with norms in the places that `ModelConfig.norms` names."""

    def __init__(self, config: ModelConfig, layer: int, linear: LinearOf, norm: NormOf, implementation: str):
        width = (config.hidden_size,)
        self.norms, self.parallel, self.multiplier = config.norms, config.parallel_norms > 0, config.residual_multiplier
        is_first, is_last = config.norms != "after", config.norms in ("after", "around")
        self.attention_norm = norm(width) if is_first else None
        self.attention = Attention(config, layer, linear, norm, implementation)
        self.attention_out_norm = norm(width) if is_last else None
        self.mlp_norm = norm(width) if is_first and config.parallel_norms != 1 else None
        self.mlp = Experts(config, linear) if layer in config.layers_with_experts else MLP(config, linear)
        self.mlp_out_norm = norm(width) if is_last else None

    def __call__(
        self, x: Float[Array, "B L D"], context: Context, cache: LayerCache | None = None
    ) -> tuple[Float[Array, "B L D"], tuple[Array, Array] | None]:
        if self.norms == "residual":
            attended, written = self.attention(x, context, cache)
            x = applied(self.attention_norm, x + self._multiplied(attended))
            return applied(self.mlp_norm, x + self._multiplied(self.mlp(x))), written
        read = applied(self.attention_norm, x)
        attended, written = self.attention(read, context, cache)
        attended = self._multiplied(applied(self.attention_out_norm, attended))
        if self.parallel:
            read = read if self.mlp_norm is None else applied(self.mlp_norm, x)
            return x + attended + self._multiplied(self.mlp(read)), written
        x = x + attended
        return x + self._multiplied(applied(self.mlp_out_norm, self.mlp(applied(self.mlp_norm, x)))), written

    def _multiplied(self, x: Array) -> Array:
        return _times(x, self.multiplier)


class Transformer(nnx.Module):
    """Maps tokens to hidden states after the final norm. Products are in `dtype`, norms and softmax in float32."""

    def __init__(
        self, config: ModelConfig, dtype: DTypeLike, param_dtype: DTypeLike, remat: str, attention: str, rngs: nnx.Rngs
    ):
        linear: LinearOf = functools.partial(
            nnx.Linear,
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=nnx.initializers.normal(0.02),
            promote_dtype=lora.promote,
            dot_general=lora.product,
            rngs=rngs,
        )
        norm: NormOf = functools.partial(Norm, config=config, param_dtype=param_dtype, rngs=rngs)
        # nnx.Embed would cast the complete table in every call. So the table has the parameters' type, and only the
        # rows are cast.
        embed = functools.partial(
            nnx.Embed,
            dtype=param_dtype,
            param_dtype=param_dtype,
            embedding_init=nnx.initializers.normal(0.02),
            rngs=rngs,
        )
        width, outer = config.hidden_size, config.embedding_size
        rows = config.max_positions + config.position_offset
        self.config, self.dtype, self.remat = config, dtype, remat
        self.embed = embed(config.vocab_size, outer)
        self.project_in = linear(outer, width, use_bias=False) if outer != width else None
        self.positions = embed(rows, width) if config.learned_positions else None
        self.layers = nnx.Dict({str(i): Block(config, i, linear, norm, attention) for i in range(config.num_layers)})
        self.norm = norm((width,)) if config.final_norm else None
        self.project_out = linear(width, outer, use_bias=False) if outer != width else None
        self.head = None if config.tie_embeddings else linear(outer, config.vocab_size, use_bias=False)

    def __call__(
        self,
        tokens: Int[Array, "B L"],
        mask: Bool[Array, "B L"] | Int[Array, "B L"] | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "B L E"], Cache | None]:
        limit = self.config.rotary.restart_length
        if cache is None or cache.tokens is None or limit is None:
            return self._read(tokens, mask, cache)
        mask = jnp.ones(tokens.shape, bool) if mask is None else mask.astype(bool)
        update = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=cache.index, axis=1)
        every_token = update(cache.tokens, tokens.astype(cache.tokens.dtype))
        return self._read_or_restart(tokens, mask, cache._replace(tokens=every_token), every_token, limit)

    def _read_or_restart(
        self,
        tokens: Int[Array, "B L"],
        mask: Bool[Array, "B L"],
        cache: Cache,
        every_token: Int[Array, "B S"],
        limit: int,
    ) -> tuple[Array, Cache | None]:
        """Reads all tokens again if a row becomes longer than the length at which its rotary frequencies change.

        The keys and values of all earlier tokens then change, too, because each layer reads the output of the layer
        before.
        """
        first, length, before = cache.index, tokens.shape[1], cache.mask.sum(axis=1)
        is_longer = (0 < before) & (before <= limit) & (before + mask.sum(axis=1) > limit)

        def restart() -> tuple[Array, Cache | None]:
            empty = cache._replace(mask=jnp.zeros_like(cache.mask), index=jnp.zeros_like(first))
            filled = jax.lax.dynamic_update_slice_in_dim(cache.mask, mask, first, axis=1)
            x, again = self._read(every_token, filled, empty)
            assert again is not None  # because a cache is given
            return jax.lax.dynamic_slice_in_dim(x, first, length, axis=1), again._replace(index=first + length)

        return jax.lax.cond(is_longer.any(), restart, lambda: self._read(tokens, mask, cache))

    def _read(self, tokens: Array, mask: Array | None, cache: Cache | None) -> tuple[Array, Cache | None]:
        x, context, cache = self.begin(tokens, mask, cache)
        written = []
        for i in range(self.config.num_layers):
            block = self.layers[str(i)]
            if cache is None and self.remat != "none":
                policy = getattr(jax.checkpoint_policies, self.remat)
                x = jax.checkpoint(lambda x, block=block: block(x, context)[0], policy=policy)(x)
                continue
            layer_cache = None if cache is None else (cache.keys[i], cache.values[i], cache.index)
            x, keys_and_values = block(x, context, layer_cache)
            written.append(keys_and_values)
        if cache is not None:
            keys, values = zip(*written, strict=True)
            cache = cache._replace(keys=keys, values=values, index=cache.index + tokens.shape[1])
        return self.end(x), cache

    def begin(self, tokens: Array, mask: Array | None, cache: Cache | None) -> tuple[Array, Context, Cache | None]:
        """Returns the embedded tokens, the arrays that all blocks read, and the cache for the first block."""
        config = self.config
        slots, cache = visible_slots(tokens, mask, cache, config.sliding_window)
        if mask is not None:  # a masked id may be outside the vocabulary
            tokens = jnp.where(mask != 0, tokens, 0)
        x = self.embed(tokens).astype(self.dtype)
        if config.sqrt_embedding:
            # transformers rounds the factor to the type of the computation. A product in float32 would differ.
            x = x * jnp.asarray(np.float32(config.hidden_size**0.5)).astype(self.dtype)
        x = _times(x, config.embedding_multiplier)
        if self.project_in is not None:
            x = self.project_in(x)
        if self.positions is None:
            segments = mask if cache is None and mask is not None and mask.dtype != bool else None
            of_layers = lambda rotary: rotary_factors(rotary, config.head_dim, slots.positions, segments)
            rotary = of_layers(config.rotary)
            return x, Context(slots, rotary, of_layers(config.window_rotary) if config.window_rotary else rotary), cache
        rows = jnp.minimum(slots.positions, config.max_positions - 1) + config.position_offset
        return x + self.positions(rows).astype(self.dtype), Context(slots, None, None), cache

    def end(self, x: Array) -> Array:
        """Returns the hidden states after the final norm, from the output of the last block.

        The divisor of the logits divides the hidden states, because the output matrix is linear: (x / d) W = (x W) / d.
        The division is in float32, and the result is rounded once.
        """
        x = x if self.norm is None else self.norm(x)
        if self.project_out is not None:
            x = self.project_out(x.astype(self.dtype))
        if self.config.logit_divisor != 1:
            x = x.astype(jnp.float32) / self.config.logit_divisor
        return x.astype(self.dtype)


def _times(x: Array, factor: float) -> Array:
    """Returns the product in the type of x. The factor is not rounded to this type."""
    return x if factor == 1 else (x.astype(jnp.float32) * factor).astype(x.dtype)
