"""Divergences made of sums of the powers ``p^a q^b``."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array

from kd_jax.divergences.kl import forward_kl
from kd_jax.divergences.shared import LogProbs, PerToken, check_word, log_sum
from kd_jax.logspace import Number, alpha_beta_entries, has_mass, log_ratio, magnitude, promote
from kd_jax.resolve import check_number

__all__ = ["alpha_beta", "alpha_divergence", "chi_square", "renyi", "tsallis"]


def alpha_divergence(log_p: LogProbs, log_q: LogProbs, *, alpha: Number) -> PerToken:
    """Returns ``(1 - sum p^alpha q^(1 - alpha)) / (alpha (1 - alpha))``, and its limits at alpha 0 and 1.

    The limit at 0 is ``KL(q || p)``, and the limit at 1 is ``KL(p || q)``. One parameter thus leads from reverse KL
    through the Hellinger distance (1/2) to forward KL. The function is ``alpha_beta`` with ``beta = 1 - alpha``. The
    value is always finite for alpha strictly between 0 and 1.

    Args:
      alpha: any finite Python number.

    Returns:
      Nats per token, not negative.

    Raises:
      ValueError: if ``alpha`` is not a finite number.

    Example:
      >>> log_p, log_q = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.9, 0.1]))
      >>> [round(float(alpha_divergence(log_p, log_q, alpha=alpha)), 4) for alpha in (0.999999, 1.0)]
      [0.5108, 0.5108]

    References:
      Cichocki & Amari, `Families of Alpha- Beta- and Gamma-Divergences <https://doi.org/10.3390/e12061532>`_,
      2010.
    """
    alpha = check_number("alpha", alpha)
    return jnp.sum(alpha_beta_entries(log_p, log_q, alpha, 1 - alpha), axis=-1)


def alpha_beta(log_p: LogProbs, log_q: LogProbs, *, alpha: Number, beta: Number) -> PerToken:
    """Returns ``-1/(ab) sum [p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)]`` and its limits.

    Here ``a`` is alpha and ``b`` is beta.

    For most pairs, a smaller alpha gives more weight to tokens on which p and q differ strongly. A larger beta gives
    more weight to tokens of which the student is sure (notebooks/01_divergences). Special cases are (1, 0), forward KL;
    (0, 1), reverse KL; ``a + b = 1``, the alpha-divergences; and (0, 0), half the squared difference of the logarithms.

    The function is continuous in both parameters, and the published code is not. The limits carry the factor ``1/b^2``
    at ``a = 0``, and ``1/a^2`` at ``b = 0`` and at ``a + b = 0``. An entry where p or q has no mass adds a finite
    amount only if ``a + b`` and the exponent of that distribution are positive.

    Args:
      alpha: the teacher's exponent, any finite Python number.
      beta: the student's exponent, any finite Python number.

    Returns:
      A number per token, not negative, in nats where ``a + b = 1``.

    Raises:
      ValueError: if ``alpha`` or ``beta`` is not a finite number.

    Example:
      >>> log_p, log_q = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.9, 0.1]))
      >>> [round(float(alpha_beta(log_p, log_q, alpha=1.0, beta=beta)), 4) for beta in (-1e-6, 0.0, 1e-6)]
      [0.5108, 0.5108, 0.5108]

    References:
      Cichocki et al., `Generalized Alpha-Beta Divergences <https://doi.org/10.3390/e13010134>`_, 2011;
      Wang et al., `ABKD <https://arxiv.org/abs/2505.04560>`_, 2025.
    """
    alpha, beta = check_number("alpha", alpha), check_number("beta", beta)
    return jnp.sum(alpha_beta_entries(log_p, log_q, alpha, beta), axis=-1)


def tsallis(log_p: LogProbs, log_q: LogProbs, *, order: Number) -> PerToken:
    """Returns ``(sum p^r q^(1 - r) - 1) / (r - 1)`` with ``r`` the order, and the limits at 0 and 1.

    The value is r times the alpha-divergence with alpha = r. The limit at 1 is ``KL(p || q)``. The limit at 0 is the
    mass of q on the tokens that have no mass under p. This limit is 0, without a gradient, if p has mass everywhere.

    Args:
      order: r, a finite Python number, not negative.

    Returns:
      A number per token, not negative; nats at order 1, and at most ``1 / (1 - r)`` for an order below 1.

    Raises:
      ValueError: if ``order`` is negative or not a finite number.

    Example:
      >>> log_p, log_q = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.9, 0.1]))
      >>> [round(float(tsallis(log_p, log_q, order=order)), 4) for order in (0.5, 1.0, 2.0)]
      [0.2111, 0.5108, 1.7778]

    References:
      Tsallis, `Generalized Entropy-Based Criterion for Consistent Testing <https://doi.org/10.1103/PhysRevE.58.1442>`_,
      1998.
    """
    order = check_number("order", order, 0.0)
    if order == 0:
        return _mass_outside(*promote(log_p, log_q))
    return order * jnp.sum(alpha_beta_entries(log_p, log_q, order, 1 - order), axis=-1)


def chi_square(log_p: LogProbs, log_q: LogProbs, *, of: str = "pearson") -> PerToken:
    """Returns Pearson's ``sum (p - q)^2 / q``, or Neyman's ``sum (p - q)^2 / p``.

    The values are twice the alpha-divergences with alpha 2 and -1. They are the largest of the divergences here: a
    student that is sure of a token which the teacher excludes gives Neyman's value 1e13 and more.

    Args:
      of: ``"pearson"`` or ``"neyman"``.

    Returns:
      A number per token, not negative, without a unit.

    Raises:
      ValueError: if ``of`` is another word.

    Example:
      >>> log_p, log_q = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.75, 0.25]))
      >>> [round(float(chi_square(log_p, log_q, of=of)), 4) for of in ("pearson", "neyman")]
      [0.3333, 0.25]

    References:
      Cichocki & Amari, `Families of Alpha- Beta- and Gamma-Divergences <https://doi.org/10.3390/e12061532>`_,
      2010.
    """
    alpha = 2.0 if check_word("of", of, ("pearson", "neyman")) == "pearson" else -1.0
    return 2 * jnp.sum(alpha_beta_entries(log_p, log_q, alpha, 1 - alpha), axis=-1)


def renyi(log_p: LogProbs, log_q: LogProbs, *, alpha: Number) -> PerToken:
    """Returns ``log(sum p^alpha q^(1 - alpha)) / (alpha - 1)``, and its limits at alpha 0 and 1.

    The limit at 1 is ``KL(p || q)``. The limit at 0 is ``-log`` of the mass of q on the tokens that have mass under p.
    This limit is 0, without a gradient, if p has mass everywhere. The value grows with alpha. Unlike the
    alpha-divergence, the value neither vanishes nor overflows where the sum of powers does.

    Args:
      alpha: a finite Python number, not negative.

    Returns:
      Nats per token, not negative.

    Raises:
      ValueError: if ``alpha`` is negative or not a finite number.

    Example:
      >>> log_p, log_q = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.9, 0.1]))
      >>> [round(float(renyi(log_p, log_q, alpha=alpha)), 4) for alpha in (0.999999, 1.0, 2.0)]
      [0.5108, 0.5108, 1.0217]

    References:
      van Erven & Harremoës, `Rényi Divergence and Kullback-Leibler Divergence <https://arxiv.org/abs/1206.2459>`_, 2014.
    """
    alpha = check_number("alpha", alpha, 0.0)
    if alpha == 1:
        return forward_kl(log_p, log_q)
    log_p, log_q = promote(log_p, log_q)
    if alpha == 0:
        outside = _mass_outside(log_p, log_q)
        near = outside < 0.5  # -log(1 - outside) is exact for a small mass outside, and 0 without one
        inside = jnp.where(near, 0.0, log_sum(jnp.where(has_mass(log_p), log_q, -jnp.inf)))
        return -jnp.where(near, jnp.log1p(-jnp.where(near, outside, 0.0)), inside)
    return _renyi(log_p, log_q, alpha)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _renyi(log_p: LogProbs, log_q: LogProbs, alpha: Number) -> PerToken:
    """Returns Rényi's divergence for a positive alpha that is not 1."""
    return _log_power_sum(log_p, log_q, alpha)[0] / (alpha - 1)


@partial(_renyi.defjvp, symbolic_zeros=True)
def _renyi_jvp(
    alpha: Number, primals: tuple[Array, Array], tangents: tuple[Array | SymbolicZero, ...]
) -> tuple[Array, Array]:
    """The derivative is ``-w`` by log q, and ``alpha / (alpha - 1) w`` by log p, with ``w ∝ p^alpha q^(1 - alpha)``.

    The derivative of ``log sum q``, which is 0, is added: ``q - w`` is 0 where ``p == q``. The same holds for p.
    """
    log_p, log_q = primals
    value, exponent = _log_power_sum(log_p, log_q, alpha)
    # Where the value is infinite, the weights are those of the entries with a finite power.
    value_of_weights = jnp.where(jnp.isfinite(value), value, 0.0)
    if alpha > 1:
        finite_sum = log_sum(jnp.where(exponent < jnp.inf, exponent, -jnp.inf))
        value_of_weights = jnp.where(jnp.isfinite(value), value, jnp.where(has_mass(finite_sum), finite_sum, 0.0))
    log_w = jnp.where(exponent < jnp.inf, exponent, -jnp.inf) - value_of_weights[..., None]
    d = log_ratio(log_p, log_q)

    def less(log_r: Array, log_ratio: Array) -> Array:
        """Returns ``w - r``, with ``log w - log r`` given where both have mass."""
        sign = jnp.where(log_ratio >= 0, 1.0, -1.0)
        both = sign * jnp.exp(jnp.maximum(log_r, log_w)) * -jnp.expm1(-magnitude(log_ratio))
        return jnp.where(has_mass(log_r) & has_mass(log_w), both, -jnp.exp(log_r))

    of_p, of_q = tangents
    change = jnp.zeros_like(value)
    if not isinstance(of_p, SymbolicZero):
        slope = alpha / (alpha - 1) * less(log_p, (alpha - 1) * d - value_of_weights[..., None])
        change += jnp.sum(slope * of_p, axis=-1)
    if not isinstance(of_q, SymbolicZero):
        change -= jnp.sum(less(log_q, alpha * d - value_of_weights[..., None]) * of_q, axis=-1)
    return value / (alpha - 1), change


def _log_power_sum(log_p: Array, log_q: Array, alpha: Number) -> tuple[Array, Array]:
    """Returns ``log sum p^alpha q^(1 - alpha)``, and the exponents of the summands.

    The sum is near 1 where p and q are close. There the sum less 1 is computed from terms of second order. Elsewhere
    the largest summand is factored out, so that the sum neither overflows nor vanishes.
    """
    has_p, has_q = has_mass(log_p), has_mass(log_q)
    alone = jnp.where(has_p & (alpha > 1), jnp.inf, -jnp.inf)
    exponent = jnp.where(has_p & has_q, jnp.where(has_q, log_q, 0.0) + alpha * log_ratio(log_p, log_q), alone)
    excess = alpha * (alpha - 1) * jnp.sum(alpha_beta_entries(log_p, log_q, alpha, 1 - alpha), axis=-1)
    near = jnp.abs(excess) < 0.5
    return jnp.where(near, jnp.log1p(jnp.where(near, excess, 0.0)), log_sum(exponent)), exponent


def _mass_outside(log_p: Array, log_q: Array) -> Array:
    """Returns the mass of q on the tokens that have no mass under p."""
    return jnp.sum(jnp.where(has_mass(log_p), 0.0, jnp.exp(log_q)), axis=-1)
