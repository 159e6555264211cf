"""The norms of all families: RMSNorm and LayerNorm, with a scale for each coordinate or for each head's coordinates."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from kd_jax.models.config import ModelConfig


class Norm(nnx.Module):
    """A norm over the last axis, computed in float32: (x - mean) / sqrt(variance + eps) * scale + bias.

    The classes of Flax have neither a scale of 1 + parameter nor a scale for each head. As in these classes, each
    parameter takes a key of `rngs`, although the initial values are constant. A seed therefore gives the same model as
    with the classes of Flax.

    Args:
      shape: the shape of the scale and of the bias. The last entry is the width of the norm.
      config: the config, which decides between RMSNorm (without mean and bias) and LayerNorm.
      param_dtype: the type of the parameters.
      rngs: the random keys of the model.
      bias: False for a LayerNorm without a bias, regardless of the config.
    """

    def __init__(
        self, shape: tuple[int, ...], config: ModelConfig, param_dtype: DTypeLike, rngs: nnx.Rngs, bias: bool = True
    ):
        self.centred, self.epsilon, self.offset = config.layer_norm, config.norm_eps, config.unit_offset
        has_bias = bias and config.layer_norm and config.norm_bias
        zeros, ones = nnx.initializers.zeros, nnx.initializers.ones
        initial = zeros if config.unit_offset else ones
        self.scale = nnx.Param(initial(rngs.params(), shape, param_dtype)) if config.norm_scale else None
        self.bias = nnx.Param(zeros(rngs.params(), shape, param_dtype)) if has_bias else None

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x = x.astype(jnp.float32)
        if self.centred:
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        factor = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        if self.scale is not None:
            scale = self.scale[...].astype(jnp.float32)
            factor = factor * (1 + scale if self.offset else scale)
        y = x * factor
        return y if self.bias is None else y + self.bias[...].astype(jnp.float32)


def applied(norm: Norm | None, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Returns norm(x) in the type of x; x without a norm."""
    return x if norm is None else norm(x).astype(x.dtype)
