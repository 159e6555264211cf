"""KL in either direction, and sums of the two with constant weights."""

import jax.numpy as jnp

from kd_jax.divergences.shared import LogProbs, PerToken
from kd_jax.logspace import Weight, alpha_beta_entries, weigh
from kd_jax.resolve import check_fraction

__all__ = ["forward_kl", "jeffreys", "mixed_kl", "reverse_kl"]


def forward_kl(log_p: LogProbs, log_q: LogProbs) -> PerToken:
    """Returns ``KL(p || q) = sum p (log p - log q)``.

    Forward KL asks the student to cover every token that the teacher may choose. The value is infinite where the
    teacher has mass and the student has none.

    Returns:
      Nats per token, not negative.

    Example:
      >>> p, q = jnp.array([0.5, 0.5, 0.0]), jnp.array([0.5, 0.25, 0.25])
      >>> round(float(forward_kl(jnp.log(p), jnp.log(q))), 4)
      0.3466

    References:
      Hinton et al., `Distilling the Knowledge in a Neural Network <https://arxiv.org/abs/1503.02531>`_, 2015.
    """
    return jnp.sum(alpha_beta_entries(log_p, log_q, 1.0, 0.0), axis=-1)


def reverse_kl(log_p: LogProbs, log_q: LogProbs) -> PerToken:
    """Returns ``KL(q || p) = sum q (log q - log p)``.

    Reverse KL asks the student to choose only tokens that the teacher may choose. The value is infinite where the
    student has mass and the teacher has none.

    Returns:
      Nats per token, not negative.

    Example:
      >>> p, q = jnp.array([0.5, 0.25, 0.25]), jnp.array([0.5, 0.5, 0.0])
      >>> round(float(reverse_kl(jnp.log(p), jnp.log(q))), 4)
      0.3466

    References:
      Gu et al., `MiniLLM <https://arxiv.org/abs/2306.08543>`_, 2024.
    """
    return forward_kl(log_q, log_p)


def mixed_kl(log_p: LogProbs, log_q: LogProbs, *, forward_weight: Weight = 0.5) -> PerToken:
    """Returns ``w KL(p || q) + (1 - w) KL(q || p)``.

    The sum is a fixed compromise between covering the teacher and staying within the teacher's support. With
    ``w = 1/2`` the value is half of Jeffreys' divergence.

    Args:
      forward_weight: w, in ``[0, 1]``.

    Returns:
      Nats per token, not negative.

    Raises:
      ValueError: if ``forward_weight`` is a Python number outside ``[0, 1]``.

    Example:
      >>> p, q = jnp.array([0.5, 0.5, 0.0]), jnp.array([0.5, 0.25, 0.25])
      >>> round(float(mixed_kl(jnp.log(p), jnp.log(q), forward_weight=1.0)), 4)
      0.3466

    References:
      Wu et al., `Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large Language Models
      <https://arxiv.org/abs/2404.02657>`_, 2025 (the baseline FKL + RKL).
    """
    w = check_fraction("forward_weight", forward_weight)
    return weigh(w, forward_kl(log_p, log_q)) + weigh(1 - w, reverse_kl(log_p, log_q))


def jeffreys(log_p: LogProbs, log_q: LogProbs) -> PerToken:
    """Returns ``KL(p || q) + KL(q || p) = sum (p - q) (log p - log q)``.

    The value is twice ``mixed_kl`` with equal weights, and is infinite where one of the two has mass and the other has
    none.

    Returns:
      Nats per token, not negative.

    Example:
      >>> log_p, log_q = jnp.log(jnp.array([0.75, 0.25])), jnp.log(jnp.array([0.25, 0.75]))
      >>> round(float(jeffreys(log_p, log_q)), 4)  # log 3
      1.0986

    References:
      Jeffreys, `An Invariant Form for the Prior Probability in Estimation Problems
      <https://doi.org/10.1098/rspa.1946.0056>`_, 1946.
    """
    return forward_kl(log_p, log_q) + reverse_kl(log_p, log_q)
