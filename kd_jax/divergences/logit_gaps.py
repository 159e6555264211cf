"""Squared differences between the logits of the two models."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array

from kd_jax.divergences.shared import LogProbs, PerToken, check_word, log_weights, normalise
from kd_jax.logspace import Number, has_mass, log_ratio, promote
from kd_jax.resolve import check_number

__all__ = ["concrete_score", "logit_mse"]


def concrete_score(
    log_p: LogProbs,
    log_q: LogProbs,
    *,
    weights: Sequence[str] = ("student", "student"),
    temperature: Number = 1.0,
    teacher_share: Number = 0.5,
) -> PerToken:
    """Returns ``1/4 sum_x sum_y v_x w_y (d_x - d_y)^2`` with ``d = log q - log p``, for two weights v and w.

    The logarithms of the ratios ``q_x / q_y`` are compared with those of p. A constant that is added to the logits
    changes nothing. With ``v = w`` the value is half the variance of d. The weights are constants to the gradient.

    Args:
      weights: two of the words ``"student"`` for q, ``"teacher"`` for p, ``"mixture"`` for ``s p + (1 - s) q``, and
        ``"uniform"``.
      temperature: a positive divisor of the log-probabilities in the weights.
      teacher_share: s, in ``[0, 1]``.

    Returns:
      A number per token, not negative, in squared nats. The value is infinite where a token has a weight, and has mass
      in only one distribution.

    Raises:
      ValueError: if a word is another one, if there are not two words, or if a number is out of range.

    Example:
      >>> log_p, log_q = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.9, 0.1]))
      >>> round(float(concrete_score(log_p, log_q)), 4)  # 1/2 * 0.9 * 0.1 * log(9)^2
      0.2173

    References:
      Kim et al., `Distillation of Large Language Models via Concrete Score Matching
      <https://arxiv.org/abs/2509.25837>`_, 2025.
    """
    if len(weights) != 2:
        raise ValueError(f"weights={weights!r} must be two words, such as ('student', 'student').")
    words = [check_word("weights", word, ("student", "teacher", "mixture", "uniform")) for word in weights]
    temperature = check_number("temperature", temperature, 1e-6)
    teacher_share = check_number("teacher_share", teacher_share, 0.0, 1.0)
    log_p, log_q = promote(log_p, log_q)
    d = log_ratio(log_q, log_p)
    means, variances = [], []
    for word in dict.fromkeys(words):  # equal weights are computed once
        log_w = log_weights(word, log_p, log_q, temperature, teacher_share)
        w = jnp.exp(log_w)
        mean = jnp.sum(w * d, axis=-1, keepdims=True)
        means.append(mean[..., 0])
        squares = w * (d - mean) ** 2
        variances.append(jnp.sum(jnp.where(_infinite(log_p, log_q, log_w), jnp.inf, squares), axis=-1))
    return (variances[0] + variances[-1] + (means[0] - means[-1]) ** 2) / 4


def logit_mse(
    teacher_logits: LogProbs, student_logits: LogProbs, *, weights: str = "uniform", standardise: bool = False
) -> PerToken:
    """Returns ``1/4 sum w (student_logits - teacher_logits)^2``, with weights that sum to 1.

    The value depends on constants that are added to the logits, unless the logits are centred first. The weights are
    constants to the gradient.

    Args:
      teacher_logits: the teacher's logits.
      student_logits: the student's logits.
      weights: ``"uniform"``, or the softmax of the logits of the ``"student"`` or of the ``"teacher"``.
      standardise: True to compare the logits after each model's are shifted and scaled to mean 0 and deviation 1 over
        the vocabulary. The weights remain those of the logits before.

    Returns:
      A number per token, not negative. The value is infinite where a logit with a weight is ``-inf`` in only one model.

    Raises:
      ValueError: if ``weights`` is another word.

    Example:
      >>> float(logit_mse(jnp.array([1.0, 2.0]), jnp.array([3.0, 2.0])))  # 1/4 * 1/2 * 2^2
      0.5

    References:
      Kim et al., `Distillation of Large Language Models via Concrete Score Matching
      <https://arxiv.org/abs/2509.25837>`_, 2025 (direct logit distillation).
    """
    check_word("weights", weights, ("uniform", "student", "teacher"))
    teacher_logits, student_logits = promote(teacher_logits, student_logits)
    log_w = log_weights(weights, teacher_logits, student_logits)
    log_w = log_w if weights == "uniform" else normalise(log_w)
    if standardise:
        d = _z_scores(student_logits) - _z_scores(teacher_logits)
    else:
        d = log_ratio(student_logits, teacher_logits)
    squares = jnp.exp(log_w) * d**2
    return jnp.sum(jnp.where(_infinite(teacher_logits, student_logits, log_w), jnp.inf, squares), axis=-1) / 4


def _z_scores(logits: LogProbs) -> LogProbs:
    """Returns ``(z - mean) / (deviation + 1e-9)`` over the finite logits, with the unbiased deviation; 0 elsewhere."""
    finite = has_mass(logits)
    logits = jnp.where(finite, logits, 0.0)
    count = jnp.sum(finite, axis=-1, keepdims=True)
    centred = jnp.where(finite, logits - jnp.sum(logits, axis=-1, keepdims=True) / count, 0.0)
    variance = jnp.sum(centred**2, axis=-1, keepdims=True) / jnp.maximum(count - 1, 1)
    varies = variance > 0
    return centred / (jnp.where(varies, jnp.sqrt(jnp.where(varies, variance, 1.0)), 0.0) + 1e-9)


def _infinite(log_p: Array, log_q: Array, log_w: Array) -> Array:
    """Returns True where an entry has a weight, and exactly one of the two logarithms is finite."""
    return has_mass(log_w) & (has_mass(log_p) ^ has_mass(log_q))
