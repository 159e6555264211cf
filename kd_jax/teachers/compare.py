"""Runs a student and frozen models on the same batch, and computes a loss without holding the logits of all tokens."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
from jaxtyping import Array, PyTree

from kd_jax.head_loss import token_sum
from kd_jax.objectives import Term
from kd_jax.sharding import for_lookup
from kd_jax.teachers.online import HiddenModel, Online, outputs_of
from kd_jax.teachers.protocol import NoTeacher, Outputs, Teacher


def as_teacher(teacher: Teacher | HiddenModel | None) -> Teacher:
    """Returns an `Online` teacher for a model, `NoTeacher` for None, and a teacher unchanged."""
    if teacher is None:
        return NoTeacher()
    return cast(Teacher, teacher) if hasattr(teacher, "outputs") else Online(cast(HiddenModel, teacher))


def for_terms(
    teacher: Teacher | HiddenModel | Mapping[str, Teacher | HiddenModel] | None, terms: Sequence[Term]
) -> dict[str, Teacher]:  # fmt: skip
    """Returns the frozen models with which the terms compare the student, by name.

    Args:
      teacher: the teacher; or all frozen models by name, with the teacher as "teacher"; or None.
      terms: the terms.

    Raises:
      ValueError: a term needs a model that is missing; or two models are needed, and one has no whole distributions.
    """
    given = dict(teacher) if isinstance(teacher, Mapping) else {"teacher": teacher}
    needed = dict.fromkeys(name for term in terms for name in term.members)
    teachers = {name: as_teacher(given.get(name)) for name in needed}
    for name, found in teachers.items():
        if found == NoTeacher():
            users = ", ".join(term.name for term in terms if name in term.members)
            if name == "teacher":
                raise ValueError(
                    f"the terms {users} compare with a teacher, but teacher.path is empty; set the teacher's folder."
                )
            raise ValueError(
                f"the terms {users} read the member {name!r}, but members has no {name!r}; define members.{name}."
            )
        if len(teachers) > 1 and not found.is_whole:
            raise ValueError(
                f"the member {name!r} has a cache of kind {getattr(found, 'kind', '')!r} without whole distributions, which "
                f"cannot be compared beside the members {', '.join(other for other in teachers if other != name)}."
            )
    return teachers


def compare(
    token_loss: Callable[..., Array], student: HiddenModel, params: PyTree, teacher: Teacher | HiddenModel | None,
    teacher_params: PyTree, batch: dict[str, Array], coefficient: Array, *extras: Array, vocab_size: int,
    temperature: float = 1.0, chunk: int | None = None, mesh: jax.sharding.Mesh | None = None,
) -> tuple[Array, Array]:  # fmt: skip
    """Returns `head_loss.token_sum` of a student and a teacher on a batch.

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
    teachers = {"teacher": as_teacher(teacher)}
    frozen = frozen_outputs(teachers, {"teacher": teacher_params}, batch, mesh)
    of_sides = lambda sides, log_q, *arrays: token_loss(*sides["teacher"], log_q, *arrays)
    return compare_outputs(
        of_sides, student_outputs(student, params, batch, mesh), teachers, frozen, coefficient, *extras,
        vocab_size=vocab_size, temperature=temperature, chunk=chunk, mesh=mesh,
    )  # fmt: skip


def student_outputs(
    student: HiddenModel, params: PyTree, batch: Mapping[str, Array], mesh: jax.sharding.Mesh | None
) -> Outputs:  # fmt: skip
    """Returns the student's hidden states on a batch, and the student's output matrix."""
    params = for_lookup(mesh, params)
    return outputs_of(student, params, student.hidden(params, batch["tokens"], batch["mask"]))


def frozen_outputs(
    teachers: Mapping[str, Teacher], params: Mapping[str, PyTree], batch: Mapping[str, Array],
    mesh: jax.sharding.Mesh | None,
) -> dict[str, Outputs]:  # fmt: skip
    """Returns the outputs of each frozen model on a batch, by the model's name."""
    return {name: teacher.outputs(for_lookup(mesh, params[name]), batch) for name, teacher in teachers.items()}


def compare_outputs(
    token_loss: Callable[..., Array], student: Outputs, teachers: Mapping[str, Teacher],
    frozen: Mapping[str, Outputs], coefficient: Array, *extras: Array, **options: Any,
) -> tuple[Array, Array]:  # fmt: skip
    """Returns `head_loss.token_sum` of a student and of several frozen models, from the outputs of the models.

    Args:
      token_loss: (sides, log_q, *extras) -> a value per token, or K values per token. `sides` has the two sides of
        `Teacher.align` for each frozen model, by name.
      student: the student's outputs, which get gradients.
      teachers: the frozen models, by name.
      frozen: the outputs of the frozen models, by name.
      coefficient, extras: the coefficients and further arrays, as in `token_sum`.
      **options: further arguments of `token_sum`.
    """
    pairs = {name: (outputs.hidden, outputs.head) for name, outputs in frozen.items()}
    of_heads = {name: (h, w) for name, (h, w) in pairs.items() if h is not None and w is not None}
    positions = {name: i for i, name in enumerate(of_heads)}
    own_sizes = [teachers[name].own_vocab_size for name in of_heads]
    counts = [len(outputs.extras) for outputs in frozen.values()]
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]

    assert student.hidden is not None and student.head is not None

    def loss(log_probs: tuple[Array, ...], log_q: Array, *arrays: Array) -> Array:
        sides = {
            name: teachers[name].align(
                log_probs[positions[name]] if name in positions else None, log_q, *arrays[end - count : end]
            )
            for name, count, end in zip(frozen, counts, ends, strict=True)
        }
        return token_loss(sides, log_q, *arrays[sum(counts) :])

    return token_sum(
        loss, student.hidden, student.head, [hidden for hidden, _ in of_heads.values()],
        [head for _, head in of_heads.values()], coefficient,
        *(array for outputs in frozen.values() for array in outputs.extras), *extras,
        tied=(student.tied, [frozen[name].tied for name in of_heads]), frozen_vocab_sizes=own_sizes or None,
        soft_caps=(student.logit_cap, [frozen[name].logit_cap for name in of_heads]), **options,
    )  # fmt: skip
