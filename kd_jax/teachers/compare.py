"""Runs a student and a teacher on the same batch, and computes a loss without holding the logits of all tokens."""

from collections.abc import Callable, Sequence
from typing import cast

import jax
from jaxtyping import Array, PyTree

from kd_jax.head_loss import token_sum
from kd_jax.objectives import Term
from kd_jax.sharding import for_lookup
from kd_jax.teachers.online import HiddenModel, Online
from kd_jax.teachers.protocol import NoTeacher, Teacher


def as_teacher(teacher: Teacher | HiddenModel | None) -> Teacher:
    """Returns an `Online` teacher for a model, `NoTeacher` for None, and a teacher unchanged."""
    if teacher is None:
        return NoTeacher()
    return cast(Teacher, teacher) if hasattr(teacher, "outputs") else Online(cast(HiddenModel, teacher))


def for_terms(teacher: Teacher | HiddenModel | None, terms: Sequence[Term]) -> Teacher:
    """Returns the teacher with which the terms compare; `NoTeacher`, which runs no model, if no term needs a teacher.

    Raises:
      ValueError: a term needs a teacher, and there is none.
    """
    names = ", ".join(term.name for term in terms if term.needs_teacher)
    if not names:
        return NoTeacher()
    teacher = as_teacher(teacher)
    if teacher == NoTeacher():
        raise ValueError(
            f"the terms {names} compare with a teacher, but teacher.path is empty; set the teacher's folder."
        )
    return teacher


def compare(
    token_loss: Callable[..., Array], student: HiddenModel, params: PyTree, teacher: Teacher | HiddenModel | None,
    teacher_params: PyTree, batch: dict[str, Array], coefficient: Array, *extras: Array, vocab_size: int,
    temperature: float = 1.0, chunk: int | None = None, mesh: jax.sharding.Mesh | None = None,
) -> tuple[Array, Array]:  # fmt: skip
    """Returns `head_loss.token_sum` of both models on a batch.

    Args:
      token_loss: (teacher_side, student_side, log_q, *extras) -> a value per token or K values per token, as in
        `token_sum`. `Teacher.align` returns the two sides. `log_q` are the student's log-probabilities.
      student: a model with `hidden(params, tokens, mask)` and `stored_head(params)`.
      params: the student's parameters, which get gradients.
      teacher: a teacher; a model or None as in `as_teacher`.
      teacher_params: the teacher's parameters.
      batch: tokens and mask [B, L], and the arrays of a cached teacher.
      coefficient, extras: the coefficients and further arrays, as in `token_sum`.
      vocab_size, temperature, chunk, mesh: the options of `token_sum`.

    Returns:
      The sum, and the loss at each position, as in `token_sum`.
    """
    teacher = as_teacher(teacher)
    params = for_lookup(mesh, params)
    outputs = teacher.outputs(for_lookup(mesh, teacher_params), batch)
    head, tied = student.stored_head(params)
    count = len(outputs.extras)

    def loss(log_p: Array | None, log_q: Array, *arrays: Array) -> Array:
        return token_loss(*teacher.align(log_p, log_q, *arrays[:count]), log_q, *arrays[count:])

    return token_sum(
        loss, student.hidden(params, batch["tokens"], batch["mask"]), head, outputs.hidden, outputs.head, coefficient,
        *outputs.extras, *extras, chunk=chunk, tied=(tied, outputs.tied), vocab_size=vocab_size,
        temperature=temperature, mesh=mesh,
    )  # fmt: skip
