"""Assistants: distributions on a path from the student's to the teacher's.

Each is ``r(log_p, log_q, weight) -> log_r``, all normalised over the last axis, the vocabulary. ``weight`` is
the teacher's, one number or one a token, traced or not: 0 gives exactly ``log_q`` and 1 exactly ``log_p``,
and at these ends the gradient flows to that one alone. A Python number outside ``[0, 1]`` is a ValueError.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kd_jax.logspace import Weight, has_mass, log_decay_mix, log_mix, over_vocab, promote
from kd_jax.resolve import check_fraction, check_number

__all__ = ["alpha_mixture", "arithmetic_mixture", "geometric_mixture"]


def arithmetic_mixture(
    log_p: Float[Array, "*batch vocab"],
    log_q: Float[Array, "*batch vocab"],
    weight: Weight,
) -> Float[Array, "*batch vocab"]:
    """``r = w p + (1 - w) q``, the assistant of GKD and DistiLLM.

    It has mass wherever either of the two has, so that a divergence from it to either stays finite.

    Args:
      log_p: the teacher's log-probabilities, normalised.
      log_q: the student's, normalised.
      weight: the teacher's weight, in ``[0, 1]``.

    Returns:
      ``log r``, normalised.

    Raises:
      ValueError: if ``weight`` is a Python number outside ``[0, 1]``.

    Example:
      >>> log_p, log_q = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.9, 0.1]))
      >>> [round(float(r), 3) for r in jnp.exp(arithmetic_mixture(log_p, log_q, 0.5))]
      [0.7, 0.3]

    References:
      Agarwal et al., `On-Policy Distillation of Language Models <https://arxiv.org/abs/2306.13649>`_, 2024;
      Ko et al., `DistiLLM <https://arxiv.org/abs/2402.03898>`_, 2024.
    """
    return log_mix(log_p, log_q, check_fraction("weight", weight))


def geometric_mixture(
    log_p: Float[Array, "*batch vocab"],
    log_q: Float[Array, "*batch vocab"],
    weight: Weight,
) -> Float[Array, "*batch vocab"]:
    """``r ∝ p^w q^(1 - w)``: the softmax of interpolated logits, the assistant of TAID.

    Strictly between the ends it has mass only where both have; where they share no support there is no such
    distribution, and the result is NaN.

    Args:
      log_p: the teacher's log-probabilities, normalised.
      log_q: the student's, normalised.
      weight: the teacher's weight, in ``[0, 1]``.

    Returns:
      ``log r``, normalised.

    Raises:
      ValueError: if ``weight`` is a Python number outside ``[0, 1]``.

    Example:
      >>> log_p, log_q = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.9, 0.1]))
      >>> [round(float(r), 3) for r in jnp.exp(geometric_mixture(log_p, log_q, 0.5))]
      [0.75, 0.25]

    References:
      Shing et al., `TAID <https://arxiv.org/abs/2501.16937>`_, 2025.
    """
    log_p, log_q = promote(log_p, log_q)
    weight = jnp.asarray(over_vocab(check_fraction("weight", weight)), log_p.dtype)
    inside = _inside(weight)
    return _on_path(log_p, log_q, weight, inside * log_p + (1 - inside) * log_q)


def alpha_mixture(
    log_p: Float[Array, "*batch vocab"],
    log_q: Float[Array, "*batch vocab"],
    weight: Weight,
    *,
    alpha: Weight,
) -> Float[Array, "*batch vocab"]:
    """``r ∝ (w p^c + (1 - w) q^c)^(1/c)``, ``c = (1 - alpha) / 2``, for every real alpha: AMiD's assistant.

    One family for the others: -1 is the arithmetic mixture, 1 the geometric, 3 the harmonic; towards -inf it
    is the larger of the two probabilities, towards +inf the smaller. Below 1 it has mass where either has,
    from 1 on where both have. It is continuous in alpha and accurate through 1.

    Args:
      log_p: the teacher's log-probabilities, normalised.
      log_q: the student's, normalised.
      weight: the teacher's weight, in ``[0, 1]``.
      alpha: which mean: any finite number, or, as a schedule gives it, an array like `weight`.

    Returns:
      ``log r``, normalised.

    Raises:
      ValueError: if ``weight`` is a Python number outside ``[0, 1]``, or ``alpha`` not a finite number.

    Example:
      >>> log_p, log_q = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.9, 0.1]))
      >>> [round(float(r), 3) for r in jnp.exp(alpha_mixture(log_p, log_q, 0.5, alpha=3.0))]
      [0.794, 0.206]

    References:
      Shin et al., `AMiD <https://arxiv.org/abs/2510.15982>`_, 2025.
    """
    c: Any = _power(alpha)
    if isinstance(c, float) and abs(c) < 1e-20:
        return geometric_mixture(log_p, log_q, weight)
    log_p, log_q = promote(log_p, log_q)
    if not isinstance(c, float):  # so near to 0 the difference from the geometric mean is below rounding
        c = jnp.asarray(over_vocab(c), log_p.dtype)
        c = jnp.where(jnp.abs(c) < 1e-20, 1e-20, c)
    weight = jnp.asarray(over_vocab(check_fraction("weight", weight)), log_p.dtype)

    # With the term of larger power drawn out, log r is its log-probability plus
    # log(w_out + w_in exp(-x)) / c,  x = |c (log p - log q)|.
    alive = has_mass(log_p) | has_mass(log_q)
    power_gap = c * (jnp.where(alive, log_p, 0.0) - jnp.where(alive, log_q, 0.0))
    x = jnp.abs(power_gap)
    teacher_out = power_gap > 0
    inside = _inside(weight)
    w_out, w_in = jnp.where(teacher_out, inside, 1 - inside), jnp.where(teacher_out, 1 - inside, inside)
    if isinstance(c, float) and abs(c) > 0.125:
        log_sum = jnp.log(w_out + w_in * jnp.exp(-x))
    else:  # dividing by c would multiply the rounding of that sum, which is near 1 where x is small
        log_sum = log_decay_mix(x, w_out, w_in)
    return _on_path(log_p, log_q, weight, jnp.where(teacher_out, log_p, log_q) + log_sum / c)


def _power(alpha: Any) -> Any:
    """c of a checked alpha, a float if that is a Python number."""
    return (1 - (alpha if isinstance(alpha, jax.Array | np.ndarray) else check_number("alpha", alpha))) / 2


def _inside(weight: Array) -> Array:
    """The weight, and in place of an end any that is none: 0 times no mass would be NaN."""
    return jnp.where((weight == 0) | (weight == 1), 0.5, weight)


def _on_path(log_p: Array, log_q: Array, weight: Array, unnormalised: Array) -> Array:
    """Normalises what lies strictly between, and takes the ends as they are."""
    at_q, at_p = weight == 0, weight == 1
    # At an end the softmax is not selected, but it must have a gradient, which that of no mass at all has
    # not.
    log_r = jax.nn.log_softmax(jnp.where(at_q | at_p, log_q, unnormalised), axis=-1)
    return jnp.where(at_q, log_q, jnp.where(at_p, log_p, log_r))
