"""Types and steps that several divergences share."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kd_jax.logspace import Number, Weight, has_mass, log_mix

LogProbs = Float[Array, "*batch vocab"]
PerToken = Float[Array, "*batch"]
Target = Int[Array, "*batch"]


def log_sum(log_p: Float[Array, "*batch vocab"]) -> Float[Array, "*batch"]:
    """Returns ``log sum exp`` over the last axis; ``-inf`` without a gradient where no entry has mass.

    The gradient of ``jax.nn.logsumexp`` is NaN where no entry has mass.

    Example:
      >>> float(log_sum(jnp.array([-jnp.inf, -jnp.inf])))
      -inf
    """
    highest = jax.lax.stop_gradient(jnp.max(log_p, axis=-1))
    finite = jnp.isfinite(highest)
    total = jnp.sum(jnp.exp(log_p - jnp.where(finite, highest, 0.0)[..., None]), axis=-1)
    return jnp.where(finite, jnp.log(jnp.where(finite, total, 1.0)) + highest, highest)


def normalise(log_p: LogProbs) -> LogProbs:
    """Returns the log-probabilities of ``p / sum p``; ``-inf`` everywhere where no entry has mass.

    Example:
      >>> jnp.exp(normalise(jnp.log(jnp.array([0.25, 0.25, 0.0])))).round(3).tolist()
      [0.5, 0.5, 0.0]
    """
    total = log_sum(log_p)
    return log_p - jnp.where(has_mass(total), total, 0.0)[..., None]


def top_entries(leader: LogProbs, k: int, *others: LogProbs) -> tuple[Float[Array, "*batch k"], ...]:
    """Returns the entries of `others` at the ``k`` likeliest tokens of `leader`, the likeliest first.

    Where the vocabulary has fewer than ``k`` tokens, all tokens are taken. Where `leader` is NaN, the entries are NaN.
    """
    top, ids = jax.lax.top_k(jax.lax.stop_gradient(leader), min(k, leader.shape[-1]))
    entries = (jnp.take_along_axis(other, ids, axis=-1, mode="promise_in_bounds") for other in others)
    return tuple(jnp.where(jnp.isnan(top), jnp.nan, of_other) for of_other in entries)


def one_hot(token: Target, vocab: int) -> Bool[Array, "*batch vocab"]:
    """Returns True at the token; False everywhere for an index outside the vocabulary."""
    # A comparison fuses with the other arithmetic over the vocabulary, and a gather does not.
    return jnp.arange(vocab) == token[..., None]


def log_weights(
    word: str, log_p: LogProbs, log_q: LogProbs, temperature: Number = 1.0, teacher_share: Number = 0.5
) -> LogProbs:
    """Returns the logarithms of weights over the vocabulary, which are constants to the gradient.

    Args:
      word: ``"teacher"`` for p, ``"student"`` for q, ``"mixture"`` for ``s p + (1 - s) q`` with the teacher's share s,
        or ``"uniform"`` for equal weights of all tokens that have mass in p or in q.
      log_p: the teacher's log-probabilities.
      log_q: the student's log-probabilities.
      temperature: a divisor of the log-probabilities, which are then normalised again.
      teacher_share: s.
    """
    log_p, log_q = (
        jax.lax.stop_gradient(log if temperature == 1 else normalise(log / temperature)) for log in (log_p, log_q)
    )
    if word == "uniform":
        return normalise(jnp.where(has_mass(log_p) | has_mass(log_q), jnp.zeros_like(log_p), -jnp.inf))
    if word == "mixture":
        return log_mix(log_p, log_q, teacher_share)
    return log_p if word == "teacher" else log_q


def check_word(name: str, value: str, words: Sequence[str]) -> str:
    """Returns ``value``, after a check that ``value`` is one of the words.

    Raises:
      ValueError: ``value`` is another word.
    """
    if value not in words:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, words))}.")
    return value


def check_count(name: str, value: int, least: int = 1) -> int:
    """Returns ``value``, after a check that ``value`` is a whole number and not below ``least``.

    Raises:
      ValueError: ``value`` is not whole, or too small.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, but is {value!r}.")
    return value


def refuse_zero(name: str, value: Weight, ends: tuple[float, ...], advice: str) -> None:
    """Refuses a Python number at which a divergence is 0 for all distributions and has no gradient."""
    if isinstance(value, float) and value in ends:
        raise ValueError(
            f"{name}={value!r} makes this divergence 0 for all distributions, without any gradient. {advice}."
        )
