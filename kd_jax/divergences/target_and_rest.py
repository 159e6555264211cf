"""Divergences that compare one token, the target, apart from the rest of the vocabulary."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kd_jax.divergences.kl import forward_kl
from kd_jax.divergences.shared import LogProbs, PerToken, Target, log_sum, normalise, one_hot
from kd_jax.logspace import Number, Weight, has_mass, promote, weigh
from kd_jax.resolve import check_number

__all__ = ["decoupled_kl", "nkd"]


def decoupled_kl(
    log_p: LogProbs,
    log_q: LogProbs,
    *,
    target: Target,
    target_weight: Weight = 1.0,
    rest_weight: Weight = 1.0,
) -> PerToken:
    """Returns ``v KL(b(p) || b(q)) + w KL(p' || q')``, with the target's share and the rest weighted apart.

    ``b(p)`` is the distribution of two outcomes, the target and the rest. ``p'`` is p without the target, normalised.
    With ``v = 1`` and w equal to the mass of p off the target, the value is ``KL(p || q)``. A larger w gives weight to
    the rest also where the teacher is sure of the target.

    If the target is not in the vocabulary, the first term is 0 and the second is ``KL(p || q)``. If p has no mass off
    the target, the second term is 0.

    Args:
      target: the index of the row's token; an index outside the vocabulary means that the token is not in the vocabulary.
      target_weight: v, not negative; one number or one number per token.
      rest_weight: w, not negative; one number or one number per token.

    Returns:
      A number per token, not negative; nats if the weights are 1.

    Raises:
      ValueError: if a weight is a negative Python number or not finite.

    Example:
      >>> log_p, log_q = jnp.log(jnp.array([0.6, 0.3, 0.1])), jnp.log(jnp.array([0.6, 0.2, 0.2]))
      >>> value = decoupled_kl(log_p, log_q, target=jnp.array(0), rest_weight=0.4)
      >>> bool(jnp.isclose(value, forward_kl(log_p, log_q)))
      True

    References:
      Zhao et al., `Decoupled Knowledge Distillation <https://arxiv.org/abs/2203.08679>`_, 2022, eq. 7;
      Zhong et al., `ATKD <https://arxiv.org/abs/2402.11890>`_, 2024.
    """
    target_weight, rest_weight = (
        weight if isinstance(weight, jax.Array) else check_number(name, weight, 0.0)
        for name, weight in (("target_weight", target_weight), ("rest_weight", rest_weight))
    )
    log_p, log_q = promote(log_p, log_q)
    is_target = one_hot(target, log_p.shape[-1])
    two_p, rest_p = _split(log_p, is_target)
    two_q, rest_q = _split(log_q, is_target)
    rest_q = jnp.where(has_mass(two_p[..., 1:]), rest_q, -jnp.inf)
    return weigh(target_weight, forward_kl(two_p, two_q)) + weigh(rest_weight, forward_kl(rest_p, rest_q))


def nkd(log_p: LogProbs, log_q: LogProbs, *, gamma: Number = 0.25, temperature: Number = 2.0) -> PerToken:
    """Returns ``-p(y) log q(y) - g sum p' log q'``, with the teacher's likeliest token y as the target.

    ``p'`` and ``q'`` are the distributions without y, at a temperature of their own, normalised. Both sums are cross
    entropies: the value is not 0 where ``p == q``, and the first summand asks the student for more mass on y than the
    teacher has.

    Args:
      gamma: g, not negative.
      temperature: a positive divisor of the log-probabilities of the rest, in addition to the temperature of the term.

    Returns:
      A number per token, not negative.

    Raises:
      ValueError: if a number is negative, not finite, or the temperature is 0.

    Example:
      >>> log_p, log_q = jnp.log(jnp.array([0.5, 0.25, 0.25])), jnp.log(jnp.array([0.25, 0.5, 0.25]))
      >>> round(float(nkd(log_p, log_q, gamma=0.0)), 4)  # 0.5 log 4
      0.6931

    References:
      Yang et al., `From Knowledge Distillation to Self-Knowledge Distillation <https://arxiv.org/abs/2303.13005>`_,
      2023. The target there is the label; the code of `BiLD <https://arxiv.org/abs/2406.13555>`_ takes the token.
    """
    gamma, temperature = check_number("gamma", gamma, 0.0), check_number("temperature", temperature, 1e-6)
    log_p, log_q = promote(log_p, log_q)
    is_target = one_hot(jnp.argmax(log_p, axis=-1), log_p.shape[-1])
    rest_p, rest_q = (normalise(jnp.where(is_target, -jnp.inf, log / temperature)) for log in (log_p, log_q))
    of_target = _cross_entropies(jnp.where(is_target, log_p, -jnp.inf), log_q)
    return jnp.sum(of_target, axis=-1) + gamma * jnp.sum(_cross_entropies(rest_p, rest_q), axis=-1)


def _split(log_p: LogProbs, is_target: Bool[Array, "*batch vocab"]) -> tuple[Float[Array, "*batch 2"], LogProbs]:
    """Returns the log-probabilities of the target and of the rest together, and those of the rest, normalised."""
    of_target = jnp.sum(jnp.where(is_target, log_p, 0.0), axis=-1)
    of_target = jnp.where(jnp.any(is_target, axis=-1), of_target, -jnp.inf)
    rest = jnp.where(is_target, -jnp.inf, log_p)
    return jnp.stack([of_target, log_sum(rest)], axis=-1), normalise(rest)


def _cross_entropies(log_p: LogProbs, log_q: LogProbs) -> LogProbs:
    """Returns ``-p log q`` of each entry; 0 where p has no mass."""
    has_p, has_q = has_mass(log_p), has_mass(log_q)
    finite = -jnp.exp(log_p) * jnp.where(has_q, log_q, 0.0)
    return jnp.where(has_p & ~has_q, jnp.inf, finite)
