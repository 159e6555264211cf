"""A term of the objective, and the computation of its value and its weight at a token."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from optax.schedules import StatefulSchedule

from kd_jax.objectives.comparison import Arrays, Comparison, Logits
from kd_jax.objectives.span_terms import OF_TEACHER, SpanLikelihood, SpanLoss
from kd_jax.policy_gradient import Scores
from kd_jax.token_weights import scores as token_scores
from kd_jax.token_weights.functions import Rule, Score, TokenFunction

# Possible origins of a row's text; "text" is the second stream. A batch's `origin` holds indices into this tuple.
ORIGINS = ("data", "teacher", "student", "text")
ROWS = ("all", *ORIGINS)  # all: every row of the first stream
LOG_P, LOG_Q = Score(token_scores.log_p, ("teacher", "target")), Score(token_scores.log_q, ("student", "target"))


@dataclasses.dataclass(frozen=True)
class Term:
    """One summand of the objective: the average, over the tokens of some rows, of weight(token) * loss(token).

    Attributes:
      name: the term's key in the config and in the metrics.
      loss: (logits, target, arrays) -> a value per token. `logits` has the logits of the student and of each of
        `members`. `arrays` has the values of `numbers` and `signals`, and the assistant's weight as "weight".
      members: the frozen models that the term reads.
      weight: the schedule of the assistant's weight.
      coefficient: the schedule of the factor that multiplies the term.
      rows: the rows to which the term applies, named by the origin of their text.
      average: one of `token_arrays.AVERAGES`.
      numbers: the schedules of further numbers, by the names under which `loss` and the rules look them up.
      signals: scores -> arrays [B, L] without gradient, by name, for `loss`; None without signals.
      reward_members: the coefficient of each frozen model's log-probability in the `log_p` of the scores.
      rule: the weight of each token; None if each counted token has the weight 1.
      gate: the rows that count; None for all.
      temperature_rule: a rule that gives the factor of each token's temperature; None without such a rule.
      temperature: the temperature of the objective, by which the logits are divided.
      where: column of the dataset -> the values that a row of the term may have. The batch then has the array
        `where_NAME` [B, L], which is True for the tokens of these rows.
      spans: the comparison of spans with a teacher of another tokenizer, which is then also `loss`; or None.
    """

    name: str
    loss: Callable[[Logits, Array, Arrays], Array]
    members: tuple[str, ...]
    weight: StatefulSchedule
    coefficient: StatefulSchedule
    rows: str
    average: str
    numbers: Mapping[str, StatefulSchedule] = dataclasses.field(default_factory=dict)
    signals: Callable[[Scores], dict[str, Array]] | None = None
    reward_members: Mapping[str, float] = dataclasses.field(default_factory=lambda: {"teacher": 1.0})
    rule: Rule | None = None
    gate: TokenFunction | None = None
    temperature_rule: TokenFunction | None = None
    temperature: float = 1.0
    where: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    spans: SpanLoss | None = None

    @property
    def needs_teacher(self) -> bool:
        """True if the term reads a frozen model."""
        return bool(self.members)

    @property
    def schedules(self) -> tuple[StatefulSchedule, ...]:
        """The schedules of the weight, of the coefficient, and of the further numbers."""
        return (self.weight, self.coefficient, *self.numbers.values())

    @property
    def needs_scores(self) -> bool:
        """True if the targets' log-probabilities are needed before the loss is computed."""
        return self.signals is not None or needs_scores(self.weight)

    @property
    def token_functions(self) -> dict[str, TokenFunction]:
        """The rule, the gate and the rule of the temperature, by the key of the config that names them."""
        parts = {"tokens": self.rule, "row_gate": self.gate, "temperature": self.temperature_rule}
        return {key: part for key, part in parts.items() if part is not None}

    @property
    def has_local_rule(self) -> bool:
        """True if the weight of a token is a function of this token's distributions, computed beside the loss."""
        if self.rule is None or self.rule.looks_at_batch:
            return False
        return bool(self.rule.scores) or not {"divergence", "drawn_log_q"}.isdisjoint(self.rule.inputs)

    @property
    def divides_by_kept(self) -> bool:
        """True if the weighted sum is divided by the sum of the weights, and not by the number of counted tokens."""
        return self.rule is not None and self.rule.divide_by == "kept"

    @property
    def early_parts(self) -> tuple[TokenFunction, ...]:
        """The rules and the gate whose scores must be known before the loss is computed."""
        is_early = lambda part: part is not self.rule or not self.has_local_rule
        return tuple(part for part in self.token_functions.values() if is_early(part))

    @property
    def early_scores(self) -> dict[str, tuple[str, Score]]:
        """The scores that must be known before the loss is computed: label -> the member that is p, and the score."""
        parts = self.early_parts
        found = {label: ("teacher", of_token) for part in parts for label, of_token in part.scores.items()}
        if self.needs_scores or any("drawn_log_q" in part.inputs for part in parts):
            found["log_q"] = "teacher", LOG_Q
        if self.needs_scores:
            found |= {f"log_p of {member}": (member, LOG_P) for member in self.reward_members}
        if self.takes_slopes and self.spans is not None:
            scores = {"log_q": LOG_Q, **self.spans.scores}
            found |= {label: ("teacher", of_token) for label, of_token in scores.items()}
        return found

    def scores_of_spans(self, frozen: Mapping[str, Any]) -> dict[str, Array]:
        """Returns the teacher's values of the spans, by label, from the outputs of the frozen models by name."""
        return dict(zip(OF_TEACHER, frozen["teacher"].extras, strict=True)) if self.takes_slopes else {}

    @property
    def takes_slopes(self) -> bool:
        """True if the term compares likelihoods of spans, whose gradient needs the likelihoods first."""
        return isinstance(self.spans, SpanLikelihood)

    @property
    def needs_own_values_early(self) -> bool:
        """True if a rule over rows or over the batch reads the values of the term's own loss."""
        return any("divergence" in part.inputs for part in self.early_parts)

    @property
    def whole_readers(self) -> tuple[str, ...]:
        """The keys of the term that need the teacher's distribution over the whole vocabulary."""
        reads = lambda part: any("teacher" in found.reads for found in part.scores.values())
        of_loss = self.loss.whole_readers if isinstance(self.loss, Comparison) else ()
        of_numbers = tuple(name for name in self.numbers if name in ("temperature", "teacher_temperature"))
        of_scores = ("kind or weight",) if self.needs_scores else ()
        return (*of_loss, *of_numbers, *(key for key, part in self.token_functions.items() if reads(part)), *of_scores)

    def weighted_loss(self, logits: Logits, target: Array, arrays: Arrays) -> tuple[Array, Array]:
        """Returns the loss of each token times the weight of a local rule, and this weight, which is 1 without a rule.

        Args:
          logits: the logits [..., V] of the student and of `members`.
          target: the token that follows in the row, [...].
          arrays: the arrays [...] that `loss` and the rule look up.
        """
        value = self.loss(logits, target, arrays)
        if self.rule is None or not self.has_local_rule:
            return value, jnp.ones_like(value)
        constant = jax.lax.stop_gradient(logits)
        values = {
            label: evaluate_score(of_token, constant, "teacher", target) for label, of_token in self.rule.scores.items()
        }
        if "drawn_log_q" in self.rule.inputs:
            drawn = evaluate_score(LOG_Q, constant, "teacher", target)
            arrays = {**arrays, "drawn_log_q": drawn_log_probs(drawn, arrays)}
        values |= {name: arrays[name] for name in (*self.rule.inputs, *self.rule.numbers) if name != "divergence"}
        weight = checked_weights(self.rule(values | {"divergence": jax.lax.stop_gradient(value)}))
        weight = jax.lax.stop_gradient(weight.astype(value.dtype))
        return weight * value, weight


def count_apart(terms: Sequence[Term]) -> bool:
    """Returns True if a token may count in one term and not in another, whose gradient there need not be finite."""
    choices = [(term.rows, term.where, term.gate, None if term.has_local_rule else term.rule) for term in terms]
    return any(choice != choices[0] for choice in choices)


@jax.custom_vjp
def counted_gradient(logits: Array, counted: Array) -> Array:
    """Returns the logits [..., V]. Their gradient is 0, and not NaN, at tokens that do not count, [...]."""
    return logits


counted_gradient.defvjp(
    lambda logits, counted: (logits, counted),
    lambda counted, gradient: (jnp.where(counted[..., None], gradient, 0), None),
)


def evaluate_score(of_token: Score, logits: Logits, member: str, target: Array) -> Array:
    """Returns a score of each token, from the models' logits.

    Args:
      of_token: the score.
      logits: the logits [..., V] of the student and of the frozen models.
      member: the frozen model whose distribution is p.
      target: the token that follows in the row, [...].
    """
    sides = {"teacher": member, "student": "student"}
    log_probs = {name: jax.nn.log_softmax(logits[model]) for name, model in sides.items() if name in of_token.reads}
    return of_token(target=target, **log_probs)


def drawn_log_probs(log_q: Array, arrays: Arrays) -> Array:
    """Returns the log-probabilities of the targets under the student that sampled them; log q for text of other origin.

    Args:
      log_q: the targets' log-probabilities under the current student.
      arrays: `by_student`, True for text of the student, and `log_probs`; both are missing if no text is the student's.
    """
    return jnp.where(arrays["by_student"], arrays["log_probs"], log_q) if "by_student" in arrays else log_q


def checked_weights(weights: Array) -> Array:
    """Returns the weights, with NaN in place of a weight that is negative or infinite.

    The step then counts as a step that is not finite, and is reported.
    """
    return jnp.where((weights >= 0) & jnp.isfinite(weights), weights, jnp.nan)


def needs_scores(schedule: StatefulSchedule) -> bool:
    """Returns True if a schedule reads the scores of the rows."""
    return getattr(schedule, "needs_scores", False)
