"""The protocol of a teacher, and the teacher of a run without a teacher."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple, Protocol, TypeVar

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from kd_jax.divergences import forward_kl, reverse_kl, total_variation
from kd_jax.objectives import Term

T = TypeVar("T")


class Outputs(NamedTuple):
    """The outputs of a teacher for a batch, aligned with the student's positions.

    Attributes:
      hidden: the hidden states after the final norm, from which the head makes logits; None if the teacher has none.
      head: the output matrix, [D, V], or [V, D] if it is tied; None if the teacher has no hidden states.
      tied: True if the output matrix is the tied embedding [V, D].
      extras: further arrays [B, L, ...], which `Teacher.align` takes.
      logit_cap: the cap c of the logits, c * tanh(hidden @ head / c); None for no cap.
    """

    hidden: Float[Array, "B L D"] | None
    head: Float[Array, "..."] | None
    tied: bool = False
    extras: tuple[Array, ...] = ()
    logit_cap: float | None = None


class Teacher(Protocol):
    """The distributions with which a student is compared. The default methods are for a teacher with hidden states.

    A teacher is hashable, so `jax.jit` can close over it or take it as a static argument.

    Attributes:
      measures: the names of the values of `measure`.
      is_whole: True if the teacher's side of a comparison is a distribution over the whole vocabulary.
    """

    is_whole: ClassVar[bool] = True
    measures: ClassVar[tuple[str, ...]] = ("forward_kl", "reverse_kl", "total_variation", "top1_agreement")

    @property
    def own_vocab_size(self) -> int | None:
        """The number of the teacher's ids, if the teacher has a vocabulary of its own; None for the student's."""
        return None

    def outputs(self, params: PyTree, batch: Mapping[str, Array]) -> Outputs:
        """Returns the teacher's outputs for a batch.

        Args:
          params: the teacher's parameters.
          batch: tokens and mask [B, L], and the arrays of `teacher_arrays`.
        """
        ...

    def align(self, log_p: Array | None, log_q: Float[Array, "*batch V"], *extras: Array) -> tuple[PyTree, Array]:
        """Returns the two sides of a comparison, over the outcomes for which the teacher has probabilities.

        Args:
          log_p: the log-probabilities from the teacher's hidden states; None if the teacher has none.
          log_q: the student's log-probabilities.
          *extras: `Outputs.extras` at the same tokens.

        Returns:
          The teacher's side, and the student's log-probabilities over the same outcomes.
        """
        return log_p, log_q

    def terms(self, terms: Sequence[Term]) -> tuple[Term, ...]:
        """Returns the terms with losses that accept the two sides that `align` returns."""
        return tuple(terms)

    def measure(self, teacher_side: PyTree, student_side: Array, log_q: Float[Array, "*batch V"]) -> tuple[Array, ...]:
        """Returns the distances for an evaluation, one value per token for each name in `measures`.

        Args:
          teacher_side: the teacher's side from `align`.
          student_side: the student's side from `align`.
          log_q: the student's log-probabilities over the whole vocabulary.
        """
        same = jnp.argmax(teacher_side, axis=-1) == jnp.argmax(log_q, axis=-1)
        return (*distances(teacher_side, student_side), same)

    def on_new_text(self) -> "Teacher":
        """Returns the teacher for rows that are not in the dataset, such as text that the student writes."""
        return self

    def described(self, path: str) -> str:
        """Returns a few words about the teacher for the first line of a run.

        Args:
          path: the config's `teacher.path`.
        """
        ...


@dataclasses.dataclass(frozen=True)
class NoTeacher(Teacher):
    """The teacher of a run without a teacher. The teacher's side of a comparison is None."""

    measures: ClassVar[tuple[str, ...]] = ()

    def outputs(self, params: PyTree, batch: Mapping[str, Array]) -> Outputs:
        """Returns outputs without any array."""
        return Outputs(None, None)

    def measure(self, teacher_side: PyTree, student_side: Array, log_q: Float[Array, "*batch V"]) -> tuple[Array, ...]:
        """Returns an empty tuple."""
        return ()

    def described(self, path: str) -> str:
        """Returns 'no teacher'."""
        return "no teacher"


def distances(log_p: Array, log_q: Array) -> tuple[Array, Array, Array]:
    """Returns KL(p || q), KL(q || p) and the total variation."""
    return forward_kl(log_p, log_q), reverse_kl(log_p, log_q), total_variation(log_p, log_q)


def teacher_arrays(batch: Mapping[str, T]) -> dict[str, T]:
    """Returns the arrays of a batch that are from a teacher's cache. Their names begin with teacher_."""
    return {name: array for name, array in batch.items() if name.startswith("teacher_")}
