"""Shapes of a sampled token's reward: functions of the token's log-probabilities, ``R(log_p, log_q, *, ...)``.

``log_p`` is the token's log-probability under the teacher, or the weighted sum of the log-probabilities of several
members. ``log_q`` is the token's log-probability under the student that sampled it. The reward is a constant to the
gradient.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from kd_jax.resolve import check_number

__all__ = ["clip", "identity", "power", "soft_log"]

PerToken = Float[Array, "*tokens"]


def identity(log_p: PerToken, log_q: PerToken) -> PerToken:
    """Returns ``log p - log q``. Its mean over tokens of the student is ``-KL(q || p)``.

    Example:
      >>> round(float(identity(jnp.log(jnp.array(0.5)), jnp.log(jnp.array(0.25)))), 4)
      0.6931
    """
    return log_p - log_q


def soft_log(log_p: PerToken, log_q: PerToken) -> PerToken:
    """Returns ``sign(d) ln(1 + |d|)`` with ``d = log p - log q``, which grows slowly where the models disagree.

    Example:
      >>> round(float(soft_log(jnp.array(-1.0), jnp.array(-2.0))), 4)
      0.6931

    References:
      "Soft-log compression", https://arxiv.org/abs/2607.13399, 2026.
    """
    d = log_p - log_q
    return jnp.sign(d) * jnp.log1p(jnp.abs(d))


def power(log_p: PerToken, log_q: PerToken, *, exponent: float) -> PerToken:
    """Returns ``p^a - q^a``, which is bounded by 1.

    Args:
      exponent: a, above 0.

    Raises:
      ValueError: if ``exponent`` is not above 0.

    Example:
      >>> round(float(power(jnp.log(jnp.array(0.25)), jnp.log(jnp.array(0.01)), exponent=0.5)), 4)
      0.4

    References:
      "PowerOPD", https://arxiv.org/abs/2606.17199, 2026.
    """
    a = check_number("exponent", exponent, 1e-6)
    return jnp.exp(a * log_p) - jnp.exp(a * log_q)


def clip(log_p: PerToken, log_q: PerToken, *, limit: float) -> PerToken:
    """Returns ``log p - log q``, clipped to ``[-limit, limit]``.

    Args:
      limit: the largest reward, above 0.

    Raises:
      ValueError: if ``limit`` is not above 0.

    Example:
      >>> float(clip(jnp.array(-1.0), jnp.array(-9.0), limit=1.0))
      1.0
    """
    limit = check_number("limit", limit, 1e-6)
    return jnp.clip(log_p - log_q, -limit, limit)
