"""KL to a mixture of the two distributions."""

import jax.numpy as jnp

from kd_jax.divergences.shared import LogProbs, PerToken, refuse_zero
from kd_jax.logspace import Weight, mixture_kl_entries, over_vocab, weigh
from kd_jax.resolve import check_fraction

__all__ = ["jensen_shannon", "skew_forward_kl", "skew_reverse_kl"]


def jensen_shannon(log_p: LogProbs, log_q: LogProbs, *, weight: Weight = 0.5) -> PerToken:
    """Returns ``w KL(p || m) + (1 - w) KL(q || m)`` with ``m = w p + (1 - w) q``.

    The value is always finite, and is bounded by the entropy of ``(w, 1 - w)``. Divided by w, the value tends to
    ``KL(p || q)`` as w tends to 0. Divided by 1 - w, the value tends to ``KL(q || p)`` as w tends to 1. At w = 0 and
    w = 1 the value is 0 for all distributions, so these Python numbers are refused.

    Args:
      weight: w, the teacher's share of the mixture, in ``(0, 1)``.

    Returns:
      Nats per token, between 0 and ``-w log w - (1 - w) log(1 - w)``.

    Raises:
      ValueError: if ``weight`` is a Python number outside ``(0, 1)``.

    Example:
      >>> p, q = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
      >>> round(float(jensen_shannon(jnp.log(p), jnp.log(q))), 4)  # log 2
      0.6931

    References:
      Agarwal et al., `On-Policy Distillation of Language Models <https://arxiv.org/abs/2306.13649>`_, 2024.
    """
    w = check_fraction("weight", weight)
    refuse_zero("weight", w, (0.0, 1.0), "Use forward_kl for the limit at 0, and reverse_kl for the limit at 1")
    of_p, of_q = mixture_kl_entries(log_p, log_q, w)
    w = over_vocab(w)
    return jnp.sum(weigh(w, of_p) + weigh(1 - w, of_q), axis=-1)


def skew_forward_kl(log_p: LogProbs, log_q: LogProbs, *, skew: Weight = 0.1) -> PerToken:
    """Returns ``KL(p || s p + (1 - s) q)``.

    The share of p gives the second distribution a lower bound. The value therefore never exceeds ``-log s``, and the
    gradients are bounded.

    Args:
      skew: s, in ``[0, 1)``; 0 is forward KL.

    Returns:
      Nats per token, between 0 and ``-log s``.

    Raises:
      ValueError: if ``skew`` is a Python number outside ``[0, 1)``.

    Example:
      >>> p, q = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
      >>> round(float(skew_forward_kl(jnp.log(p), jnp.log(q))), 4)  # -log 0.1
      2.3026

    References:
      Ko et al., `DistiLLM <https://arxiv.org/abs/2402.03898>`_, 2024.
    """
    s = check_fraction("skew", skew)
    refuse_zero("skew", s, (1.0,), "Use a skew below 1; a skew of 0 gives forward_kl or reverse_kl")
    return jnp.sum(mixture_kl_entries(log_p, log_q, s)[0], axis=-1)


def skew_reverse_kl(log_p: LogProbs, log_q: LogProbs, *, skew: Weight = 0.1) -> PerToken:
    """Returns ``KL(q || s q + (1 - s) p)``.

    The share of q gives the second distribution a lower bound. The value therefore stays finite where the student has
    mass and the teacher has none.

    Args:
      skew: s, in ``[0, 1)``; 0 is reverse KL.

    Returns:
      Nats per token, between 0 and ``-log s``.

    Raises:
      ValueError: if ``skew`` is a Python number outside ``[0, 1)``.

    Example:
      >>> p, q = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
      >>> round(float(skew_reverse_kl(jnp.log(p), jnp.log(q))), 4)  # -log 0.1
      2.3026

    References:
      Ko et al., `DistiLLM <https://arxiv.org/abs/2402.03898>`_, 2024.
    """
    return skew_forward_kl(log_q, log_p, skew=skew)
