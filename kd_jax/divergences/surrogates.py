"""Losses whose gradient has a meaning and whose value has none."""

import jax
import jax.numpy as jnp

from kd_jax.divergences.shared import LogProbs, PerToken, check_word, log_weights, normalise
from kd_jax.logspace import has_mass, log_ratio, promote

__all__ = ["surrogate_reverse_kl"]


def surrogate_reverse_kl(log_p: LogProbs, log_q: LogProbs, *, weights: str = "student") -> PerToken:
    """Returns ``sum w (log q - log p) log q``, in which only the last factor has a gradient.

    This is the policy gradient with the reward ``log p - log q`` of each token, as an exact sum over the tokens. With
    the student's weights on the whole vocabulary, the gradient is that of ``reverse_kl``. On a part of the vocabulary
    the weights are normalised over this part. Only tokens that have mass in both distributions count.

    Args:
      weights: ``"student"`` for q, ``"teacher"`` for p, or ``"uniform"`` for equal weights.

    Returns:
      A number per token of either sign; 0 where no token counts.

    Raises:
      ValueError: if ``weights`` is another word.

    Example:
      >>> log_p, logits = jnp.log(jnp.array([0.5, 0.5])), jnp.array([1.0, 0.0])
      >>> gradient = jax.grad(lambda z: surrogate_reverse_kl(log_p, jax.nn.log_softmax(z)))(logits)
      >>> [round(float(g), 4) for g in gradient]  # as for reverse_kl
      [0.1966, -0.1966]

    References:
      Li et al., `Rethinking On-Policy Distillation of Large Language Models <https://arxiv.org/abs/2604.13016>`_, 2026.
    """
    check_word("weights", weights, ("student", "teacher", "uniform"))
    log_p, log_q = promote(log_p, log_q)
    both = has_mass(log_p) & has_mass(log_q)
    gap = jnp.exp(normalise(log_weights(weights, log_p, log_q))) * jax.lax.stop_gradient(log_ratio(log_q, log_p))
    return jnp.sum(gap * jnp.where(both, log_q, 0.0), axis=-1)
