"""Scores of a token: the quantities that a rule of `kd_jax.token_weights` may look at.

Each score is a function with some of three positional parameters, and returns one number per token.

- ``teacher`` are the teacher's log-probabilities [..., V], normalised over the vocabulary.
- ``student`` are the student's log-probabilities [..., V], normalised over the vocabulary.
- ``target`` are the ids of the rows' own tokens [...]. An id outside the vocabulary counts as a log-probability of 0.

A score that reads one model has no parameter for the other model, so that the caller need not compute that model.
Log-probabilities of ``-inf`` are allowed. A score does not stop the gradient; the caller of a rule does this.
In the scores that take ``k``, a k above the size of the vocabulary means the whole vocabulary.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

__all__ = [
    "accepted",
    "cross_entropy",
    "gap",
    "hellinger",
    "log_p",
    "log_q",
    "mass_off_target",
    "student_entropy",
    "student_mass_on_teacher_top",
    "student_top_entropy",
    "teacher_entropy",
    "teacher_mass_on_student_top",
    "teacher_rank_of_student_top",
    "top_k_divergence",
    "union_divergence",
]

LogProbs = Float[Array, "*tokens vocab"]
Ids = Int[Array, "*tokens"]
PerToken = Float[Array, "*tokens"]

_FLOOR = 1e-12  # the smallest entry of a distribution in `union_divergence`


def teacher_entropy(teacher: LogProbs) -> PerToken:
    """Returns the entropy of the teacher's distribution, in nats, between 0 and ln V.

    Example:
      >>> round(float(teacher_entropy(jnp.log(jnp.array([0.5, 0.5, 0.0])))), 4)
      0.6931
    """
    return _entropy(teacher)


def student_entropy(student: LogProbs) -> PerToken:
    """Returns the entropy of the student's distribution, in nats, between 0 and ln V.

    Example:
      >>> float(student_entropy(jnp.log(jnp.array([1.0, 0.0]))))
      0.0
    """
    return _entropy(student)


def log_p(teacher: LogProbs, target: Ids) -> PerToken:
    """Returns the row's token's log-probability under the teacher, in nats, at most 0.

    Example:
      >>> round(float(log_p(jnp.log(jnp.array([0.25, 0.75])), jnp.array(0))), 4)
      -1.3863
    """
    # A gather would break the fusion over the vocabulary.
    is_target = jnp.arange(teacher.shape[-1]) == target[..., None]
    return jnp.sum(jnp.where(is_target, _promote(teacher), 0.0), axis=-1)


def log_q(student: LogProbs, target: Ids) -> PerToken:
    """Returns the row's token's log-probability under the student, in nats, at most 0.

    Example:
      >>> round(float(log_q(jnp.log(jnp.array([0.25, 0.75])), jnp.array(1))), 4)
      -0.2877
    """
    return log_p(student, target)


def gap(teacher: LogProbs, student: LogProbs, target: Ids) -> PerToken:
    """Returns ``log p - log q`` of the row's token, in nats. The gap is 0 where both models exclude the token.

    Example:
      >>> p, q = jnp.array([0.5, 0.5]), jnp.array([0.25, 0.75])
      >>> round(float(gap(jnp.log(p), jnp.log(q), jnp.array(0))), 4)
      0.6931
    """
    of_teacher, of_student = log_p(teacher, target), log_q(student, target)
    equal = of_teacher == of_student  # the difference of two infinite numbers would be NaN
    return jnp.where(equal, 0.0, of_teacher - jnp.where(equal, 0.0, of_student))


def cross_entropy(student: LogProbs, target: Ids) -> PerToken:
    """Returns ``-log q`` of the row's token, in nats, not negative.

    Example:
      >>> round(float(cross_entropy(jnp.log(jnp.array([0.25, 0.75])), jnp.array(0))), 4)
      1.3863
    """
    return -log_q(student, target)


def mass_off_target(teacher: LogProbs, target: Ids) -> PerToken:
    """Returns the teacher's probability of all tokens except the row's token, between 0 and 1.

    Example:
      >>> float(mass_off_target(jnp.log(jnp.array([0.25, 0.75])), jnp.array(0)))
      0.75

    References:
      Zhong et al., "Revisiting Knowledge Distillation for Autoregressive Language Models" (ATKD),
      https://arxiv.org/abs/2402.11890, 2024: the uncertainty of a token.
    """
    return -jnp.expm1(log_p(teacher, target))


def hellinger(teacher: LogProbs, student: LogProbs) -> PerToken:
    """Returns the Hellinger distance ``sqrt(1/2 sum (sqrt p - sqrt q)^2)``, between 0 and 1.

    Example:
      >>> p, q = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
      >>> float(hellinger(jnp.log(p), jnp.log(q)))
      1.0

    References:
      "AdaKD", https://arxiv.org/abs/2510.11615, 2025.
    """
    difference = jnp.exp(_promote(teacher) / 2) - jnp.exp(_promote(student) / 2)
    return jnp.sqrt(jnp.sum(difference**2, axis=-1) / 2)


def teacher_mass_on_student_top(teacher: LogProbs, student: LogProbs, *, k: int, shared_only: bool = False) -> PerToken:
    """Returns the teacher's probability of the student's k likeliest tokens, between 0 and 1.

    Args:
      k: the number of the student's tokens, at least 1.
      shared_only: True to add only tokens that are also among the teacher's k likeliest tokens.

    Raises:
      ValueError: k is not a whole number of at least 1.

    Example:
      >>> p, q = jnp.array([0.6, 0.3, 0.1]), jnp.array([0.2, 0.3, 0.5])
      >>> [round(float(teacher_mass_on_student_top(jnp.log(p), jnp.log(q), k=2, shared_only=s)), 4) for s in (0, 1)]
      [0.4, 0.3]

    References:
      "TA-OPD", https://arxiv.org/abs/2605.26844, 2026: the compatibility of a token.
    """
    _, ids = _top(student, k)
    mass = jnp.exp(jnp.take_along_axis(_promote(teacher), ids, axis=-1))
    if shared_only:
        _, teacher_ids = _top(teacher, k)
        mass = jnp.where(_same(ids, teacher_ids).any(axis=-1), mass, 0.0)
    return jnp.sum(mass, axis=-1)


def student_mass_on_teacher_top(teacher: LogProbs, student: LogProbs, *, k: int) -> PerToken:
    """Returns the student's probability of the teacher's k likeliest tokens, between 0 and 1.

    Args:
      k: the number of the teacher's tokens, at least 1.

    Raises:
      ValueError: k is not a whole number of at least 1.

    Example:
      >>> p, q = jnp.array([0.6, 0.3, 0.1]), jnp.array([0.2, 0.3, 0.5])
      >>> round(float(student_mass_on_teacher_top(jnp.log(p), jnp.log(q), k=2)), 4)
      0.5
    """
    return teacher_mass_on_student_top(student, teacher, k=k)


def teacher_rank_of_student_top(teacher: LogProbs, student: LogProbs) -> PerToken:
    """Returns the number of tokens to which the teacher gives more probability than to the student's likeliest token.

    The number is between 0 and V - 1. Nothing is sorted.

    Example:
      >>> p, q = jnp.array([0.6, 0.3, 0.1]), jnp.array([0.2, 0.3, 0.5])
      >>> float(teacher_rank_of_student_top(jnp.log(p), jnp.log(q)))
      2.0
    """
    teacher = _promote(teacher)
    likeliest = jnp.argmax(student, axis=-1, keepdims=True)
    greater = teacher > jnp.take_along_axis(teacher, likeliest, axis=-1)
    return jnp.sum(greater, axis=-1).astype(teacher.dtype)


def accepted(teacher: LogProbs, student: LogProbs, *, k: int) -> PerToken:
    """Returns 1 where the student's likeliest token is among the teacher's k likeliest tokens, and 0 elsewhere.

    A token that ties with the teacher's k-th token is among them.

    Args:
      k: the number of the teacher's tokens, at least 1.

    Raises:
      ValueError: k is not a whole number of at least 1.

    Example:
      >>> p, q = jnp.array([0.6, 0.3, 0.1]), jnp.array([0.2, 0.5, 0.3])
      >>> [float(accepted(jnp.log(p), jnp.log(q), k=k)) for k in (1, 2)]
      [0.0, 1.0]

    References:
      "SelecTKD", https://arxiv.org/abs/2510.24021, 2025.
    """
    rank = teacher_rank_of_student_top(teacher, student)
    return (rank < _checked(k)).astype(rank.dtype)


def top_k_divergence(teacher: LogProbs, student: LogProbs, *, k: int) -> PerToken:
    """Returns ``sum p (log p - log q)`` over the teacher's k likeliest tokens, in nats.

    Neither distribution is renormalised over these tokens, so that the sum may be negative.

    Args:
      k: the number of the teacher's tokens, at least 1.

    Raises:
      ValueError: k is not a whole number of at least 1.

    Example:
      >>> p, q = jnp.array([0.5, 0.5, 0.0]), jnp.array([0.25, 0.5, 0.25])
      >>> round(float(top_k_divergence(jnp.log(p), jnp.log(q), k=1)), 4)
      0.3466

    References:
      "TIP", https://arxiv.org/abs/2604.14084, 2026.
    """
    of_teacher, ids = _top(teacher, k)
    of_student = jnp.take_along_axis(_promote(student), ids, axis=-1)
    has_mass = of_teacher != -jnp.inf
    safe = jnp.where(has_mass, of_teacher, 0.0)
    return jnp.sum(jnp.where(has_mass, jnp.exp(safe) * (safe - of_student), 0.0), axis=-1)


def union_divergence(teacher: LogProbs, student: LogProbs, *, k: int) -> PerToken:
    """Returns ``sum p' (log p' - log q')`` over the union of both models' k likeliest tokens, in nats.

    Each of p' and q' is its model's own top k, renormalised. In the logarithms, other tokens of the union and smaller
    entries count as 1e-12. This floor makes the value large, up to ``-ln 1e-12``, where the two sets are disjoint. The
    published code also weighs the teacher's missing tokens by the floor, which changes the value by less than 1e-10.

    Args:
      k: the number of each model's tokens, at least 1.

    Raises:
      ValueError: k is not a whole number of at least 1.

    Example:
      >>> p, q = jnp.array([0.6, 0.3, 0.1]), jnp.array([0.3, 0.6, 0.1])
      >>> round(float(union_divergence(jnp.log(p), jnp.log(q), k=2)), 4)
      0.231

    References:
      "TA-OPD", https://arxiv.org/abs/2605.26844, 2026: the divergence of a token.
    """
    of_teacher, teacher_ids = _top(teacher, k)
    of_student, student_ids = _top(student, k)
    own_p, own_q = jax.nn.softmax(of_teacher, axis=-1), jax.nn.softmax(of_student, axis=-1)
    same = _same(teacher_ids, student_ids)  # [..., k, k], small beside the vocabulary
    other_q = jnp.sum(jnp.where(same, own_q[..., None, :], 0.0), axis=-1)
    log_ratio = jnp.log(jnp.maximum(own_p, _FLOOR)) - jnp.log(jnp.maximum(other_q, _FLOOR))
    return jnp.sum(own_p * log_ratio, axis=-1)


def student_top_entropy(student: LogProbs, *, k: int) -> PerToken:
    """Returns the entropy of the student's k likeliest tokens, renormalised and divided by ln k: between 0 and 1.

    Args:
      k: the number of tokens, at least 2.

    Raises:
      ValueError: k is not a whole number of at least 2.

    Example:
      >>> round(float(student_top_entropy(jnp.log(jnp.array([0.4, 0.4, 0.2])), k=2)), 4)
      1.0

    References:
      "TA-OPD", https://arxiv.org/abs/2605.26844, 2026: the uncertainty of a token.
    """
    if _checked(k) < 2:
        raise ValueError(f"k must be at least 2, but is {k}, and the entropy of one token is always 0.")
    return _entropy(jax.nn.log_softmax(_top(student, k)[0], axis=-1)) / math.log(k)


def _checked(k: int) -> int:
    """Returns k, after a check that k is a whole number of at least 1."""
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise ValueError(f"k must be a whole number of at least 1, but is {k!r}.")
    return k


def _entropy(log_probs: Array) -> Array:
    log_probs = _promote(log_probs)
    finite = jnp.where(log_probs != -jnp.inf, log_probs, 0.0)
    return jnp.sum(-jnp.exp(log_probs) * finite, axis=-1)


def _top(log_probs: Array, k: int) -> tuple[Array, Array]:
    """Returns the k largest log-probabilities and their ids, both [..., k]."""
    values, ids = jax.lax.top_k(_promote(log_probs), min(_checked(k), log_probs.shape[-1]))
    return values, ids


def _same(first: Array, second: Array) -> Array:
    """Returns True at [..., i, j] where the i-th id of the first is the j-th id of the second."""
    return first[..., :, None] == second[..., None, :]


def _promote(log_probs: Array) -> Array:
    """Casts to float32 unless the type is more exact."""
    return log_probs.astype(jnp.result_type(log_probs, jnp.float32))
