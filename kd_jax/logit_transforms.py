"""Transforms of a model's logits before the temperature and the softmax.

A transform is a function of the logits [..., V] of one model, and returns logits [..., V]. The gradient passes through
the statistics of the logits, as in the published code. The logits must be finite.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from kd_jax.logspace import Number, promote
from kd_jax.resolve import check_number

__all__ = ["centred", "raw", "z_score"]

Logits = Float[Array, "*batch V"]


def raw(logits: Logits) -> Logits:
    """Returns the logits as they are.

    Example:
      >>> raw(jnp.array([3.0, 1.0])).tolist()
      [3.0, 1.0]
    """
    return logits


def centred(logits: Logits) -> Logits:
    """Returns the logits minus their mean over the vocabulary.

    The softmax does not change. A loss that compares logits no longer depends on a constant added to all of them.

    Example:
      >>> centred(jnp.array([3.0, 1.0])).tolist()
      [1.0, -1.0]
    """
    (logits,) = promote(logits)
    return logits - jnp.mean(logits, axis=-1, keepdims=True)


def z_score(logits: Logits, *, epsilon: Number = 1e-7, unbiased: bool = True) -> Logits:
    """Returns ``(z - mean) / (sd + epsilon)``, with mean and standard deviation over the vocabulary.

    A student then learns the shape of the teacher's logits, and not their scale. Where all logits are equal, the result
    is 0, and the gradient of the deviation counts as 0.

    Args:
      epsilon: a number that keeps the divisor above 0, not negative.
      unbiased: True to divide the sum of squares by V - 1, and False to divide by V.

    Raises:
      ValueError: if ``epsilon`` is negative.

    Example:
      >>> z_score(jnp.array([3.0, 1.0, 2.0])).round(3).tolist()
      [1.0, -1.0, 0.0]

    References:
      Sun et al., `Logit Standardization in Knowledge Distillation <https://arxiv.org/abs/2403.01427>`_, 2024.
    """
    epsilon = check_number("epsilon", epsilon, 0.0)
    z = centred(logits)
    variance = jnp.sum(z**2, axis=-1, keepdims=True) / (z.shape[-1] - unbiased)
    varies = variance > 0
    deviation = jnp.where(varies, jnp.sqrt(jnp.where(varies, variance, 1.0)), 0.0)
    return z / jnp.where(varies, deviation + epsilon, 1.0)
