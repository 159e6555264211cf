"""Terms that compare a student with a teacher of another tokenizer: the comparisons that the key `spans` names.

The batch has the tokens of both models, and the index of the span of each token (`teachers/aligned.py`). A likelihood of
a span is a sum over tokens. Its loss is a function of all tokens of the span, so the gradient takes two steps: a sweep
finds the log-probabilities of the tokens, then each token gets the derivative of the loss as a constant slope.
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kd_jax import resolve, span_divergences, spans
from kd_jax.objectives.comparison import Arrays, Logits, cross_entropy
from kd_jax.resolve import Spec
from kd_jax.spans import Likelihoods
from kd_jax.token_weights.functions import Score

__all__ = ["likelihood", "sorted_distance"]

OF_STUDENT = "teacher_span_of_student"  # name of a batch's array [B, L]: the span of each target, -1 for none
LOG_END = "log_end"  # label of the score: the log-probability that a word ends before a position
OF_TEACHER = ("span_log_p", "span_log_end", "span_end_known")  # the outputs of `teachers.Aligned`, [B, L] by span


class Prepared(NamedTuple):
    """The part of a comparison of spans that a step computes before the loss.

    Attributes:
      counted: True at one token of each span, which stands for the span in averages, [B, L].
      touched: True at each token whose loss or gradient is not 0, [B, L].
      arrays: the arrays [B, L] that the loss reads.
    """

    counted: Bool[Array, "B L"]
    touched: Bool[Array, "B L"]
    arrays: dict[str, Array]


@dataclasses.dataclass(frozen=True, eq=False)
class SpanLikelihood:
    """A divergence of the likelihoods of each span under teacher and student.

    Attributes:
      divergence: (log_p, log_q) -> a value per span.
      word_ends: True if the likelihood includes that the last word ends with the span.
      join_at_most: the largest probability that a word ends with a span that is joined to the next one; 0: none is.
      begins_word: True for each of the student's ids that begins a word or ends the text; None before it is known.
    """

    divergence: Callable[[Array, Array], Array]
    word_ends: bool = False
    join_at_most: float = 0.0
    begins_word: Bool[Array, " V"] | None = None

    @property
    def reads_ends(self) -> bool:
        """True if the teacher's probabilities that a word ends are needed."""
        return self.word_ends or self.join_at_most > 0

    @property
    def scores(self) -> dict[str, Score]:
        """The scores of the student that are needed before the loss, beside `log_q`."""
        return {LOG_END: Score(self.log_end, ("student",))} if self.word_ends else {}

    def log_end(self, log_q: Float[Array, "... V"]) -> Float[Array, "..."]:
        """Returns the log-probability of the ids that begin a word or end the text."""
        assert self.begins_word is not None
        return jax.nn.logsumexp(jnp.where(self.begins_word[: log_q.shape[-1]], log_q, -jnp.inf), axis=-1)

    def prepare(self, early: Arrays, span: Int[Array, "B L"], counted: Bool[Array, "B L"]) -> Prepared:
        """Returns the value of each span, and the derivative of the value with respect to each token.

        Args:
          early: `log_q` and `scores` of the student, and `OF_TEACHER`.
          span: the span of each of the student's tokens.
          counted: True where a token counts.
        """
        span = jnp.where(counted, span, -1)
        length = span.shape[1]
        exists = spans.sums(jnp.ones_like(early["log_q"]), span, length) > 0
        teacher = Likelihoods(early["span_log_p"], jnp.where(exists, jnp.arange(length), -1))
        known = jnp.zeros(span.shape, bool)
        if self.reads_ends:
            following = jnp.pad(counted[:, 1:], ((0, 0), (0, 1)))  # a position after the token, in both rows
            has_next = spans.sums((spans.is_last(span) & following).astype(early["log_q"].dtype), span, length) > 0
            known = has_next & (early["span_end_known"] > 0)
            teacher = teacher._replace(after=jnp.where(known, early["span_log_end"], 0))
        student = Likelihoods(early["log_q"], span)
        if self.word_ends:
            shifted = jnp.pad(early[LOG_END][:, 1:], ((0, 0), (0, 1)))
            known_at = (span >= 0) & jnp.take_along_axis(known, jnp.maximum(span, 0), axis=1)
            student = student._replace(after=jnp.where(known_at, shifted, 0))
        if self.join_at_most > 0:
            teacher, student = spans.join_spans(teacher, student, self.join_at_most)
        if not self.word_ends:
            teacher = teacher._replace(after=None)
        return self._with_slopes(teacher, student)

    def _with_slopes(self, teacher: Likelihoods, student: Likelihoods) -> Prepared:
        span, length = student.span, student.span.shape[1]
        exists = spans.sums(jnp.ones_like(student.tokens), span, length) > 0
        log_p = jnp.where(exists, spans.log_likelihoods(teacher, length), -1.0)

        def total(tokens: Array, after: Array | None) -> tuple[Array, Array]:
            log_q = spans.log_likelihoods(Likelihoods(tokens, span, after), length)
            values = jnp.where(exists, self.divergence(log_p, jnp.where(exists, log_q, -1.0)), 0)
            return values.sum(), values

        of_both = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)
        (_, values), (slope, end_slope) = of_both(student.tokens, student.after)
        is_last = spans.is_last(span)
        value = jnp.where(is_last, jnp.take_along_axis(values, jnp.maximum(span, 0), axis=1), 0)
        arrays = {"span_value": value, "slope": slope}
        touched = span >= 0
        if end_slope is not None:
            # The word ends at the position after the last token of the span.
            arrays["end_slope"] = jnp.pad(end_slope[:, :-1], ((0, 0), (1, 0)))
            touched = touched | (arrays["end_slope"] != 0)
        return Prepared(is_last, touched, arrays)

    def __call__(self, logits: Logits, target: Array, arrays: Arrays) -> Array:
        """Returns the value of each span at its last token, with the gradient of the value at all tokens of the span."""
        log_q = jax.nn.log_softmax(logits["student"])
        linear = arrays["slope"] * -cross_entropy(log_q, target)
        if self.word_ends:
            linear = linear + arrays["end_slope"] * self.log_end(log_q)
        return arrays["span_value"] + linear - jax.lax.stop_gradient(linear)


@dataclasses.dataclass(frozen=True, eq=False)
class SortedDistance:
    """The distance between the sorted probabilities of both models for the first token of each span.

    Both models have then read the same text. Teacher and student may have vocabularies of different sizes.

    Attributes:
      temperature: the divisor of the logits of both models.
    """

    temperature: float = 1.0
    reads_ends = False
    scores: Mapping[str, Score] = dataclasses.field(default_factory=dict)

    def prepare(self, early: Arrays, span: Int[Array, "B L"], counted: Bool[Array, "B L"]) -> Prepared:
        """Returns the first token of each span, at which the distributions are compared."""
        first = spans.is_first(jnp.where(counted, span, -1))
        return Prepared(first, first, {})

    def __call__(self, logits: Logits, target: Array, arrays: Arrays) -> Array:
        """Returns the distance at each token."""
        log_p, log_q = (jax.nn.log_softmax(logits[name] / self.temperature) for name in ("teacher", "student"))
        return spans.sorted_distance(log_p, log_q)


SpanLoss = SpanLikelihood | SortedDistance


def likelihood(
    *, divergence: Spec = "binary_kl", word_ends: bool = False, join_at_most: float = 0.0
) -> SpanLikelihood:  # fmt: skip
    """Returns the divergence of the likelihoods of each span, as approximate likelihood matching compares them.

    Args:
      divergence: a spec of `kd_jax.span_divergences`.
      word_ends: True to include in a span's likelihood that the last word ends with the span. Each model's probability
        of this is that of all its tokens which begin a word or end the text.
      join_at_most: a span is joined to the next one while the teacher's probability that the word ends is at most this
        number; 0 joins no spans.

    Raises:
      ValueError: the divergence is unknown, or a number is out of range.
    """
    resolve.check_number("join_at_most", join_at_most, 0.0, 1.0)
    return SpanLikelihood(resolve.bind(divergence, span_divergences), bool(word_ends), float(join_at_most))


def sorted_distance(*, temperature: float = 1.0) -> SortedDistance:
    """Returns the sorted distance at the first token of each span, as universal logit distillation compares them.

    Args:
      temperature: the divisor of the logits of both models.

    Raises:
      ValueError: the temperature is not above 0.
    """
    return SortedDistance(resolve.check_number("temperature", temperature, 1e-6))


def make_spans(spec: Spec, objective_temperature: float) -> SpanLoss:
    """Returns the comparison of spans that a spec names.

    Raises:
      ValueError: a name or a number is wrong, or the objective has a temperature of its own.
    """
    if objective_temperature != 1:
        raise ValueError(
            f"kind='spans' has likelihoods at temperature 1, but objective.temperature={objective_temperature}; set 1.0, and the "
            f"temperature of the term in its key spans."
        )
    factory, keywords = resolve.look_up(spec, sys.modules[__name__], positional=False)
    return factory(**keywords)
