"""A teacher with another tokenizer than the student, and the arrays of a batch from which this teacher reads.

Both models read the same text as tokens of their own, after a prompt in their own format. The likelihoods of common spans
of the text are compared (`kd_jax.data.alignment`, `kd_jax.objectives.span_terms`), or the distributions at the first
token of each span.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PyTree

from kd_jax import spans
from kd_jax.head_loss import token_sum
from kd_jax.objectives import Term
from kd_jax.objectives.comparison import cross_entropy
from kd_jax.objectives.span_terms import OF_STUDENT, SpanLikelihood
from kd_jax.teachers.online import Online, outputs_of
from kd_jax.teachers.protocol import NoTeacher, Outputs, Teacher

PARTS = ("tokens", "targets", "mask", "of_teacher")  # the teacher's arrays [B, T]; the student's is `OF_STUDENT`


class AlignedRow(NamedTuple):
    """A row as the teacher reads it, and the spans of the tokens that both models predict.

    Attributes:
      tokens: the teacher's row: prompt and response.
      of_teacher: the span of each token of the teacher's row after the first one; -1 for none.
      of_student: the span of each token of the student's row after the first one; -1 for none.
    """

    tokens: Int[np.ndarray, " T+1"]
    of_teacher: Int[np.ndarray, " T"]
    of_student: Int[np.ndarray, " L"]


def aligned_arrays(
    rows: Sequence[AlignedRow], num_lines: int, *, length: int, teacher_length: int, pad_id: int
) -> dict[str, np.ndarray]:  # fmt: skip
    """Returns the arrays of a batch from which `Aligned` reads. Each line has one row.

    Args:
      rows: the rows of the lines. Lines beyond `rows` are padding.
      num_lines: the number B of lines of the batch.
      length: the number L of the student's positions.
      teacher_length: the number T of the teacher's positions, at least the length of each row.
      pad_id: the teacher's padding token.
    """
    tokens, targets = (np.full((num_lines, teacher_length), pad_id, np.int32) for _ in range(2))
    mask = np.zeros((num_lines, teacher_length), bool)
    of_teacher = np.full((num_lines, teacher_length), -1, np.int32)
    of_student = np.full((num_lines, length), -1, np.int32)
    for i, row in enumerate(rows):
        size = max(len(row.tokens) - 1, 0)
        tokens[i, :size], targets[i, :size], mask[i, :size] = row.tokens[:-1], row.tokens[1:], True
        of_teacher[i, :size] = row.of_teacher
        of_student[i, : len(row.of_student)] = row.of_student
    arrays = dict(zip(PARTS, (tokens, targets, mask, of_teacher), strict=True))
    return {f"teacher_span_{name}": array for name, array in arrays.items()} | {OF_STUDENT: of_student}


@dataclasses.dataclass(frozen=True, eq=False)
class Aligned(Online):
    """A model that reads the arrays of `aligned_arrays` in place of the student's tokens.

    Attributes:
      model: the model.
      vocab_size: the number of ids of the teacher's tokenizer.
      begins_word: True for each of the teacher's ids that begins a word or ends the text.
      student_begins_word: the same for the student's ids.
      path: the teacher's path, for messages.
      compares_likelihoods: True if a term reads the likelihoods of spans.
      reads_ends: True if a term reads the probabilities that words end.
      compares_distributions: True if a term compares distributions at the first tokens of spans.
      chunk: the number of tokens whose logits are held at a time, as in `head_loss.token_sum`.
      mesh: the mesh of the batch, or None.
    """

    vocab_size: int | None = None
    begins_word: Bool[np.ndarray, " V"] | None = None
    student_begins_word: Bool[np.ndarray, " W"] | None = None
    path: str = ""
    compares_likelihoods: bool = True
    reads_ends: bool = False
    compares_distributions: bool = False
    chunk: int | None = None
    mesh: jax.sharding.Mesh | None = None
    measures: ClassVar[tuple[str, ...]] = ()

    @property
    def own_vocab_size(self) -> int | None:
        """The number of ids of the teacher's tokenizer."""
        return self.vocab_size

    def for_terms(self, terms: Sequence[Term]) -> "Aligned":
        """Returns the teacher that computes only the outputs that the terms read."""
        of_spans = [term.spans for term in terms if term.spans is not None]
        return dataclasses.replace(
            self,
            compares_likelihoods=any(isinstance(term, SpanLikelihood) for term in of_spans),
            compares_distributions=any(not isinstance(term, SpanLikelihood) for term in of_spans),
            reads_ends=any(term.reads_ends for term in of_spans),
        )

    def terms(self, terms: Sequence[Term]) -> tuple[Term, ...]:
        """Returns the terms, of which those that compare spans know the student's ids that begin a word.

        Raises:
          ValueError: a term compares the teacher's distribution over the student's vocabulary.
        """
        for term in terms:
            if term.spans is None and "teacher" in term.members:
                raise ValueError(
                    f"objective.terms.{term.name} compares distributions over one vocabulary, but another term has kind='spans', "
                    f"for which the teacher {self.path} reads tokens of its own. Set kind='spans' or kind='hard_labels', or let the "
                    f"term read a member with the student's tokenizer."
                )
        return tuple(map(self._with_ids, terms))

    def _with_ids(self, term: Term) -> Term:
        if not isinstance(term.spans, SpanLikelihood) or self.student_begins_word is None:
            return term
        loss = dataclasses.replace(term.spans, begins_word=jnp.asarray(self.student_begins_word))
        return dataclasses.replace(term, loss=loss, spans=loss)

    def outputs(self, params: PyTree, batch: Mapping[str, Array]) -> Outputs:
        """Returns the hidden states at the first token of each span, and values of the spans as extras.

        The hidden states are at the student's positions, or None if no term compares distributions. The extras [B, L] have
        the spans along L: the log-likelihood, the log-probability that the last word ends with the span, and 1 where this
        probability is known. The extras are empty if no term compares likelihoods.

        Raises:
          ValueError: the batch lacks the arrays of this teacher.
        """
        names = [*(f"teacher_span_{part}" for part in PARTS), OF_STUDENT]
        if missing := [name for name in names if name not in batch]:
            raise ValueError(
                f"the teacher has another tokenizer, but the batch has no {missing[0]}. Make the batch with a run's feed or with "
                f"teachers.aligned.aligned_arrays."
            )
        tokens, targets, mask, of_teacher, of_student = (batch[name] for name in names)
        hidden = self.model.hidden(params, tokens, mask)
        whole = outputs_of(self.model, params, hidden)
        extras = ()
        if self.compares_likelihoods:
            extras = self._of_spans(whole, targets, mask, of_teacher, of_student.shape[1])
        if not self.compares_distributions:
            return Outputs(None, None, extras=extras)
        at = jnp.where(spans.is_first(of_teacher), jnp.arange(of_teacher.shape[1]), 0)
        first = spans.sums(at, of_teacher, of_student.shape[1])
        positions = jnp.take_along_axis(first, jnp.maximum(of_student, 0), axis=1)
        return whole._replace(hidden=jnp.take_along_axis(hidden, positions[..., None], axis=1), extras=extras)

    def _of_spans(
        self, whole: Outputs, targets: Array, mask: Array, of_teacher: Array, count: int
    ) -> tuple[Array, Array, Array]:
        """Returns the extras of `outputs` for `count` spans, from the model's outputs at all positions."""
        assert whole.hidden is not None and whole.head is not None
        is_last = spans.is_last(of_teacher)
        needed = of_teacher >= 0
        if self.reads_ends:  # also at the position after each span
            needed = needed | (mask & jnp.pad(is_last[:, :-1], ((0, 0), (1, 0))))

        def values(log_p: None, log_q: Array, target: Array) -> Array:
            columns = [-cross_entropy(log_q, target)]
            if self.reads_ends:
                assert self.begins_word is not None
                begins = jnp.asarray(self.begins_word)[: log_q.shape[-1]]
                columns.append(jax.nn.logsumexp(jnp.where(begins, log_q, -jnp.inf), axis=-1))
            return jnp.stack(columns, axis=-1)

        weight = jnp.repeat(needed[..., None].astype(jnp.float32), 1 + self.reads_ends, axis=-1)
        found = token_sum(
            values, whole.hidden, whole.head, None, None, weight, targets, tied=(whole.tied, False),
            vocab_size=self.vocab_size, chunk=self.chunk, soft_caps=(whole.logit_cap, None), mesh=self.mesh,
        )[1]  # fmt: skip
        log_p = spans.sums(found[..., 0], of_teacher, count)
        if not self.reads_ends:
            return log_p, jnp.zeros_like(log_p), jnp.zeros_like(log_p)
        shifted = lambda array: jnp.pad(array[:, 1:], ((0, 0), (0, 1)))
        known = is_last & shifted(mask)
        of_last = lambda values: spans.sums(jnp.where(known, values, 0), of_teacher, count)
        return log_p, of_last(shifted(found[..., 1])), of_last(jnp.ones_like(found[..., 0]))

    def on_new_text(self) -> Teacher:
        """Returns no teacher, because the distributions of both models over tokens cannot be compared."""
        return NoTeacher()

    def described(self, path: str) -> str:
        """Returns the path, the number of the model's parameters, and that the tokenizer is another one."""
        return f"{super().described(path)} (with a tokenizer of its own; spans of text are compared)"
