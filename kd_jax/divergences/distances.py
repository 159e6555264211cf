"""Distances between the two distributions: symmetric, bounded, and without logarithms."""

import jax.numpy as jnp

from kd_jax.divergences.shared import LogProbs, PerToken
from kd_jax.logspace import alpha_beta_entries, promote

__all__ = ["hellinger", "squared_hellinger", "total_variation"]


def total_variation(log_p: LogProbs, log_q: LogProbs) -> PerToken:
    """Returns ``1/2 sum |p - q|``.

    Suppose that a token came from p or from q with equal chances. Then the best guess of the token's source is wrong
    with probability ``(1 - TV) / 2``. The value is symmetric and bounded, and depends on differences of probabilities,
    not on their ratios. The gradient is taken as 0 where ``p == q``.

    Returns:
      A number per token between 0 and 1, without a unit.

    Example:
      >>> p, q = jnp.array([0.5, 0.5, 0.0]), jnp.array([0.5, 0.25, 0.25])
      >>> float(total_variation(jnp.log(p), jnp.log(q)))
      0.25

    References:
      Wen et al., `f-Divergence Minimization for Sequence-Level Knowledge Distillation
      <https://arxiv.org/abs/2307.15190>`_, 2023.
    """
    log_p, log_q = promote(log_p, log_q)
    return jnp.sum(jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)), axis=-1) / 2


def squared_hellinger(log_p: LogProbs, log_q: LogProbs) -> PerToken:
    """Returns ``1/2 sum (sqrt p - sqrt q)^2 = 1 - sum sqrt(p q)``.

    The value is a quarter of the alpha-divergence with alpha 1/2. The total variation is between ``H^2`` and
    ``H sqrt(2 - H^2)``.

    Returns:
      A number per token between 0 and 1, without a unit.

    Example:
      >>> p, q = jnp.array([1.0, 0.0]), jnp.array([0.25, 0.75])
      >>> float(squared_hellinger(jnp.log(p), jnp.log(q)))
      0.5

    References:
      Cichocki & Amari, `Families of Alpha- Beta- and Gamma-Divergences <https://doi.org/10.3390/e12061532>`_,
      2010.
    """
    return jnp.sum(alpha_beta_entries(log_p, log_q, 0.5, 0.5), axis=-1) / 4


def hellinger(log_p: LogProbs, log_q: LogProbs) -> PerToken:
    """Returns the square root of ``squared_hellinger``, a metric.

    The gradient does not tend to 0 as q approaches p, and has no limit there. It is taken as 0 where ``p == q``.

    Returns:
      A number per token between 0 and 1, without a unit.

    Example:
      >>> p, q = jnp.array([1.0, 0.0]), jnp.array([0.25, 0.75])
      >>> round(float(hellinger(jnp.log(p), jnp.log(q))), 4)
      0.7071

    References:
      Xie et al., `AdaKD <https://arxiv.org/abs/2510.11615>`_, 2025 (as the score of a token).
    """
    squared = squared_hellinger(log_p, log_q)
    differ = ~(squared <= 0)  # NaN remains NaN
    return jnp.where(differ, jnp.sqrt(jnp.where(differ, squared, 1.0)), 0.0)
