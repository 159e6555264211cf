"""Assistants: distributions on a path from one model's distribution to another's, such as the student's to the teacher's.

Each assistant is a function ``r(log_p, log_q, weight, ...)`` that returns ``log_r``. ``log_p`` are the teacher's
log-probabilities and ``log_q`` the student's. All three are normalised over the last axis, the vocabulary.

``weight`` is the teacher's weight, one number or one number per token, traced or not. Weight 0 gives exactly ``log_q``,
and weight 1 exactly ``log_p``. At these two weights the gradient flows only to the distribution that is returned. A
Python number outside ``[0, 1]`` raises a ValueError, except in `extrapolation`.

`AMONG` has, for three of these functions, the form for several distributions with a weight each.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kd_jax.logspace import Weight, has_mass, log_decay_mix, log_mix, over_vocab, promote
from kd_jax.resolve import check_fraction, check_number

__all__ = ["alpha_mixture", "arithmetic_mixture", "extrapolation", "geometric_mixture"]


def arithmetic_mixture(
    log_p: Float[Array, "*batch vocab"],
    log_q: Float[Array, "*batch vocab"],
    weight: Weight,
) -> Float[Array, "*batch vocab"]:
    """Returns the log-probabilities of ``r = w p + (1 - w) q``, the assistant of GKD and DistiLLM.

    The assistant has mass wherever p or q has mass, so ``KL(p || r)`` and ``KL(q || r)`` stay finite.

    Args:
      log_p: the teacher's log-probabilities, normalised.
      log_q: the student's log-probabilities, normalised.
      weight: the teacher's weight w, in ``[0, 1]``.

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
    """Returns the log-probabilities of ``r ∝ p^w q^(1 - w)``, the assistant of TAID.

    The assistant is the softmax of the interpolated logits. For a weight strictly between 0 and 1 it has mass only
    where both p and q have mass. If p and q share no token with mass, the distribution does not exist, and the result
    is NaN.

    Args:
      log_p: the teacher's log-probabilities, normalised.
      log_q: the student's log-probabilities, normalised.
      weight: the teacher's weight w, in ``[0, 1]``.

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


def extrapolation(
    log_p: Float[Array, "*batch vocab"],
    log_q: Float[Array, "*batch vocab"],
    weight: Weight,
) -> Float[Array, "*batch vocab"]:
    """Returns the log-probabilities of ``r ∝ p^w q^(1 - w)`` for any w: above 1, beyond p as seen from q.

    With q the model from which the teacher was trained, a weight above 1 amplifies what the training changed. Between 0
    and 1, the function equals `geometric_mixture`. Except at 0 and 1, the assistant has mass only where both p and q
    have mass.

    Args:
      log_p: the log-probabilities at weight 1, normalised.
      log_q: the log-probabilities at weight 0, normalised.
      weight: w, any finite number.

    Returns:
      ``log r``, normalised.

    Raises:
      ValueError: if ``weight`` is a Python number that is not finite.

    Example:
      >>> log_p, log_q = jnp.log(jnp.array([0.8, 0.2])), jnp.log(jnp.array([0.5, 0.5]))
      >>> [round(float(r), 3) for r in jnp.exp(extrapolation(log_p, log_q, 2.0))]
      [0.941, 0.059]

    References:
      `G-OPD <https://arxiv.org/abs/2602.12125>`_, 2026; `AlignDistil <https://arxiv.org/abs/2503.02832>`_, 2025.
    """
    log_p, log_q = promote(log_p, log_q)
    weight = weight if isinstance(weight, jax.Array | np.ndarray) else check_number("weight", weight)
    w = jnp.asarray(over_vocab(weight), log_p.dtype)
    return _on_path(log_p, log_q, w, _weighted_logs((log_p, log_q), (w, 1 - w)))


def alpha_mixture(
    log_p: Float[Array, "*batch vocab"],
    log_q: Float[Array, "*batch vocab"],
    weight: Weight,
    *,
    alpha: Weight,
) -> Float[Array, "*batch vocab"]:
    """Returns the log-probabilities of ``r ∝ (w p^c + (1 - w) q^c)^(1/c)``, AMiD's assistant.

    The exponent is ``c = (1 - alpha) / 2``, for every real alpha.

    The family contains the arithmetic mixture (alpha -1), the geometric mixture (1) and the harmonic mixture (3).
    As alpha tends to -inf, the mean tends to the larger of the two probabilities; as alpha tends to +inf, to the
    smaller. For alpha below 1 the assistant has mass where p or q has mass. For alpha of 1 or more the assistant has
    mass only where both have mass. The result is continuous in alpha, and accurate near alpha 1.

    Args:
      log_p: the teacher's log-probabilities, normalised.
      log_q: the student's log-probabilities, normalised.
      weight: the teacher's weight w, in ``[0, 1]``.
      alpha: the kind of mean: any finite number, or an array like `weight`, such as the value of a schedule.

    Returns:
      ``log r``, normalised.

    Raises:
      ValueError: if ``weight`` is a Python number outside ``[0, 1]``, or ``alpha`` is not a finite number.

    Example:
      >>> log_p, log_q = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.9, 0.1]))
      >>> [round(float(r), 3) for r in jnp.exp(alpha_mixture(log_p, log_q, 0.5, alpha=3.0))]
      [0.794, 0.206]

    References:
      Shin et al., `AMiD <https://arxiv.org/abs/2510.15982>`_, 2025.
    """
    c = _power(alpha)
    if isinstance(c, float) and abs(c) < 1e-20:
        return geometric_mixture(log_p, log_q, weight)
    log_p, log_q = promote(log_p, log_q)
    if not isinstance(c, float):  # at c = 1e-20 the mixture equals the geometric mixture up to rounding
        c = jnp.asarray(over_vocab(c), log_p.dtype)
        c = jnp.where(jnp.abs(c) < 1e-20, 1e-20, c)
    weight = jnp.asarray(over_vocab(check_fraction("weight", weight)), log_p.dtype)

    # With the larger of the two powers factored out, log r is the log-probability of that term plus
    # log(w_out + w_in exp(-x)) / c,  x = |c (log p - log q)|.
    any_mass = has_mass(log_p) | has_mass(log_q)
    power_gap = c * (jnp.where(any_mass, log_p, 0.0) - jnp.where(any_mass, log_q, 0.0))
    x = jnp.abs(power_gap)
    teacher_out = power_gap > 0
    inside = _inside(weight)
    w_out, w_in = jnp.where(teacher_out, inside, 1 - inside), jnp.where(teacher_out, 1 - inside, inside)
    if isinstance(c, float) and abs(c) > 0.125:
        log_sum = jnp.log(w_out + w_in * jnp.exp(-x))
    else:  # the sum is near 1 where x is small, and the division by c would amplify the rounding error of the sum
        log_sum = log_decay_mix(x, w_out, w_in)
    return _on_path(log_p, log_q, weight, jnp.where(teacher_out, log_p, log_q) + log_sum / c)


def _arithmetic_among(log_probs: Sequence[Array], weights: Sequence[Weight]) -> Array:
    """Returns ``log sum_i w_i p_i``, for weights that are not negative and sum to 1."""
    logs = jnp.stack(
        [log_p + jnp.log(jnp.asarray(w, log_p.dtype)) for log_p, w in zip(log_probs, weights, strict=True)]
    )
    greatest = jax.lax.stop_gradient(jnp.max(logs, axis=0))
    shift = jnp.where(greatest != -jnp.inf, greatest, 0)
    total = jnp.sum(jnp.where(logs != -jnp.inf, jnp.exp(jnp.where(logs != -jnp.inf, logs - shift, 0)), 0), axis=0)
    return jnp.where(total > 0, jnp.log(jnp.where(total > 0, total, 1)) + shift, -jnp.inf)


def _geometric_among(log_probs: Sequence[Array], weights: Sequence[Weight]) -> Array:
    """Returns the log-probabilities of ``r ∝ prod_i p_i^(w_i)``, which has mass only where all p_i have mass."""
    return jax.nn.log_softmax(_weighted_logs(log_probs, weights), axis=-1)


def _weighted_logs(log_probs: Sequence[Array], weights: Sequence[Weight]) -> Array:
    """Returns ``sum_i w_i log p_i``, and ``-inf`` where one of the distributions has no mass."""
    all_mass = functools.reduce(jnp.logical_and, map(has_mass, log_probs))
    finite = [jnp.where(all_mass, log_p, 0) for log_p in log_probs]
    total = sum(w * log_p for w, log_p in zip(weights, finite, strict=True))
    return jnp.where(all_mass, total, -jnp.inf)


# The assistants among several distributions: (log-probabilities, weights) -> log-probabilities.
AMONG = {
    arithmetic_mixture: _arithmetic_among, geometric_mixture: _geometric_among, extrapolation: _geometric_among
}  # fmt: skip


def _power(alpha: Weight) -> float | Array:
    """Returns the exponent c of alpha. The result is a float if alpha is a Python number, which is checked."""
    return (1 - (alpha if isinstance(alpha, jax.Array | np.ndarray) else check_number("alpha", alpha))) / 2


def _inside(weight: Array) -> Array:
    """Returns the weight with 0 and 1 replaced by 0.5, because 0 * -inf would be NaN."""
    return jnp.where((weight == 0) | (weight == 1), 0.5, weight)


def _on_path(log_p: Array, log_q: Array, weight: Array, unnormalised: Array) -> Array:
    """Returns the normalised mixture for weights strictly between 0 and 1, and ``log_q`` or ``log_p`` at 0 or 1."""
    at_q, at_p = weight == 0, weight == 1
    # At weight 0 or 1 the softmax is not selected, but the gradient of the softmax must be finite. In a row without
    # mass this gradient would be NaN, so the softmax gets log_q instead.
    log_r = jax.nn.log_softmax(jnp.where(at_q | at_p, log_q, unnormalised), axis=-1)
    return jnp.where(at_q, log_q, jnp.where(at_p, log_p, log_r))
