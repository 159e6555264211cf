"""Makes the terms of the objective from their description in a config, and checks all of them."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
from jaxtyping import Array
from optax.schedules import StatefulSchedule

from kd_jax import divergences, policy_gradient, resolve, schedules
from kd_jax.objectives.comparison import Arrays, Logits, cross_entropy
from kd_jax.objectives.make_comparison import make_comparison, schedule_of
from kd_jax.objectives.span_terms import SpanLoss, make_spans
from kd_jax.objectives.spec import TermSpec, check_keys, values_by_column
from kd_jax.objectives.terms import ROWS, Term
from kd_jax.objectives.token_arrays import AVERAGES
from kd_jax.policy_gradient import Scores
from kd_jax.settings import Config
from kd_jax.token_weights.shapes import check_numbers
from kd_jax.token_weights.specs import TokenFunction, make_gate, make_rule

KINDS = ("divergence", "hard_labels", "policy_gradient", "spans")


def make_terms(
    specs: Config, temperature: float = 1.0, teacher_share: float = 0.0, max_new_tokens: int | None = None,
    members: tuple[str, ...] = (),
) -> tuple[Term, ...]:  # fmt: skip
    """Returns the terms that a config describes. All terms are checked before anything is computed.

    Args:
      specs: a dict or ConfigDict from names to terms, as `kd_jax.settings.Term` declares them. A key that is missing in a
        term has its default value. A name with None in place of a term is skipped.
      temperature: the divisor of the logits. The loss of hard labels is defined at temperature 1, so this loss undoes
        the division.
      teacher_share: the teacher's share of the mixture from which the student's rows were sampled; 0 for rows that the
        student sampled alone.
      max_new_tokens: the largest number of tokens in a sampled response; None for all positions of a row.
      members: the names of further frozen models, beside the teacher.

    Returns:
      The terms, in the order of the config.

    Raises:
      ValueError: a name is unknown or a number is out of range. The message names the term and the known names.
    """
    if not temperature > 0:
        raise ValueError(f"objective.temperature={temperature} must be above 0.")
    make = partial(
        _make_term, temperature=temperature, teacher_share=teacher_share, max_new_tokens=max_new_tokens, members=members
    )
    terms = tuple(make(name, specs[name]) for name in specs if specs[name] is not None)
    if not terms:
        raise ValueError("objective.terms is empty: define at least one term, as configs/forward_kl.py does.")
    return terms


def _make_term(
    name: str, given: Config, temperature: float, teacher_share: float, max_new_tokens: int | None,
    members: tuple[str, ...],
) -> Term:  # fmt: skip
    try:
        spec = TermSpec(given)
        for key, known in (("rows", ROWS), ("average", AVERAGES), ("kind", KINDS)):
            if spec[key] not in known:
                raise ValueError(f"{key}={spec[key]!r} is not one of {', '.join(known)}.")
        kind, rule, gate = spec["kind"], make_rule(spec["tokens"]), make_gate(spec["row_gate"])
        where = values_by_column(spec["where"])
        check_keys(spec)
        signals: Callable[[Scores], dict[str, Array]] | None = None
        reward_members, numbers, temperature_rule, read = {"teacher": 1.0}, {}, None, ()
        compared: SpanLoss | None = None
        if kind == "hard_labels":
            loss = partial(_hard_labels, temperature)
        elif kind == "policy_gradient":
            loss, signals = _policy_gradient(spec["policy"], teacher_share, max_new_tokens)
            reward_members = _reward_members(spec["policy"]["members"], members)
            read = tuple(reward_members)
        elif kind == "spans":
            loss = compared = make_spans(spec["spans"], temperature)
            read = ("teacher",)
        else:
            loss, numbers, temperature_rule = make_comparison(spec, temperature, members)
            read = tuple(member for member in loss.members if member != "student")
        for key, part in ("tokens", rule), ("row_gate", gate), ("temperature", temperature_rule):
            numbers |= {} if part is None else _schedules_of(key, part)
        if spec["importance"]:
            loss = _weighted(loss)
            signals = lambda scores: {"importance": policy_gradient.importance_now(scores, teacher_share)}
        weight, coefficient = schedule_of(spec["weight"], of_rows=spec["rows"]), schedule_of(spec["coefficient"])
    except ValueError as error:
        raise ValueError(f"objective.terms.{name}: {error}") from error
    term = Term(
        name, loss, read, weight, coefficient, spec["rows"], spec["average"], numbers, signals, reward_members, rule, gate,
        temperature_rule, temperature, where, compared,
    )  # fmt: skip
    if term.average == "batch_token" and term.divides_by_kept:
        raise ValueError(
            f"objective.terms.{name}: average='batch_token' divides by the number of the batch's tokens, but tokens.divide_by is "
            "'kept'; set 'all'."
        )
    _check_own_values(term)
    return dataclasses.replace(term, members=_members_of(term))


def _check_own_values(term: Term) -> None:
    """Checks that a rule over the batch can read the term's loss, if it does, before the step has its scores."""
    if not term.needs_own_values_early or not term.needs_scores:
        return
    parts = term.token_functions.items()
    key = next(key for key, part in parts if part in term.early_parts and "divergence" in part.inputs)
    raise ValueError(
        f"objective.terms.{term.name}: {key}: a rule over rows or over the batch cannot read divergence in a term whose loss "
        "or weight depends on sampled tokens; let the rule read another score."
    )


def _members_of(term: Term) -> tuple[str, ...]:
    """Returns the frozen models that the loss, the rules and the schedules of a term read."""
    parts = term.token_functions.values()
    reads_teacher = any("teacher" in score.reads for part in parts for score in part.scores.values())
    of_scores = tuple(term.reward_members) if term.needs_scores else ()
    return tuple(dict.fromkeys((*term.members, *of_scores, *(("teacher",) if reads_teacher else ()))))


def _schedules_of(key: str, part: TokenFunction) -> dict[str, StatefulSchedule]:
    """Returns the schedules of the options of a rule, by name, after a check of their first values."""
    try:
        found = {name: schedule_of(spec) for name, spec in part.numbers.items()}
        check_numbers(part, {name: schedules.first_value(schedule) for name, schedule in found.items()})
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
    return found


def _hard_labels(temperature: float, logits: Logits, target: Array, arrays: Arrays) -> Array:
    # temperature * logits are the logits at temperature 1.
    student = logits["student"] if temperature == 1 else temperature * logits["student"]
    return cross_entropy(jax.nn.log_softmax(student), target)


def _weighted(loss: Callable[[Logits, Array, Arrays], Array]) -> Callable[[Logits, Array, Arrays], Array]:
    """Returns the loss times the importance weight."""
    return lambda logits, target, arrays: arrays["importance"] * loss(logits, target, arrays)


def _reward_members(given: Mapping[str, Any], members: tuple[str, ...]) -> dict[str, float]:
    """Returns the coefficient of each frozen model's log-probability in the reward."""
    known = ("teacher", *members)
    for name in given:
        if name not in known:
            raise ValueError(
                f"policy.members has {name!r}, which is not one of {', '.join(known)}; define members.{name}."
            )
    found = {name: resolve.check_number(f"policy.members.{name}", number) for name, number in given.items()}
    if not any(found.values()):
        raise ValueError(f"policy.members={dict(given)} has no coefficient other than 0; set {{'teacher': 1.0}}.")
    return found


def _policy_gradient(
    options: Config, teacher_share: float, max_new_tokens: int | None
) -> tuple[Callable[[Logits, Array, Arrays], Array], Callable[[Scores], dict[str, Array]]]:
    """Returns the clipped surrogate of the sampled tokens, and the function that computes each token's constants."""
    of_scores = policy_gradient.make_signals(options, teacher_share, max_new_tokens)
    baseline, scale, clip = options["baseline"], options["reward_scale"], options["clip"]

    def signals(scores: Scores) -> dict[str, Array]:
        return dict(zip(("advantage", "drawn_log_q", "importance"), of_scores(scores), strict=True))

    def loss(logits: Logits, target: Array, arrays: Arrays) -> Array:
        log_q, advantage = jax.nn.log_softmax(logits["student"]), arrays["advantage"]
        if baseline == "kl":  # subtracting the exact mean of the reward, which is -KL(q || p), reduces the variance
            log_p = jax.nn.log_softmax(logits["teacher"])
            advantage = advantage + jax.lax.stop_gradient(divergences.reverse_kl(log_p, log_q)) / scale
        return policy_gradient.clipped_surrogate(
            -cross_entropy(log_q, target), arrays["drawn_log_q"], advantage, arrays["importance"], clip
        )

    return loss, signals
