"""Arithmetic on log-probabilities that stays finite, in value and gradient, where there is no mass.

No mass is a log-probability of ``-inf``. Two rules keep such an entry from poisoning the rest: the difference
of two of them is never formed, and what a ``where`` does not select is computed from finite stand-ins, since
its gradient is multiplied by zero and not left out (``alpha_beta_entries``, whose slopes are given, needs only the first).
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from kd_jax.resolve import Number

Weight = Float[Array, "*batch"] | Float[Array, ""] | Number  # one a token, or one for all


def promote(*arrays: Float[Array, "..."]) -> tuple[Array, ...]:
    """The arrays in one floating type, float32 at the least: bfloat16 keeps two digits of a log-probability.

    Example:
      >>> [x.dtype.name for x in promote(jnp.zeros(2, jnp.bfloat16), jnp.zeros(2, jnp.float16))]
      ['float32', 'float32']
    """
    dtype = jnp.result_type(jnp.float32, *(x.dtype for x in arrays))
    return tuple(x.astype(dtype) for x in arrays)


def has_mass(log_p: Float[Array, "*shape"]) -> Array:
    """True where the probability is not exactly zero. It may be far below what ``exp`` can represent."""
    return log_p > -jnp.inf


def over_vocab(weight: Weight) -> Float[Array, "*batch 1"] | Float[Array, ""] | Number:
    """A weight per token (or one for all) in the shape that multiplies log-probabilities."""
    return weight[..., None] if isinstance(weight, jax.Array) and weight.ndim else weight


def weigh(weight: Float[Array, "..."] | Number, value: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """``weight * value``, and 0 for a weight of 0 even where the value is infinite.

    Example:
      >>> float(weigh(0.0, jnp.array(jnp.inf)))
      0.0
    """
    return jnp.where(weight == 0, 0.0, weight * jnp.where(weight == 0, 0.0, value))


def log_mix(
    log_p: Float[Array, "*batch vocab"],
    log_q: Float[Array, "*batch vocab"],
    weight: Weight,
) -> Float[Array, "*batch vocab"]:
    """``log(w p + (1 - w) q)``: exactly ``log_q`` at ``w = 0`` and ``log_p`` at 1, gradients included.

    ``jnp.logaddexp`` gives the same values, but a gradient of NaN where neither has mass.

    Args:
      log_p: log-probabilities, normalised over the last axis.
      log_q: as ``log_p``.
      weight: the share of ``p``, one number or one a token.

    Returns:
      Log-probabilities, normalised over the last axis.

    Example:
      >>> p, q = jnp.array([0.5, 0.5, 0.0]), jnp.array([0.9, 0.1, 0.0])
      >>> jnp.exp(log_mix(jnp.log(p), jnp.log(q), 0.25)).round(3).tolist()
      [0.800000011920929, 0.20000000298023224, 0.0]
    """
    log_p, log_q = promote(log_p, log_q)
    weight = jnp.asarray(over_vocab(weight), log_p.dtype)
    x, y = jnp.log(weight) + log_p, jnp.log1p(-weight) + log_q
    alive = has_mass(x) | has_mass(y)
    high, low = jnp.where(alive, jnp.maximum(x, y), 0.0), jnp.where(alive, jnp.minimum(x, y), 0.0)
    return jnp.where(alive, high + jnp.log1p(jnp.exp(low - high)), -jnp.inf)


def log_decay_mix(
    distance: Float[Array, "*shape"], weight: Float[Array, "*shape"], decaying: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """``log(v + w exp(-x))`` for weights ``v + w = 1``: exact where x is small, and where v is.

    Args:
      distance: x, not negative.
      weight: v, of what stays.
      decaying: w, of what decays; given, since ``1 - v`` would lose a small w.

    Returns:
      The logarithm, between ``-x`` and 0.

    Example:
      >>> [f"{log_decay_mix(*map(jnp.float32, case)):.3e}" for case in ((1e-6, 0.5, 0.5), (60.0, 1e-20, 1.0))]
      ['-5.000e-07', '-4.605e+01']
    """
    near = distance < 1  # the sum is not below 1/e, so that log1p is exact; from here on two logarithms are
    stays, decays = jnp.log(weight), jnp.log(decaying) - distance
    ratio = jnp.exp(-jnp.abs(stays - decays))
    addend = jnp.where(near, decaying * jnp.expm1(-jnp.where(near, distance, 0.0)), ratio)
    return jnp.log1p(addend) + jnp.where(near, 0.0, jnp.maximum(stays, decays))


def decay_integral(distance: Float[Array, "*shape"], rate: Number) -> Float[Array, "*shape"]:
    """The integral of ``exp(-rate t)`` over ``0 < t < x``: ``(1 - exp(-rate x)) / rate``, and x at rate 0.

    Args:
      distance: x, not negative.
      rate: a Python number, not negative.

    Returns:
      The integral; at most x, and at most ``1 / rate``.

    Example:
      >>> [float(decay_integral(jnp.array(2.0), rate)) for rate in (0.0, 1e-9)]
      [2.0, 2.0]
    """
    # Below this rate the two differ by less than rounding for any distance that occurs.
    return distance if rate < 1e-20 else -jnp.expm1(-rate * distance) / rate


def exp_curvature(u: Float[Array, "*shape"], v: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The second divided difference of ``exp`` at ``0, u, v``, by its series, for ``-1 <= u, v <= 0``.

    ``sum_k h_k(u, v) / (k + 2)!``, where ``h_k`` is the sum of all monomials of degree k. It is
    ``((exp(v) - 1) / v - (exp(u) - 1) / u) / (v - u)`` without the cancellation.

    Example:
      >>> float(exp_curvature(jnp.array(0.0), jnp.array(0.0)))
      0.5
    """
    terms = 17 if u.dtype == jnp.float64 else 10  # what is left out is below rounding
    power = monomials = jnp.ones_like(u)
    total = 0.5 * monomials
    for k in range(1, terms + 1):
        power = power * v
        monomials = monomials * u + power
        total = total + monomials / math.factorial(k + 2)
    return total


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def alpha_beta_entries(
    log_p: Float[Array, "*shape"], log_q: Float[Array, "*shape"], alpha: Number, beta: Number
) -> Float[Array, "*shape"]:
    """Each entry's share of the alpha-beta divergence of ``kd_jax.divergences``, with its limits.

    The definition has three powers, ``q^s``, ``p^alpha q^beta`` and ``p^s`` with ``s = alpha + beta``. With
    ``d = log p - log q`` its summand is ``d^2`` times the second divided difference of exp at their
    exponents, which are 0, ``alpha d`` and ``s d`` above ``s log q``. So it is smooth in alpha and beta, and
    the limits are nothing but exponents that coincide. One exponent always lies between the others, ``up d``
    below the one and ``down d`` above the other, where up and down have one sign. Seen from the highest,
    whose exp is drawn out, all that is left are decay integrals of ``|d|``, which neither overflow nor divide
    by zero. The derivatives are first divided differences, of exponents that are ``beta d`` and ``alpha d``
    apart; given here, they are as stable as the value, and cheaper than differentiating all of this.

    Args:
      log_p: log-probabilities.
      log_q: log-probabilities.
      alpha: the exponent of p, a Python number.
      beta: the exponent of q, a Python number.

    Returns:
      What to sum over the vocabulary. Infinite, without gradient, where one has no mass and its power
      diverges.

    References:
      Cichocki et al., `Generalized Alpha-Beta Divergences <https://doi.org/10.3390/e13010134>`_, 2011.
    """
    log_p, log_q = promote(log_p, log_q)
    has_p, has_q = has_mass(log_p), has_mass(log_q)
    total, d = alpha + beta, _log_ratio(log_p, log_q)
    mixed = _mixed_exponent(log_p, log_q, d, alpha, beta)
    exponent_p, exponent_q = _times(total, log_p), _times(total, log_q)
    widest = max(abs(alpha), abs(beta), abs(total))
    if abs(total) == widest:
        up, down = beta, alpha
    elif abs(beta) == widest:
        up, down, exponent_q = total, -alpha, mixed
    else:
        up, down, exponent_p = -beta, total, mixed
    if up + down < 0:  # both are negative: the same three points from the other side
        up, down, exponent_p, exponent_q = -down, -up, exponent_q, exponent_p

    top = _power(jnp.maximum(exponent_p, exponent_q), d, total)
    first_is_up, x = d > 0, _magnitude(d)
    rate = jnp.where(first_is_up, up, down)
    integral_up, integral_down = decay_integral(x, up), decay_integral(x, down)
    first = jnp.where(first_is_up, integral_up, integral_down)
    second = jnp.where(first_is_up, integral_down, integral_up)
    curve = first - (1 - rate * first) * second
    if widest < 0.25:
        # Near (0, 0) nearly all of the difference cancels, and the division multiplies its rounding.
        near = widest * x < 1
        small = jnp.where(near, x, 0.0)
        series = small**2 * exp_curvature(-rate * small, -widest * small)
        curve = jnp.where(near, series, curve / max(widest, 1e-20))
    else:
        curve = curve / widest

    # What 0 adds in the place of p, or of q; a factor beyond this is beyond float32 as well.
    missing_p = top / (alpha * total) if _finite_at_0(alpha, total) else jnp.inf
    missing_q = top / (beta * total) if _finite_at_0(beta, total) else jnp.inf
    alone = jnp.where(has_p, missing_q, jnp.where(has_q, missing_p, 0.0))
    return jnp.where(has_p & has_q, top * curve, alone)


@partial(alpha_beta_entries.defjvp, symbolic_zeros=True)
def _alpha_beta_entries_jvp(
    alpha: Number, beta: Number, primals: tuple[Array, Array], tangents: tuple[Any, Any]
) -> tuple[Array, Any]:
    log_p, log_q = promote(*primals)
    total, d = alpha + beta, _log_ratio(log_p, log_q)
    mixed = _mixed_exponent(log_p, log_q, d, alpha, beta)

    sign = jnp.where(d >= 0, 1.0, -1.0)  # at 0 too: there the slope is 0, and its own slope is not

    def slope(by: Array, other: Array, of_other: Number, sign: Array) -> Array:
        top = _power(jnp.maximum(_times(total, by), mixed), d, total)
        alone = top / of_other if _finite_at_0(of_other, total) else 0.0
        both = sign * top * decay_integral(_magnitude(d), abs(of_other))
        return jnp.where(has_mass(by), jnp.where(has_mass(other), both, alone), 0.0)

    of_p, of_q = tangents
    by_p = 0.0 if isinstance(of_p, SymbolicZero) else slope(log_p, log_q, beta, sign) * of_p
    by_q = 0.0 if isinstance(of_q, SymbolicZero) else slope(log_q, log_p, alpha, -sign) * of_q
    return alpha_beta_entries(*primals, alpha, beta), jnp.zeros_like(d) + by_p + by_q


def _log_ratio(log_p: Array, log_q: Array) -> Array:
    """``log p - log q``, and 0 where one has no mass."""
    has_p, has_q = has_mass(log_p), has_mass(log_q)
    return jnp.where(has_p & has_q, log_p - jnp.where(has_q, log_q, 0.0), 0.0)


def _magnitude(d: Array) -> Array:
    """``|d|``, with slope 1 at 0 and not 0: the slopes given above are products with a sign that is 1 there, too."""
    return jnp.where(d >= 0, d, -d)


def _mixed_exponent(log_p: Array, log_q: Array, d: Array, alpha: Number, beta: Number) -> Array:
    """``alpha log p + beta log q`` from the larger of the two, so that it is no difference of two that are infinite."""
    if alpha == 0 or beta == 0:
        return _times(beta, log_q) if alpha == 0 else alpha * log_p
    return _times(alpha + beta, jnp.maximum(log_p, log_q)) - jnp.where(d > 0, beta, -alpha) * d


def _times(factor: Number, log_p: Array) -> Array:
    return factor * log_p if factor != 0 else jnp.zeros_like(log_p)  # 0 times no mass would be NaN


def _power(exponent: Array, d: Array, total: Number) -> Array:
    """exp of it; for a negative total it overflows at a small probability, and where p == q it is to be multiplied by 0."""
    return jnp.exp(jnp.where(d == 0, jnp.minimum(exponent, 80.0), exponent) if total < 0 else exponent)


def _finite_at_0(exponent: Number, total: Number) -> bool:
    return exponent > 0 and exponent * total > 1e-30


def mixture_kl_entries(
    log_p: Float[Array, "*batch vocab"],
    log_q: Float[Array, "*batch vocab"],
    weight: Weight,
) -> tuple[Float[Array, "*batch vocab"], Float[Array, "*batch vocab"]]:
    """Each entry's share of ``KL(p || m)`` and ``KL(q || m)``, ``m = w p + (1 - w) q``; neither is negative.

    ``m - p``, or ``m - q``, is added to each: it sums to 0, and leaves a difference of second order in
    ``log p - log q`` where the two are close. All is the greater of p and q times a function of their ratio.
    The relative rounding grows as the lesser of w and 1 - w tends to 0, with its inverse.

    Args:
      log_p: log-probabilities, normalised over the last axis.
      log_q: as ``log_p``.
      weight: w, one number or one a token; as a Python number it saves a logarithm unless it is near 0 or 1.

    Returns:
      What to sum over the vocabulary, for p and for q. Infinite, without gradient, where m has no mass.
    """
    log_p, log_q = promote(log_p, log_q)
    weight = over_vocab(weight)
    has_p, has_q = has_mass(log_p), has_mass(log_q)
    both, p_greater = has_p & has_q, log_p > log_q
    w_greater, w_lesser = jnp.where(p_greater, weight, 1 - weight), jnp.where(p_greater, 1 - weight, weight)

    greater = jnp.exp(jnp.maximum(log_p, log_q))
    x = jnp.abs(jnp.where(both, log_p, 0.0) - jnp.where(both, log_q, 0.0))
    lesser_less_1 = jnp.where(both, jnp.expm1(-x), -1.0)  # as a multiple of the greater
    m_less_1 = w_lesser * lesser_less_1
    infinite = (has_p ^ has_q) & (w_greater == 0)  # m has no mass where the greater has
    if isinstance(weight, float) and 0.05 < weight < 0.95:
        log_m = jnp.log1p(m_less_1)
    else:  # 1 + m_less_1 may be near 0 and all rounding
        alone = jnp.log(jnp.where(w_greater > 0, w_greater, 1.0))
        log_m = jnp.where(both, log_decay_mix(x, w_greater, w_lesser), alone)
    of_greater = jnp.where(infinite, jnp.inf, greater * (m_less_1 - log_m))
    of_lesser = greater * (-w_greater * lesser_less_1 - (1 + lesser_less_1) * (x + log_m))
    return jnp.where(p_greater, of_greater, of_lesser), jnp.where(p_greater, of_lesser, of_greater)
