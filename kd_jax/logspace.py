"""Arithmetic on log-probabilities that stays finite, in value and gradient, where there is no mass.

No mass is a log-probability of ``-inf``. Two rules keep such an entry from poisoning the rest: ``-inf - -inf`` is
never formed, and whatever a ``where`` does not select is computed from finite stand-ins, since its gradient is
multiplied by zero and not left out.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def promote(*arrays: Float[Array, "..."]) -> tuple[Array, ...]:
    """The arrays in one floating type, float32 at the least: in bfloat16 a log-probability has two or three digits.

    Example:
      >>> [x.dtype.name for x in promote(jnp.zeros(2, jnp.bfloat16), jnp.zeros(2, jnp.float16))]
      ['float32', 'float32']
    """
    dtype = jnp.result_type(jnp.float32, *(x.dtype for x in arrays))
    return tuple(x.astype(dtype) for x in arrays)


def has_mass(log_p: Float[Array, "*shape"]) -> Array:
    """True where the probability is not exactly zero. It may be far below what ``exp`` can represent."""
    return log_p > -jnp.inf


def over_vocab(weight: Float[Array, "*batch"] | float) -> Float[Array, "*batch 1"] | float:
    """A weight per token (or one for all) in the shape that multiplies log-probabilities."""
    return weight[..., None] if isinstance(weight, jax.Array) and weight.ndim else weight


def weigh(weight: Float[Array, "*batch"] | float, value: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """``weight * value``, and 0 for a weight of 0 even where the value is infinite.

    Example:
      >>> float(weigh(0.0, jnp.array(jnp.inf)))
      0.0
    """
    return jnp.where(weight == 0, 0.0, weight * jnp.where(weight == 0, 0.0, value))


def log_mix(
    log_p: Float[Array, "*batch vocab"],
    log_q: Float[Array, "*batch vocab"],
    weight: Float[Array, "*batch"] | float,
) -> Float[Array, "*batch vocab"]:
    """``log(w p + (1 - w) q)`` for ``w`` in ``[0, 1]``: exactly ``log_q`` at 0 and ``log_p`` at 1, gradients included.

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
    weight = over_vocab(jnp.asarray(weight, log_p.dtype))
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


def decay_integral(distance: Float[Array, "*shape"], rate: float) -> Float[Array, "*shape"]:
    """``(1 - exp(-rate x)) / rate``, the integral of ``exp(-rate t)`` from 0 to x: exact through ``rate = 0``, where it is x.

    Args:
      distance: x, not negative.
      rate: a Python number, not negative.

    Returns:
      The integral; at most x, and at most ``1 / rate``.

    Example:
      >>> [float(decay_integral(jnp.array(2.0), rate)) for rate in (0.0, 1e-9)]
      [2.0, 2.0]
    """
    # Below this rate the two differ by less than rounding even for a distance of a thousand, and 1 / rate overflows soon.
    return distance if rate < 1e-20 else -jnp.expm1(-rate * distance) / rate


def exp_curvature(u: Float[Array, "*shape"], v: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The second divided difference of ``exp`` at ``0, u, v``, by its series, for ``-1 <= u, v <= 0``.

    It is ``(exp(v) - 1 - v (exp(u) - 1) / u) / (v (v - u))`` without the cancellation, and 1/2 at ``u = v = 0``:
    ``sum_k h_k(u, v) / (k + 2)!``, where ``h_k`` is the sum of all monomials of degree k.

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
