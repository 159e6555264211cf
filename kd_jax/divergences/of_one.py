"""Functions of one next-token distribution, for a term whose pair names one member.

A function ``F(log_q, *, ...)`` returns a value per token, in nats. As for a divergence, the log-probabilities are
normalised over the last axis, and the function sums over this axis.
"""

import jax.numpy as jnp

from kd_jax.divergences.shared import LogProbs, PerToken
from kd_jax.logspace import has_mass, promote

__all__ = ["entropy"]


def entropy(log_q: LogProbs) -> PerToken:
    """Returns ``-sum q log q``, the entropy of the distribution.

    A term with a coefficient above 0 makes the student more certain, and a coefficient below 0 less certain.
    ``reverse_kl`` plus this value is ``-sum q log p``, the cross-entropy that a student has with its teacher.

    Returns:
      A number per token between 0 and ln V.

    Example:
      >>> round(float(entropy(jnp.log(jnp.array([0.5, 0.5, 0.0])))), 4)
      0.6931

    References:
      Wen et al., `f-Divergence Minimization for Sequence-Level Knowledge Distillation
      <https://arxiv.org/abs/2307.15190>`_, 2023, for the cross-entropy of the code's ENGINE baseline; `TSD-KD
      <https://arxiv.org/abs/2603.13260>`_, 2026, for the entropy at uncertain tokens.
    """
    (log_q,) = promote(log_q)
    return -jnp.sum(jnp.exp(log_q) * jnp.where(has_mass(log_q), log_q, 0.0), axis=-1)
