"""The part of a term's computation that a step does before the loss: schedules, token weights, and coefficients."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree
from optax.schedules import StatefulSchedule

from kd_jax.objectives.span_terms import OF_STUDENT
from kd_jax.objectives.terms import ORIGINS, Term, checked_weights, drawn_log_probs
from kd_jax.objectives.token_arrays import positions, positions_from_end, row_means, row_numbers, token_coefficients
from kd_jax.policy_gradient import Scores

Batch = Mapping[str, Array]
# name -> (sum, count). The average is computed by the code that has all the sums.
Metrics = dict[str, tuple[Array, Array]]
States = tuple[PyTree, ...]  # the states of the schedules of a term


@dataclasses.dataclass(frozen=True)
class PreparedTerm:
    """A term with the values that a step computes before the models' distributions are compared.

    Attributes:
      term: the term.
      counted: True where a token counts in the term, [B, L].
      means: the means over each row that the term's schedules read, by name.
      weight: the current weight of the assistant, a scalar or [B].
      term_coefficient: the current coefficient of the term, a scalar.
      token_weight: the weight of each token, [B, L]; None without a rule, or if the rule is local.
      token_coefficient: the factor of each token's loss, [B, L]: `term_coefficient` times `token_weight` times the
        token's share of the average.
      arrays: the arrays [B, L] that `Term.weighted_loss` looks up.
    """

    term: Term
    counted: Array
    means: dict[str, Array]
    weight: Array
    term_coefficient: Array
    token_weight: Array | None
    token_coefficient: Array
    arrays: dict[str, Array]

    def next_schedules(self, states: States, step: Array, loss: tuple[Array, Array]) -> States:
        """Returns the next states of the term's schedules, from the result of `mean_loss`."""
        return tuple(
            _next_state(schedule, state, step, loss, self.means)
            for schedule, state in zip(self.term.schedules, states, strict=True)
        )

    def mean_loss(self, values: Array) -> tuple[Array, Array]:
        """Returns the sum of the weighted token losses, and the divisor of their mean.

        Args:
          values: the token losses, [B, L], times the weights of a local rule.
        """
        divisor = self.counted
        if self.token_weight is not None:
            values = values * self.token_weight
            divisor = self.token_weight if self.term.divides_by_kept else self.counted
        return values.sum(), jnp.where(self.term_coefficient != 0, divisor.sum(dtype=values.dtype), 0)

    def metrics(self, loss: tuple[Array, Array], local_weight: Array | None) -> Metrics:
        """Returns the metrics of the term, from the result of `mean_loss` and the weights of a local rule, if there is one."""
        name, rows = self.term.name, self.counted.any(axis=1).astype(jnp.float32)
        metrics = {
            f"{name}/loss": loss,
            f"{name}/weight": ((self.weight * rows).sum(), rows.sum()),
            f"{name}/coefficient": (jnp.asarray(self.term_coefficient), jnp.ones((), jnp.float32)),
        }
        weights = self.rule_weights(local_weight)
        if weights is not None:
            count = self.counted.sum(dtype=jnp.float32)
            metrics[f"{name}/token_weight"] = (weights.sum(), count)
            metrics[f"{name}/tokens_kept"] = ((weights != 0).sum(dtype=jnp.float32), count)
        return metrics

    def rule_weights(self, local_weight: Array | None) -> Array | None:
        """Returns the weights of the rule at the tokens that count, and 0 elsewhere, [B, L]; None without a rule.

        Args:
          local_weight: the weights of a local rule, [B, L].
        """
        token_weight = local_weight if self.token_weight is None else self.token_weight
        if self.term.rule is None or token_weight is None:
            return None
        return jnp.where(self.counted, token_weight, 0)


def counted_tokens(term: Term, batch: Batch) -> Array:
    """Returns True where a token counts in a term, [B, L]."""
    mask = batch["loss_mask"] & batch[f"where_{term.name}"] if term.where else batch["loss_mask"]
    if "origin" not in batch:  # without origin, every row is from a dataset
        return mask & (term.rows in ("all", "data"))
    if term.rows == "all":
        return mask & _is_first_stream(batch)
    return mask & (batch["origin"] == ORIGINS.index(term.rows))[:, None]


def _is_first_stream(batch: Batch) -> Array:
    """Returns an array that broadcasts to [B, L], False for the rows of plain text, which are a second stream of rows."""
    return batch["origin"][:, None] != ORIGINS.index("text") if "origin" in batch else jnp.ones((1, 1), bool)


def prepare(
    term: Term,
    states: States,
    early: dict[str, Array],
    counted: Array,
    batch: Batch,
    step: Array,
    params: PyTree,
) -> PreparedTerm:
    """Evaluates a term's schedules and its rules over the batch, and makes the coefficients of the term's tokens.

    Args:
      term: the term.
      states: the states of the term's schedules.
      early: the values of `Term.early_scores` at the counted tokens, [B, L], by label.
      counted: True where a token counts in the term, [B, L].
      batch: the batch.
      step: the number of the step, from 0.
      params: the student's parameters, whose type decides the type of the numbers.
    """
    per_token = lambda number: jnp.broadcast_to(number[..., None] if number.ndim == 1 else number, counted.shape)
    segments = None if batch["mask"].dtype == bool else batch["mask"]
    arrays = _drawn_arrays(term, batch)
    scores = _target_scores(term, early, arrays, counted)
    means = {} if scores is None else row_means(scores)
    values = [
        schedule(schedule_state, step=step, **means)
        for schedule, schedule_state in zip(term.schedules, states, strict=True)
    ]
    weight, term_coefficient, *numbers = as_real(values, params)
    arrays |= {"weight": per_token(weight)} | dict(zip(term.numbers, map(per_token, numbers), strict=True))
    if term.signals is not None and scores is not None:
        arrays |= term.signals(scores)
    inputs = _rule_inputs(term, early, arrays, counted, segments, batch)
    if term.has_local_rule:
        arrays |= inputs
    token_weight = None
    if term.rule is not None and not term.has_local_rule:
        token_weight = checked_weights(as_real(term.rule(early | arrays | inputs), params))
        token_weight = jnp.where(counted, token_weight, 0)
    if term.temperature_rule is not None:
        kept = counted.astype(jnp.float32) if token_weight is None else token_weight
        factor = term.temperature_rule(early | arrays | inputs | {"weights": kept})
        arrays["temperature"] = as_real(term.temperature * factor, params)
    touched = None
    if term.spans is not None:
        counted, touched, of_spans = term.spans.prepare(early, batch[OF_STUDENT], counted)
        arrays |= as_real(of_spans, params)
    if term.gate is not None:
        counted = counted & term.gate(early | arrays | inputs)
        token_weight = None if token_weight is None else jnp.where(counted, token_weight, 0)
    shared = counted if token_weight is None or not term.divides_by_kept else token_weight
    batch_count = jnp.sum(batch["loss_mask"] & _is_first_stream(batch))
    share = as_real(token_coefficients(term.average, shared, segments, batch_count), params)
    if token_weight is not None and not term.divides_by_kept:
        share = share * token_weight
    if touched is not None:  # all spans of a row have the same share, which each of their tokens gets
        share = jnp.where(touched, share.max(axis=1, keepdims=True), 0)
    coefficient = term_coefficient * share
    return PreparedTerm(term, counted, means, weight, term_coefficient, token_weight, coefficient, arrays)


def _drawn_arrays(term: Term, batch: Batch) -> dict[str, Array]:
    """Returns the arrays with which `drawn_log_probs` finds the log-probabilities of sampled targets."""
    reads_drawn = term.needs_scores or any("drawn_log_q" in part.inputs for part in (term.rule, term.gate) if part)
    if not reads_drawn or "origin" not in batch:
        return {}
    by_student = batch["origin"] == ORIGINS.index("student")
    return {
        "by_student": jnp.broadcast_to(by_student[:, None], batch["log_probs"].shape), "log_probs": batch["log_probs"]
    }  # fmt: skip


def _target_scores(term: Term, early: dict[str, Array], drawn: dict[str, Array], counted: Array) -> Scores | None:
    """Returns the scores that a term's schedules and signals read; None if they read none."""
    if not term.needs_scores:
        return None
    log_p = sum(share * early[f"log_p of {member}"] for member, share in term.reward_members.items())
    drawn_log_q = jnp.where(counted, drawn_log_probs(early["log_q"], drawn), 0)
    return Scores(jnp.asarray(log_p), early["log_q"], drawn_log_q, counted)


def _rule_inputs(
    term: Term, early: dict[str, Array], arrays: dict[str, Array], counted: Array, segments: Array | None, batch: Batch
) -> dict[str, Array]:  # fmt: skip
    """Returns the inputs of a term's rules that are no scores of a distribution, [B, L] each."""
    names = {name for part in term.token_functions.values() for name in part.inputs}
    if not names:
        return {}
    row = row_numbers(counted, segments)
    inputs = {
        "counted": counted, "row": row, "position": positions(counted, row),
        "position_from_end": positions_from_end(counted, row),
    }  # fmt: skip
    if "log_q" in early:
        inputs["drawn_log_q"] = jnp.where(counted, drawn_log_probs(early["log_q"], arrays), 0)
    if "has_view" in batch:
        inputs["has_view"] = batch["has_view"]
    return {name: array for name, array in inputs.items() if name in names}


def _next_state(
    schedule: StatefulSchedule, state: PyTree, step: Array, loss: tuple[Array, Array], means: dict[str, Array]
) -> PyTree:  # fmt: skip
    """Returns a schedule's next state, from the sum and the count of the term's values.

    With a count of 0 the state does not change.
    """
    total, count = loss
    new = schedule.update(state, step=step, loss=total / jnp.maximum(count, 1), **means)
    return where(count > 0, jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), new, state), state)


def where(condition: Array, new: PyTree, old: PyTree) -> PyTree:
    return jax.tree.map(lambda new, old: jnp.where(condition, new, old), new, old)


def as_real(tree: PyTree, params: PyTree) -> PyTree:
    """Casts the floating-point numbers of a tree to float32, or to float64 if a parameter is float64.

    JAX's default type is never used. With JAX_ENABLE_X64=1 the default is float64, and the numbers of a float32 model
    must not depend on this setting.
    """
    floats = [leaf.dtype for leaf in jax.tree.leaves(params) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    real = jnp.result_type(jnp.float32, *floats)
    return jax.tree.map(lambda x: jnp.asarray(x, real) if jnp.issubdtype(jnp.result_type(x), jnp.floating) else x, tree)
