"""Spans of text that two tokenisations share: likelihoods of spans, and distributions over different vocabularies.

An array `span` [B, L] has the index of the span of the token that each position predicts, and -1 where the token is in no
span. The indices of a row never decrease, and the same index stands for the same text in the rows of both models.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Likelihoods(NamedTuple):
    """The log-probabilities of the tokens of a row under one model.

    Attributes:
      tokens: the log-probability of the token that each position predicts.
      span: the index of the span of this token, -1 for none.
      after: the log-probability that a token which begins a word, or ends the text, follows this token; None if the
        likelihood of a span does not include the end of the last word.
    """

    tokens: Float[Array, "B L"]
    span: Int[Array, "B L"]
    after: Float[Array, "B L"] | None = None


def sums(values: Float[Array, "B L"], span: Int[Array, "B L"], count: int) -> Float[Array, "B S"]:
    """Returns the sum of the values over each of `count` spans, which is 0 for a span without a token.

    Example:
      >>> sums(jnp.array([[1.0, 2.0, 4.0, 8.0]]), jnp.array([[-1, 0, 0, 1]]), 3).tolist()
      [[6.0, 8.0, 0.0]]
    """
    of_row = lambda values, span: jnp.zeros(count, values.dtype).at[span].add(values, mode="drop")
    # A negative index counts from the end, so tokens of no span get an index after the last span.
    return jax.vmap(of_row)(values, jnp.where(span >= 0, span, count))


def is_last(span: Int[Array, "B L"]) -> Bool[Array, "B L"]:
    """Returns True at the last token of each span.

    Example:
      >>> is_last(jnp.array([[-1, 0, 0, 1]])).tolist()
      [[False, False, True, True]]
    """
    following = jnp.pad(span[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    return (span >= 0) & (span != following)


def is_first(span: Int[Array, "B L"]) -> Bool[Array, "B L"]:
    """Returns True at the first token of each span."""
    return is_last(span[:, ::-1])[:, ::-1]


def log_likelihoods(model: Likelihoods, count: int) -> Float[Array, "B S"]:
    """Returns the log-likelihood of each of `count` spans under a model, at most 0.

    A model with another tokenizer may have to decide at another place whether a word goes on. With `after`, the
    likelihood includes that the word ends with the span, which makes the likelihoods of both models comparable.
    """
    found = sums(model.tokens, model.span, count)
    if model.after is None:
        return found
    return jnp.minimum(found + sums(jnp.where(is_last(model.span), model.after, 0), model.span, count), 0)


def joined(span: Int[Array, "B L"], joins: Bool[Array, "B S"]) -> Int[Array, "B L"]:
    """Returns the indices of spans of which some are joined to the next span.

    Args:
      span: the indices of the spans.
      joins: True for a span that is joined to the next one.

    Example:
      >>> joined(jnp.array([[-1, 0, 1, 1, 2]]), jnp.array([[True, False, False]])).tolist()
      [[-1, 0, 0, 0, 1]]
    """
    index = jnp.cumsum(~joins, axis=1) - ~joins
    return jnp.where(span >= 0, jnp.take_along_axis(index, jnp.maximum(span, 0), axis=1), -1)


def join_spans(teacher: Likelihoods, student: Likelihoods, at_most: float) -> tuple[Likelihoods, Likelihoods]:
    """Joins each span to the next one if the teacher is nearly certain that the last word goes on.

    Args:
      teacher, student: the tokens of both models, with `after` of the teacher.
      at_most: the largest probability that the word ends with a span which is joined to the next one.
    """
    assert teacher.after is not None
    count = teacher.span.shape[1]
    ends = sums(jnp.where(is_last(teacher.span), jnp.exp(teacher.after), 0), teacher.span, count)
    found = sums(is_last(teacher.span).astype(ends.dtype), teacher.span, count) > 0
    joins = found & (ends <= at_most)
    # A student's row may have more positions than the teacher's, but both have the same spans.
    wide = jnp.pad(joins, ((0, 0), (0, max(0, student.span.shape[1] - count))))
    return teacher._replace(span=joined(teacher.span, joins)), student._replace(span=joined(student.span, wide))


def sorted_distance(log_p: Float[Array, "*batch V"], log_q: Float[Array, "*batch W"]) -> Float[Array, "*batch"]:
    """Returns ``sum |p_i - q_i|`` of the i-th largest probabilities of two distributions, over any two vocabularies.

    The shorter list of probabilities is filled up with zeros. The value is between 0 and 2, and is 0 if both
    distributions have the same probabilities for any tokens.

    Example:
      >>> round(float(sorted_distance(jnp.log(jnp.array([0.9, 0.1])), jnp.log(jnp.array([0.2, 0.2, 0.6])))), 4)
      0.6

    References:
      Boizard et al., "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs",
      https://arxiv.org/abs/2402.12030, 2024, equation 5.
    """
    p, q = (jnp.sort(jnp.exp(log), axis=-1)[..., ::-1] for log in (log_p, log_q))
    size = max(p.shape[-1], q.shape[-1])
    fill = lambda values: jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, size - values.shape[-1])])
    return jnp.sum(jnp.abs(fill(p) - fill(q)), axis=-1)
