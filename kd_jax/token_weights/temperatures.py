"""A temperature for each token from the token's difficulty."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kd_jax.token_weights import statistics
from kd_jax.token_weights.statistics import Option

__all__ = ["difficulty"]

_SIGNS = {"harden": -1.0, "soften": 1.0}


def difficulty(
    score: Float[Array, "B L"],
    counted: Bool[Array, "B L"],
    weights: Float[Array, "B L"],
    *,
    scale: Option,
    direction: str = "harden",
) -> Float[Array, "B L"]:
    """Returns ``exp(-scale tanh(ln(s / median)))``, a factor of the temperature that falls as a token gets harder.

    The median is the lower median of the scores of kept tokens, the batch's counted tokens with a weight above 0.

    Args:
      score: s, which grows with a token's difficulty; not negative.
      counted: True where a token counts.
      weights: the tokens' weights.
      scale: the logarithm of the largest factor, at least 0.
      direction: 'harden' gives harder tokens the lower temperature, 'soften' the higher one.

    Returns:
      A factor between exp(-scale) and exp(scale); 1 at tokens that are not kept.

    Raises:
      ValueError: the scale is out of range, or the direction is unknown.

    Example:
      >>> score, counted = jnp.array([[0.5, 1.0, 2.0]]), jnp.ones((1, 3), bool)
      >>> difficulty(score, counted, jnp.ones((1, 3)), scale=0.5).round(2).tolist()
      [[1.350000023841858, 1.0, 0.7400000095367432]]

    References:
      "AdaKD", https://arxiv.org/abs/2510.11615, 2025. In the published code the gradient passes through the
      temperature. A caller that follows the paper's formula holds the temperature constant.
    """
    scale = statistics.check_option("scale", scale, 0)
    statistics.check_name("direction", direction, tuple(_SIGNS))
    kept = counted & (weights > 0)
    anywhere = jnp.zeros(score.shape, jnp.int32)  # the median is of the batch, so that the rows do not matter
    median = statistics.quantiles(score, kept, anywhere, 0.5, interpolation="lower")
    moved = kept & (score != median)  # ln s - ln s is NaN at 0
    distance = jnp.log(jnp.where(moved, score, 1)) - jnp.log(jnp.where(moved, median, 1))
    return jnp.exp(_SIGNS[direction] * scale * jnp.tanh(distance))
