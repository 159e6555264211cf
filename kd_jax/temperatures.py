"""Temperatures that each token derives from both models' logits.

A rule is a function ``T(teacher_logits, student_logits, *, ...)`` of logits [..., V]. It returns the teacher's and the
student's temperature, each [...]. Each model's logits are divided by the model's own temperature before the softmax.
The gradient passes through the student's temperature, as in the published code.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from kd_jax.logspace import Number, promote
from kd_jax.resolve import check_number

__all__ = ["own_deviation", "relative_maximum"]

Logits = Float[Array, "*batch V"]
Temperatures = tuple[Float[Array, "*batch"], Float[Array, "*batch"]]


def own_deviation(teacher_logits: Logits, student_logits: Logits, *, factor: Number = 1.5) -> Temperatures:
    """Returns ``factor sd(z)`` for each model, with the unbiased standard deviation of the model's own logits.

    A model with a wide range of logits is softened more, so that both distributions are about equally sharp. The
    published code multiplies the divergence by the square of the teacher's temperature.

    Args:
      factor: a number above 0.

    Returns:
      The temperatures of the teacher and of the student. A temperature is 0 where all logits are equal.

    Raises:
      ValueError: if ``factor`` is not above 0.

    Example:
      >>> teacher, student = own_deviation(jnp.array([4.0, 0.0, 2.0]), jnp.array([1.0, -1.0, 0.0]))
      >>> float(teacher), float(student)
      (3.0, 1.5)

    References:
      Chi et al., `NormKD: Normalized Logits for Knowledge Distillation <https://arxiv.org/abs/2308.00520>`_, 2023.
    """
    factor = _positive("factor", factor)
    teacher_logits, student_logits = promote(teacher_logits, student_logits)
    return factor * jnp.std(teacher_logits, axis=-1, ddof=1), factor * jnp.std(student_logits, axis=-1, ddof=1)


def relative_maximum(teacher_logits: Logits, student_logits: Logits, *, mean: Number = 1.0) -> Temperatures:
    """Returns ``2 mean max(z) / (max(z_p) + max(z_q))`` for each model.

    The model with the greater maximum is softened more.

    Args:
      mean: the mean of both temperatures, a number above 0.

    Returns:
      The temperatures of the teacher and of the student. Both are NaN where a maximum is not positive, because the
      method is not defined there. Centred logits have positive maxima.

    Raises:
      ValueError: if ``mean`` is not above 0.

    Example:
      >>> teacher, student = relative_maximum(jnp.array([6.0, 0.0]), jnp.array([2.0, 1.0]))
      >>> float(teacher), float(student)
      (1.5, 0.5)

    References:
      Wei & Bai, `Dynamic Temperature Knowledge Distillation <https://arxiv.org/abs/2404.12711>`_, 2024. The paper
      compares the logarithms of the sums of exponentials, and the code that is reproduced here the maxima.
    """
    mean = _positive("mean", mean)
    teacher_logits, student_logits = promote(teacher_logits, student_logits)
    of_teacher, of_student = jnp.max(teacher_logits, axis=-1), jnp.max(student_logits, axis=-1)
    is_defined = (of_teacher > 0) & (of_student > 0)
    scale = 2 * mean / jnp.where(is_defined, of_teacher + of_student, jnp.nan)
    return scale * of_teacher, scale * of_student


def _positive(name: str, value: Number) -> float:
    number = check_number(name, value, 0.0)
    if number == 0:
        raise ValueError(f"{name} must be above 0, because a temperature divides the logits.")
    return number
