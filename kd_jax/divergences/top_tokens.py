"""Divergences that look at the likeliest tokens only: at their differences, their order, and their mass."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from kd_jax.divergences.kl import forward_kl
from kd_jax.divergences.shared import (
    LogProbs,
    PerToken,
    check_count,
    check_word,
    log_sum,
    normalise,
    top_entries,
)
from kd_jax.logspace import has_mass, promote

__all__ = ["coverage", "logit_differences", "plackett_luce"]


def logit_differences(log_p: LogProbs, log_q: LogProbs, *, k: int = 8, leader: str = "teacher") -> PerToken:
    """Returns KL between the softmaxes of the differences between the ``k`` largest logits.

    The tokens are the ``k`` likeliest of the leader, in the leader's order. Each pair of tokens i before j gives the
    difference ``z_i - z_j``, which is also the difference of the log-probabilities. The softmax of the
    ``k (k - 1) / 2`` differences is a distribution over pairs. The value is ``KL(teacher's || student's)``. A token
    that has no mass in one of the models is in no pair. The published loss is the sum over both leaders.

    Args:
      k: the number of tokens, at least 2.
      leader: ``"teacher"`` or ``"student"``. The choice of the tokens is a constant to the gradient.

    Returns:
      Nats per token, not negative.

    Raises:
      ValueError: if ``k`` is below 2 or not whole, or if ``leader`` is another word.

    Example:
      >>> log_p, log_q = jnp.log(jnp.array([0.5, 0.3, 0.2])), jnp.log(jnp.array([0.5, 0.2, 0.3]))
      >>> float(logit_differences(log_p, log_q, k=2))  # there is only one pair
      0.0

    References:
      Li et al., `BiLD <https://arxiv.org/abs/2406.13555>`_, 2024.
    """
    check_count("k", k, 2)
    check_word("leader", leader, ("teacher", "student"))
    log_p, log_q = promote(log_p, log_q)
    top_p, top_q = top_entries(log_p if leader == "teacher" else log_q, k, log_p, log_q)
    first, second = np.triu_indices(top_p.shape[-1], 1)
    both = has_mass(top_p) & has_mass(top_q)
    counted = both[..., first] & both[..., second]

    def over_pairs(top: Array) -> Array:
        finite = jnp.where(both, top, 0.0)
        return normalise(jnp.where(counted, finite[..., first] - finite[..., second], -jnp.inf))

    return forward_kl(over_pairs(top_p), over_pairs(top_q))


def plackett_luce(log_p: LogProbs, log_q: LogProbs, *, k: int = 8) -> PerToken:
    """Returns ``-1/k log`` of the probability that the student ranks the teacher's top ``k`` tokens as the teacher does.

    The student draws the ``k`` tokens one after another without replacement, with probabilities proportional to q.
    The value is ``-1/k sum_i (log q_i - log sum_(j >= i) q_j)`` in the teacher's order. Only the order of p matters, so
    the value is not 0 where ``p == q``. Tokens without mass under p are in no ranking, and reduce ``k``.

    Args:
      k: the number of tokens, at least 1. The memory grows as ``k^2``.

    Returns:
      Nats per token and rank, not negative.

    Raises:
      ValueError: if ``k`` is below 1 or not whole.

    Example:
      >>> log_p, log_q = jnp.log(jnp.array([0.7, 0.2, 0.1])), jnp.log(jnp.array([0.3, 0.1, 0.6]))
      >>> round(float(plackett_luce(log_p, log_q, k=2)), 4)  # 1/2 log(4 / 3)
      0.1438

    References:
      Xia et al., `Listwise Approach to Learning to Rank <https://doi.org/10.1145/1390156.1390306>`_, 2008.
    """
    check_count("k", k)
    log_p, log_q = promote(log_p, log_q)
    top_p, top_q = top_entries(log_p, k, log_p, log_q)
    ranked = has_mass(top_p)
    top_q = jnp.where(ranked, top_q, -jnp.inf)
    later = np.triu(np.ones((top_q.shape[-1],) * 2, bool))
    remaining = log_sum(jnp.where(later, top_q[..., None, :], -jnp.inf))
    drawn = jnp.where(has_mass(top_q), top_q, 0.0) - jnp.where(has_mass(top_q), remaining, 0.0)
    summands = jnp.where(ranked & ~has_mass(top_q), jnp.inf, -drawn)
    return jnp.sum(summands, axis=-1) / jnp.sum(ranked, axis=-1)


def coverage(log_p: LogProbs, log_q: LogProbs, *, k: int = 8) -> PerToken:
    """Returns ``-log`` of the student's mass on the teacher's ``k`` likeliest tokens.

    Only the choice of the tokens depends on p, so the value is not 0 where ``p == q``.

    Args:
      k: the number of tokens, at least 1.

    Returns:
      Nats per token, not negative; infinite where the student has no mass on these tokens.

    Raises:
      ValueError: if ``k`` is below 1 or not whole.

    Example:
      >>> log_p, log_q = jnp.log(jnp.array([0.5, 0.3, 0.2])), jnp.log(jnp.array([0.25, 0.25, 0.5]))
      >>> round(float(coverage(log_p, log_q, k=2)), 4)  # log 2
      0.6931
    """
    check_count("k", k)
    log_p, log_q = promote(log_p, log_q)
    return -log_sum(*top_entries(log_p, k, log_q))
