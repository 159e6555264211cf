"""Arithmetic on log-probabilities whose values and gradients stay finite where a probability is zero.

A probability of zero is a log-probability of ``-inf``. This package calls such an entry an entry without mass. Two
rules keep such an entry from making other entries NaN.

1. The difference of two infinite log-probabilities is never computed.
2. The branch that a ``where`` does not select is computed from finite replacement values. JAX multiplies the gradient
   of that branch by zero, and zero times infinity is NaN.

``alpha_beta_entries`` defines its own derivatives, so only the first rule applies there.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

Number = float | int  # for a type checker float includes int, at run time it does not
Weight = Float[Array, "*batch"] | Float[Array, ""] | Number  # one number per token, or one for all tokens


def promote(*arrays: Float[Array, "..."]) -> tuple[Array, ...]:
    """Casts the arrays to one floating type, which is at least float32.

    bfloat16 would keep only two digits of a log-probability.

    Example:
      >>> [x.dtype.name for x in promote(jnp.zeros(2, jnp.bfloat16), jnp.zeros(2, jnp.float16))]
      ['float32', 'float32']
    """
    dtype = jnp.result_type(jnp.float32, *(x.dtype for x in arrays))
    return tuple(x.astype(dtype) for x in arrays)


def has_mass(log_p: Float[Array, "*shape"]) -> Array:
    """Returns True where the probability is not exactly zero, even if ``exp`` cannot represent a number so small.

    NaN counts as mass, so that a divergence of NaN is NaN.
    """
    return log_p != -jnp.inf


def over_vocab(weight: Weight) -> Float[Array, "*batch 1"] | Float[Array, ""] | Number:
    """Returns a weight that broadcasts over the vocabulary: a weight per token gains a last axis of size 1."""
    return weight[..., None] if isinstance(weight, jax.Array) and weight.ndim else weight


def weigh(weight: Float[Array, "..."] | Number, value: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns ``weight * value``. A weight of 0 gives 0 even where the value is infinite.

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
    """Returns ``log(w p + (1 - w) q)``.

    The result is exactly ``log_q`` at ``w = 0`` and exactly ``log_p`` at ``w = 1``, gradients included.
    ``jnp.logaddexp`` gives the same values, but its gradient is NaN where neither distribution has mass.

    Args:
      log_p: log-probabilities, normalised over the last axis.
      log_q: log-probabilities, normalised over the last axis.
      weight: the share w of ``p``, one number or one number per token.

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
    any_mass = has_mass(x) | has_mass(y)
    high, low = jnp.where(any_mass, jnp.maximum(x, y), 0.0), jnp.where(any_mass, jnp.minimum(x, y), 0.0)
    return jnp.where(any_mass, high + jnp.log1p(jnp.exp(low - high)), -jnp.inf)


def log_decay_mix(
    distance: Float[Array, "*shape"], weight: Float[Array, "*shape"], decaying: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Returns ``log(v + w exp(-x))`` for weights with ``v + w = 1``.

    The result is accurate for a small x and for a small v.

    Args:
      distance: x, not negative.
      weight: v, the weight of the constant term.
      decaying: w, the weight of the decaying term; ``1 - v`` would round a small w to 0.

    Returns:
      The logarithm, between ``-x`` and 0.

    Example:
      >>> [f"{log_decay_mix(*map(jnp.float32, case)):.3e}" for case in ((1e-6, 0.5, 0.5), (60.0, 1e-20, 1.0))]
      ['-5.000e-07', '-4.605e+01']
    """
    # Where x < 1 the sum is at least 1/e, so log1p is accurate. Elsewhere the larger of two logarithms is factored out.
    near = distance < 1
    stays, decays = jnp.log(weight), jnp.log(decaying) - distance
    ratio = jnp.exp(-jnp.abs(stays - decays))
    addend = jnp.where(near, decaying * jnp.expm1(-jnp.where(near, distance, 0.0)), ratio)
    return jnp.log1p(addend) + jnp.where(near, 0.0, jnp.maximum(stays, decays))


def decay_integral(distance: Float[Array, "*shape"], rate: Number) -> Float[Array, "*shape"]:
    """Returns the integral of ``exp(-rate t)`` over ``0 < t < x``.

    The integral is ``(1 - exp(-rate x)) / rate``, and x at rate 0.

    Args:
      distance: x, not negative.
      rate: a Python number, not negative.

    Returns:
      The integral, which is at most x and at most ``1 / rate``.

    Example:
      >>> [float(decay_integral(jnp.array(2.0), rate)) for rate in (0.0, 1e-9)]
      [2.0, 2.0]
    """
    # Below this rate both formulas agree to within rounding for every distance that occurs.
    return distance if rate < 1e-20 else -jnp.expm1(-rate * distance) / rate


def exp_curvature(u: Float[Array, "*shape"], v: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns the second divided difference of ``exp`` at ``0, u, v``, by its series, for ``-1 <= u, v <= 0``.

    The series is ``sum_k h_k(u, v) / (k + 2)!``, where ``h_k`` is the sum of all monomials of degree k. Its sum equals
    ``((exp(v) - 1) / v - (exp(u) - 1) / u) / (v - u)``, but is computed without cancellation.

    Example:
      >>> float(exp_curvature(jnp.array(0.0), jnp.array(0.0)))
      0.5
    """
    terms = 17 if u.dtype == jnp.float64 else 10  # the remaining terms are below rounding
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
    """Returns the contribution of each entry to the alpha-beta divergence of ``kd_jax.divergences``, limits included.

    The definition has three powers: ``q^s``, ``p^alpha q^beta`` and ``p^s``, with ``s = alpha + beta``. Let
    ``d = log p - log q``. Relative to ``s log q`` the exponents of the three powers are 0, ``alpha d`` and ``s d``. The
    summand is ``d^2`` times the second divided difference of exp at these exponents. The summand is therefore smooth in
    alpha and beta, and the limits are the cases in which exponents coincide.

    One exponent is always between the other two. It is ``up d`` below one of them and ``down d`` above the other, where
    up and down have the same sign. The exp of the highest exponent is factored out. The remaining factors are decay
    integrals of ``|d|``, which neither overflow nor divide by zero.

    The derivatives are first divided differences, of exponents that differ by ``beta d`` and ``alpha d``. They are
    defined explicitly: this is as stable as the value, and cheaper than differentiating the whole computation.

    Args:
      log_p: log-probabilities.
      log_q: log-probabilities.
      alpha: the exponent of p, a Python number.
      beta: the exponent of q, a Python number.

    Returns:
      The terms to sum over the vocabulary. A term is infinite, and has no gradient, where one of the probabilities has
      no mass and its power diverges.

    References:
      Cichocki et al., `Generalized Alpha-Beta Divergences <https://doi.org/10.3390/e13010134>`_, 2011.
    """
    log_p, log_q = promote(log_p, log_q)
    has_p, has_q = has_mass(log_p), has_mass(log_q)
    total, d = alpha + beta, log_ratio(log_p, log_q)
    mixed = _mixed_exponent(log_p, log_q, d, alpha, beta)
    exponent_p, exponent_q = _times(total, log_p), _times(total, log_q)
    widest = max(abs(alpha), abs(beta), abs(total))
    if abs(total) == widest:
        up, down = beta, alpha
    elif abs(beta) == widest:
        up, down, exponent_q = total, -alpha, mixed
    else:
        up, down, exponent_p = -beta, total, mixed
    if up + down < 0:  # if both are negative, the same three points are described from the other side
        up, down, exponent_p, exponent_q = -down, -up, exponent_q, exponent_p

    top = _power(jnp.maximum(exponent_p, exponent_q), d, total)
    first_is_up, x = d > 0, magnitude(d)
    rate = jnp.where(first_is_up, up, down)
    integral_up, integral_down = decay_integral(x, up), decay_integral(x, down)
    first = jnp.where(first_is_up, integral_up, integral_down)
    second = jnp.where(first_is_up, integral_down, integral_up)
    curve = first - (1 - rate * first) * second
    if widest < 0.25:
        # Near (0, 0) nearly all of the difference cancels, and the division would amplify its rounding error.
        near = widest * x < 1
        small = jnp.where(near, x, 0.0)
        series = small**2 * exp_curvature(-rate * small, -widest * small)
        curve = jnp.where(near, series, curve / max(widest, 1e-20))
    else:
        curve = curve / widest

    # The term of an entry in which p, or q, is 0. A factor above 1e30 counts as infinite: the term would overflow
    # float32.
    missing_p = top / (alpha * total) if _finite_at_0(alpha, total) else jnp.inf
    missing_q = top / (beta * total) if _finite_at_0(beta, total) else jnp.inf
    alone = jnp.where(has_p, missing_q, jnp.where(has_q, missing_p, 0.0))
    return jnp.where(has_p & has_q, top * curve, alone)


@partial(alpha_beta_entries.defjvp, symbolic_zeros=True)
def _alpha_beta_entries_jvp(
    alpha: Number, beta: Number, primals: tuple[Array, Array], tangents: tuple[Array | SymbolicZero, ...]
) -> tuple[Array, Array]:
    log_p, log_q = promote(*primals)
    total, d = alpha + beta, log_ratio(log_p, log_q)
    mixed = _mixed_exponent(log_p, log_q, d, alpha, beta)

    # 1 at d = 0 as well: the slope is 0 there, but the slope's own derivative is not
    sign = jnp.where(d >= 0, 1.0, -1.0)

    def slope(by: Array, other: Array, of_other: Number, sign: Array) -> Array:
        top = _power(jnp.maximum(_times(total, by), mixed), d, total)
        alone = top / of_other if _finite_at_0(of_other, total) else 0.0
        both = sign * top * decay_integral(magnitude(d), abs(of_other))
        return jnp.where(has_mass(by), jnp.where(has_mass(other), both, alone), 0.0)

    of_p, of_q = tangents
    by_p = 0.0 if isinstance(of_p, SymbolicZero) else slope(log_p, log_q, beta, sign) * of_p
    by_q = 0.0 if isinstance(of_q, SymbolicZero) else slope(log_q, log_p, alpha, -sign) * of_q
    return alpha_beta_entries(*primals, alpha, beta), jnp.zeros_like(d) + by_p + by_q


def log_ratio(log_p: Array, log_q: Array) -> Array:
    """Returns ``log p - log q``, and 0 where p or q has no mass."""
    has_p, has_q = has_mass(log_p), has_mass(log_q)
    return jnp.where(has_p & has_q, log_p - jnp.where(has_q, log_q, 0.0), 0.0)


def magnitude(d: Array) -> Array:
    """Returns ``|d|`` with slope 1 at 0, where ``jnp.abs`` has slope 0.

    The slopes defined above multiply this value by a sign that is also 1 at 0.
    """
    return jnp.where(d >= 0, d, -d)


def _mixed_exponent(log_p: Array, log_q: Array, d: Array, alpha: Number, beta: Number) -> Array:
    """Returns ``alpha log p + beta log q``.

    The sum is computed from the larger log-probability, so that no two infinite numbers are subtracted.
    """
    if alpha == 0 or beta == 0:
        return _times(beta, log_q) if alpha == 0 else alpha * log_p
    return _times(alpha + beta, jnp.maximum(log_p, log_q)) - jnp.where(d > 0, beta, -alpha) * d


def _times(factor: Number, log_p: Array) -> Array:
    return factor * log_p if factor != 0 else jnp.zeros_like(log_p)  # 0 * -inf would be NaN


def _power(exponent: Array, d: Array, total: Number) -> Array:
    """Returns ``exp(exponent)``.

    With a negative total the result would overflow at a small probability. Where ``p == q`` the result is multiplied by
    0 later, so there the exponent is limited to 80.
    """
    return jnp.exp(jnp.where(d == 0, jnp.minimum(exponent, 80.0), exponent) if total < 0 else exponent)


def _finite_at_0(exponent: Number, total: Number) -> bool:
    return exponent > 0 and exponent * total > 1e-30


def mixture_kl_entries(
    log_p: Float[Array, "*batch vocab"],
    log_q: Float[Array, "*batch vocab"],
    weight: Weight,
) -> tuple[Float[Array, "*batch vocab"], Float[Array, "*batch vocab"]]:
    """Returns the contributions of each entry to ``KL(p || m)`` and ``KL(q || m)``, with ``m = w p + (1 - w) q``.

    No contribution is negative: ``m - p`` is added to each entry of ``KL(p || m)``, and ``m - q`` to each entry of
    ``KL(q || m)``. These differences sum to 0. With them a contribution is of second order in ``log p - log q`` where p
    and q are close. Every contribution is the greater of p and q times a function of their ratio. As the smaller of w
    and 1 - w tends to 0, the relative rounding error grows as the inverse of that number.

    Args:
      log_p: log-probabilities, normalised over the last axis.
      log_q: log-probabilities, normalised over the last axis.
      weight: w, one number or one number per token. A Python number that is not near 0 or 1 saves a logarithm.

    Returns:
      The terms to sum over the vocabulary, for p and for q. A term is infinite, and has no gradient, where m has no
      mass.
    """
    log_p, log_q = promote(log_p, log_q)
    weight = over_vocab(weight)
    has_p, has_q = has_mass(log_p), has_mass(log_q)
    both, p_greater = has_p & has_q, log_p > log_q
    w_greater, w_lesser = jnp.where(p_greater, weight, 1 - weight), jnp.where(p_greater, 1 - weight, weight)

    greater = jnp.exp(jnp.maximum(log_p, log_q))
    x = jnp.abs(jnp.where(both, log_p, 0.0) - jnp.where(both, log_q, 0.0))
    lesser_less_1 = jnp.where(both, jnp.expm1(-x), -1.0)  # the lesser minus the greater, as a multiple of the greater
    m_less_1 = w_lesser * lesser_less_1
    infinite = (has_p ^ has_q) & (w_greater == 0)  # m has no mass where the greater of p and q has mass
    if isinstance(weight, float) and 0.05 < weight < 0.95:
        log_m = jnp.log1p(m_less_1)
    else:  # 1 + m_less_1 may be so near 0 that only rounding error is left
        alone = jnp.log(jnp.where(w_greater > 0, w_greater, 1.0))
        log_m = jnp.where(both, log_decay_mix(x, w_greater, w_lesser), alone)
    of_greater = jnp.where(infinite, jnp.inf, greater * (m_less_1 - log_m))
    of_lesser = greater * (-w_greater * lesser_less_1 - (1 + lesser_less_1) * (x + log_m))
    return jnp.where(p_greater, of_greater, of_lesser), jnp.where(p_greater, of_lesser, of_greater)
