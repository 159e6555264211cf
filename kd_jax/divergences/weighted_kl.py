"""Sums of KL in both directions, with weights that the two distributions decide."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kd_jax.divergences.kl import forward_kl, reverse_kl
from kd_jax.divergences.shared import LogProbs, PerToken
from kd_jax.logspace import Number, has_mass, log_ratio, promote, weigh
from kd_jax.resolve import check_number

__all__ = ["adaptive_kl", "entropy_ordered_kl", "todi"]


def adaptive_kl(
    log_p: LogProbs, log_q: LogProbs, *, head_mass: Number = 0.5, include_crossing: bool = True
) -> PerToken:
    """Returns ``h KL(p || q) + (1 - h) KL(q || p)``, with ``h`` the share of ``sum |p - q|`` in the teacher's head.

    The head is the smallest set of the teacher's top tokens whose mass reaches ``head_mass``. Tokens of equal
    probability are either all in the head or all outside. The paper's reason is that forward KL learns the head first
    and reverse KL the tail; notebooks/02_head_and_tail measures where this holds. ``h`` is a constant to the gradient,
    so the gradient need not be 0 at a minimum of the value.

    Args:
      head_mass: the mass of the teacher's head, in ``[0, 1]``.
      include_crossing: True if the token that reaches ``head_mass`` belongs to the head, as in the paper. The authors'
        code excludes this token unless it is the first.

    Returns:
      Nats per token, not negative; 0 where ``p == q``.

    Raises:
      ValueError: if ``head_mass`` is a Python number outside ``[0, 1]``.

    Example:
      >>> p, q = jnp.array([0.7, 0.2, 0.1]), jnp.array([0.7, 0.1, 0.2])  # they differ in the tail only
      >>> log_p, log_q = jnp.log(p), jnp.log(q)
      >>> bool(jnp.isclose(adaptive_kl(log_p, log_q), reverse_kl(log_p, log_q)))
      True

    References:
      Wu et al., `Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large Language Models
      <https://arxiv.org/abs/2404.02657>`_, 2025.
    """
    head_mass = check_number("head_mass", head_mass, 0.0, 1.0)
    log_p, log_q = promote(log_p, log_q)
    p, q = jnp.exp(jax.lax.stop_gradient(log_p)), jnp.exp(jax.lax.stop_gradient(log_q))
    gap = jnp.abs(p - q)
    total = jnp.sum(gap, axis=-1)
    in_head = jnp.sum(jnp.where(_head(p, head_mass, include_crossing), gap, 0.0), axis=-1)
    share = jnp.where(total > 0, in_head / jnp.where(total > 0, total, 1.0), 0.5)
    return weigh(share, forward_kl(log_p, log_q)) + weigh(1 - share, reverse_kl(log_p, log_q))


def todi(log_p: LogProbs, log_q: LogProbs) -> PerToken:
    """Returns ``sum g p (log p - log q) + (1 - g) q (log q - log p)``, with a gate g for each token of the vocabulary.

    The gate is ``g = sigmoid(log p - log q) = p / (p + q)``, a constant to the gradient. Where the teacher's
    probability is the larger one, forward KL dominates and raises the student's; elsewhere reverse KL lowers the
    student's. With this gate the value equals ``jeffreys``, but the gradient does not: the gradient of each direction
    is weighted by its gate.

    Returns:
      Nats per token, not negative.

    Example:
      >>> log_p, log_q = jnp.log(jnp.array([0.75, 0.25])), jnp.log(jnp.array([0.25, 0.75]))
      >>> round(float(todi(log_p, log_q)), 4)  # log 3, as jeffreys
      1.0986

    References:
      Jung et al., `ToDi <https://arxiv.org/abs/2505.16297>`_, 2025.
    """
    log_p, log_q = promote(log_p, log_q)
    return jnp.sum(todi_entries(log_p, log_q), axis=-1)


def todi_entries(log_p: LogProbs, log_q: LogProbs) -> LogProbs:
    """Returns the contribution of each entry to ``todi``."""
    has_p, has_q = has_mass(log_p), has_mass(log_q)
    d = log_ratio(log_p, log_q)
    gate = jax.nn.sigmoid(jax.lax.stop_gradient(d))
    # The factor of d is p - q, but with the gates as constants.
    entries = d * (gate * jnp.exp(log_p) - (1 - gate) * jnp.exp(log_q))
    return jnp.where(has_p & has_q, entries, jnp.where(has_p | has_q, jnp.inf, 0.0))


def entropy_ordered_kl(log_p: LogProbs, log_q: LogProbs, *, heavy: Number = 2.0, light: Number = 1.0) -> PerToken:
    """Returns ``v KL(p || q) + w KL(q || p)``, with the larger weight on the KL of the more uncertain distribution.

    v is ``heavy`` where the entropy of p is above the entropy of q, and ``light`` elsewhere. w is ``heavy`` where the
    entropy of q is above the entropy of p, and ``light`` elsewhere. The weights are constants to the gradient.

    Args:
      heavy: the larger weight, not negative; the published codes have 2 and 3.
      light: the smaller weight, not negative.

    Returns:
      Nats per token, not negative. The published value contains ``v`` times the entropy of p in addition.

    Raises:
      ValueError: if a weight is negative or not a finite number.

    Example:
      >>> log_p, log_q = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.9, 0.1]))
      >>> expected = 3 * forward_kl(log_p, log_q) + reverse_kl(log_p, log_q)
      >>> bool(entropy_ordered_kl(log_p, log_q, heavy=3.0) == expected)
      True

    References:
      Amara et al., `BD-KD <https://arxiv.org/abs/2212.12965>`_, 2022; the weights are those of the code of `ABKD
      <https://arxiv.org/abs/2505.04560>`_ (3) and `AMiD <https://arxiv.org/abs/2510.15982>`_ (2).
    """
    heavy, light = check_number("heavy", heavy, 0.0), check_number("light", light, 0.0)
    log_p, log_q = promote(log_p, log_q)
    of_p, of_q = (_entropy(jax.lax.stop_gradient(log)) for log in (log_p, log_q))
    forward, reverse = jnp.where(of_p > of_q, heavy, light), jnp.where(of_q > of_p, heavy, light)
    return weigh(forward, forward_kl(log_p, log_q)) + weigh(reverse, reverse_kl(log_p, log_q))


def _entropy(log_p: Array) -> Array:
    return -jnp.sum(jnp.exp(log_p) * jnp.where(has_mass(log_p), log_p, 0.0), axis=-1)


def _head(p: Array, head_mass: float, include_crossing: bool) -> Array:
    """Returns True for the tokens in the teacher's head.

    A token is in the head if its probability is at least the largest threshold at which ``head_mass`` is reached.

    The threshold is found by bisection of the bits of floating-point numbers, which are in the same order as the
    numbers. The bisection takes some tens of sums over the vocabulary. A sort would cost as much as some hundreds.
    """
    integer = jnp.int64 if p.dtype == jnp.float64 else jnp.int32
    number = lambda bits: jax.lax.bitcast_convert_type(bits, p.dtype)[..., None]
    highest = jnp.max(p, axis=-1)

    def halve(_: jax.typing.ArrayLike, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        mass = jnp.sum(jnp.where(p >= number(middle), p, 0.0), axis=-1)
        reached = mass >= head_mass if include_crossing else mass > head_mass
        return jnp.where(reached, middle, low), jnp.where(reached, high, middle)

    # The bits of numbers below 2 are integers below 2**62 (float64) and 2**30 (float32).
    halvings = 62 if p.dtype == jnp.float64 else 30
    beyond = jax.lax.bitcast_convert_type(highest, integer) + 1
    crossing, _ = jax.lax.fori_loop(0, halvings, halve, (jnp.zeros_like(beyond), beyond))
    if include_crossing:
        return p >= number(crossing)
    return (p > number(crossing)) | (p == highest[..., None])
