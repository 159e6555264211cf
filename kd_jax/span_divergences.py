"""Divergences of a span's likelihoods under two models: ``D(log_p, log_q, *, ...)``, a value per span.

A span is a piece of text, and ``log_p`` and ``log_q`` are the log-likelihoods of the whole span under the teacher and
under the student, at most 0. Teacher and student may have different tokenizers. The binary divergences compare two
outcomes: the span, and anything else. Probabilities of long spans are nearly 0, so likelihoods are first raised to the
power ``1 / temperature``.

References:
  Minixhofer et al., "Universal Cross-Tokenizer Distillation via Approximate Likelihood Matching",
  https://arxiv.org/abs/2503.20083, 2025, equation 3.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from kd_jax.resolve import check_number

__all__ = ["absolute_difference", "binary_cross_entropy", "binary_kl", "poisson_kl", "reverse_binary_kl"]

PerSpan = Float[Array, "*spans"]
# Subtracted from each log-likelihood, so that the probability of anything else is never 0. The published code has 1e-6.
MARGIN = 1e-6


def binary_kl(log_p: PerSpan, log_q: PerSpan, *, temperature: float = 100.0) -> PerSpan:
    """Returns ``y log(y/x) + (1 - y) log((1 - y)/(1 - x))`` with ``y = p^(1/T)`` and ``x = q^(1/T)``.

    Args:
      log_p, log_q: the log-likelihoods of a span.
      temperature: T, above 0.

    Example:
      >>> round(float(binary_kl(jnp.log(jnp.array(0.5)), jnp.log(jnp.array(0.25)), temperature=1.0)), 4)
      0.1438
    """
    return _cross_entropy(log_p, log_q, temperature) - _cross_entropy(log_p, log_p, temperature)


def reverse_binary_kl(log_p: PerSpan, log_q: PerSpan, *, temperature: float = 100.0) -> PerSpan:
    """Returns `binary_kl` with teacher and student exchanged.

    Example:
      >>> round(float(reverse_binary_kl(jnp.log(jnp.array(0.5)), jnp.log(jnp.array(0.25)), temperature=1.0)), 4)
      0.1308
    """
    return binary_kl(log_q, log_p, temperature=temperature)


def binary_cross_entropy(log_p: PerSpan, log_q: PerSpan, *, temperature: float = 100.0) -> PerSpan:
    """Returns ``-y log x - (1 - y) log(1 - x)``, which is `binary_kl` plus the teacher's entropy.

    Example:
      >>> round(float(binary_cross_entropy(jnp.log(jnp.array(0.5)), jnp.log(jnp.array(0.25)), temperature=1.0)), 4)
      0.837
    """
    return _cross_entropy(log_p, log_q, temperature)


def poisson_kl(log_p: PerSpan, log_q: PerSpan) -> PerSpan:
    """Returns ``log p - log q + log p log(log q / log p)``, the limit of ``T binary_kl`` for large temperatures T.

    The value is the KL of two Poisson distributions with the means ``-log p`` and ``-log q``.

    Example:
      >>> round(float(poisson_kl(jnp.array(-1.0), jnp.array(-2.0))), 4)
      0.3069
    """
    a, b = log_p - MARGIN, log_q - MARGIN
    return a - b + a * (jnp.log(-b) - jnp.log(-a))


def absolute_difference(log_p: PerSpan, log_q: PerSpan) -> PerSpan:
    """Returns ``|log p - log q|``.

    Example:
      >>> float(absolute_difference(jnp.array(-1.0), jnp.array(-3.0)))
      2.0
    """
    return jnp.abs(log_p - log_q)


def _cross_entropy(log_p: PerSpan, log_q: PerSpan, temperature: float) -> PerSpan:
    check_number("temperature", temperature, 1e-6)
    log_y, log_x = log_p / temperature - MARGIN, log_q / temperature - MARGIN
    # expm1 keeps the probability of anything else accurate where the likelihood of the span is nearly 1.
    return -jnp.exp(log_y) * log_x + jnp.expm1(log_y) * jnp.log(-jnp.expm1(log_x))
