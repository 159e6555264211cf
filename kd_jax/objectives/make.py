"""Makes the terms of the objective from their description in a config, and checks all of them."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from optax.schedules import StatefulSchedule

from kd_jax import (
    assistants,
    divergences,
    logit_transforms,
    policy_gradient,
    resolve,
    schedules,
    supports,
    temperatures,
)
from kd_jax.divergences import of_one
from kd_jax.objectives.comparison import Arrays, Comparison, Logits, Temperatures, check_pair, cross_entropy
from kd_jax.objectives.span_terms import SpanLoss, make_spans
from kd_jax.objectives.spec import TermSpec, check_keys, has_function, name_of_call, values_by_column
from kd_jax.objectives.terms import ROWS, Term, needs_scores
from kd_jax.objectives.token_arrays import AVERAGES
from kd_jax.policy_gradient import Scores
from kd_jax.settings import Config
from kd_jax.token_weights import temperatures as of_scores
from kd_jax.token_weights.shapes import check_numbers
from kd_jax.token_weights.specs import TokenFunction, make_gate, make_rule, make_temperature

KINDS = ("divergence", "hard_labels", "policy_gradient", "spans")
TWO_SIDED = ("teacher_top_k", "union", "intersection")  # the supports that need a teacher
TEMPERATURE_RULES = tuple(of_scores.__all__)


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
            loss, numbers, temperature_rule = _divergence_loss(spec, temperature, members)
            read = tuple(member for member in loss.members if member != "student")
        for key, part in ("tokens", rule), ("row_gate", gate), ("temperature", temperature_rule):
            numbers |= {} if part is None else _schedules_of(key, part)
        if spec["importance"]:
            loss = _weighted(loss)
            signals = lambda scores: {"importance": policy_gradient.importance_now(scores, teacher_share)}
        weight, coefficient = _schedule(spec["weight"], of_rows=spec["rows"]), _schedule(spec["coefficient"])
    except ValueError as error:
        raise ValueError(f"objective.terms.{name}: {error}") from error
    term = Term(
        name, loss, read, weight, coefficient, spec["rows"], spec["average"], numbers, signals, reward_members, rule, gate,
        temperature_rule, temperature, where, compared,
    )  # fmt: skip
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


def _schedule(spec: Any, of_rows: str = "") -> StatefulSchedule:
    """Returns a number or a spec as a stateful schedule, and refuses any other value.

    A schedule that reads the scores of rows must be for the rows named by `of_rows`.
    """
    schedule = schedules.as_stateful(spec if isinstance(spec, int | float) else resolve.build(spec, schedules))
    if needs_scores(schedule) and (rows := getattr(schedule, "rows", None)) != of_rows:
        use = f"the weight of a term with rows={of_rows!r}" if of_rows else "another number"
        raise ValueError(
            f"{type(schedule).__name__}(rows={rows!r}) can only be the weight of a term with rows={rows!r}, but is {use}."
        )
    return schedule


def _schedules_of(key: str, part: TokenFunction) -> dict[str, StatefulSchedule]:
    """Returns the schedules of the options of a rule, by name, after a check of their first values."""
    try:
        found = {name: _schedule(spec) for name, spec in part.numbers.items()}
        check_numbers(part, {name: schedules.first_value(schedule) for name, schedule in found.items()})
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
    return found


def _divergence_loss(
    spec: Mapping[str, Any], temperature: float, members: tuple[str, ...]
) -> tuple[Comparison, dict[str, StatefulSchedule], TokenFunction | None]:
    """Returns the loss, the schedules of its numbers by name, and the rule of its temperature over the batch."""
    has_assistant, pair, between = has_function(spec["assistant"]), tuple(spec["pair"]), tuple(spec["between"])
    among = _among(spec, members)
    check_pair(pair, tuple(among) or between, has_assistant, spec["stop_gradient"], members)
    if set(between) - {"teacher", "student", *members} or len(set(between)) != 2:
        known = ", ".join(("teacher", "student", *members))
        raise ValueError(f"between={between} must be two different members out of {known}.")
    assistant, of_assistant = _assistant(spec, among) if has_assistant else (None, {})
    support = supports.make_support(spec["vocabulary"])
    divergence = _divergence(spec, is_short=support is not None and support.is_short)
    found_temperatures, of_temperatures, rule = _temperatures(spec, temperature)
    if len(pair) == 1 and (name := spec["vocabulary"].get("support")) in TWO_SIDED:
        raise ValueError(
            f"vocabulary.support={name!r} is chosen with the teacher, but pair={pair} names one member; use student_top_k."
        )
    loss = Comparison(
        divergence, pair, assistant, between, among, spec["stop_gradient"], found_temperatures,
        support, resolve.takes(divergence, "target"), _takes_logits(divergence), tuple(of_assistant),
    )  # fmt: skip
    if loss.takes_logits and (has_assistant or loss.support is not None):
        raise ValueError(
            f"divergence={spec['divergence']} compares logits, which an assistant and a vocabulary other than the whole do "
            "not have; choose a divergence of log-probabilities."
        )
    if found_temperatures.rule is not None and not {"teacher", "student"} <= set(loss.members):
        raise ValueError(
            f"temperature={spec['temperature']} reads the teacher's and the student's logits, but pair={pair} compares others."
        )
    numbers = {f"assistant.{keyword}": schedule for keyword, schedule in of_assistant.items()}
    return loss, numbers | of_temperatures, rule


def _among(spec: Mapping[str, Any], members: tuple[str, ...]) -> dict[str, float]:
    """Returns the members among which the assistant is computed, with their weights; {} for an assistant between two."""
    known = ("teacher", "student", *members)
    for name in spec["weights"]:
        if name not in known:
            raise ValueError(f"weights has {name!r}, which is not one of {', '.join(known)}; define members.{name}.")
    among = {name: resolve.check_number(f"weights.{name}", number) for name, number in spec["weights"].items()}
    if among and (spec["weight"] != 0 or not has_function(spec["assistant"])):
        raise ValueError(
            f"weights={among} needs an assistant, and weight=0.0, because the weights replace weight and between."
        )
    if among and abs(sum(among.values()) - 1) > 1e-6:
        raise ValueError(
            f"weights={among} sum to {sum(among.values()):g}, but the weights of an assistant must sum to 1."
        )
    return among


def _assistant(
    spec: Mapping[str, Any], among: dict[str, float]
) -> tuple[Callable[..., Array], dict[str, StatefulSchedule]]:
    """Returns the assistant, and the schedules of its keywords that have a schedule."""
    function, keywords = resolve.look_up(spec["assistant"], assistants, positional=True)
    extrapolates = function is assistants.extrapolation
    if not extrapolates:
        for name, number in (among or {"weight": spec["weight"]}).items():
            if isinstance(number, int | float):
                resolve.check_fraction(f"weights.{name}" if among else "weight", number)
    if among and function not in assistants.AMONG:
        known = ", ".join(of_two.__name__ for of_two in assistants.AMONG)
        raise ValueError(
            f"assistant={spec['assistant']} is between two members, but weights names {len(among)}; use {known}."
        )
    if among:
        return assistants.AMONG[function], {}
    scheduled = {k: _schedule(v) for k, v in keywords.items() if not isinstance(v, int | float)}
    first_values = {k: schedules.first_value(schedule) for k, schedule in scheduled.items()}
    return resolve.close(function, (), **keywords | first_values), scheduled


def _divergence(spec: Mapping[str, Any], is_short: bool) -> Callable[..., Array]:
    """Returns the divergence, as a sum of contributions if these are clipped, or if `is_short`.

    Distributions that are short of 1 have the divergence's sum over the outcomes that are left, not its other forms.
    """
    given, pair, is_of_one = spec["divergence"], spec["pair"], len(spec["pair"]) == 1
    name = str(given.get("name") if isinstance(given, Mapping) else given).partition("(")[0]
    if name in (divergences if is_of_one else of_one).__all__:
        known = ", ".join(of_one.__all__)
        raise ValueError(
            f"divergence={spec['divergence']} and pair={pair}: the functions of one distribution are {known}, for which the "
            "pair names one member, such as pair=('student',). All other divergences compare two members."
        )
    divergence = resolve.bind(spec["divergence"], of_one if is_of_one else divergences, later=("target",))
    arrays = [jax.ShapeDtypeStruct((2,), jnp.float32)] * len(pair)
    token = jax.ShapeDtypeStruct((), jnp.int32)
    keywords = {"target": token} if resolve.takes(divergence, "target") else {}
    if (shape := jax.eval_shape(divergence, *arrays, **keywords).shape) != ():
        raise ValueError(
            f"divergence={spec['divergence']}: for vectors the function returns an array of shape {shape}, but it "
            "must sum over the last axis and return a scalar."
        )
    clip, has_entries = spec["entry_clip"], divergence.func.__name__ in divergences.ENTRIES
    if not has_entries and clip:
        raise ValueError(
            f"entry_clip={clip} bounds the contribution of each vocabulary entry, but divergence={spec['divergence']} is not a "
            f"sum of known contributions; these are {', '.join(divergences.ENTRIES)}."
        )
    if not has_entries or not (clip or is_short):
        return divergence
    entries = partial(divergences.ENTRIES[divergence.func.__name__], **divergence.keywords)

    def of_entries(log_p: Array, log_q: Array) -> Array:
        contributions = entries(log_p, log_q)
        return jnp.sum(jnp.minimum(contributions, clip) if clip else contributions, axis=-1)

    return of_entries


def _takes_logits(divergence: Callable[..., Array]) -> bool:
    return resolve.array_parameters(divergence)[:2] == ["teacher_logits", "student_logits"]


def _temperatures(
    spec: Mapping[str, Any], objective: float
) -> tuple[Temperatures, dict[str, StatefulSchedule], TokenFunction | None]:
    """Returns the temperatures of a term, their schedules by name, and the rule over the batch if there is one."""
    transform = resolve.bind(spec["logits"], logit_transforms) if has_function(spec["logits"]) else None
    numbers: dict[str, float | None] = {}
    scheduled: dict[str, StatefulSchedule] = {}
    pair_rule, batch_rule = None, None
    for key in ("temperature", "teacher_temperature"):
        value = spec[key]
        if isinstance(value, int | float):
            numbers[key] = None if value == 0 else resolve.check_number(key, value, 1e-6)
        elif key == "temperature" and (name := name_of_call(value)) in resolve.names(temperatures):
            pair_rule = resolve.bind(value, temperatures)
        elif key == "temperature" and name in TEMPERATURE_RULES:
            batch_rule = make_temperature(value)
        else:
            scheduled[key] = _schedule(value)
    if (pair_rule or batch_rule) and spec["teacher_temperature"] != 0:
        raise ValueError(
            f"temperature={spec['temperature']} gives the temperatures of all models; set teacher_temperature=0.0."
        )
    found = Temperatures(
        objective, numbers.get("temperature"), numbers.get("teacher_temperature"), pair_rule, transform,
        spec["temperature_squared"],
    )  # fmt: skip
    return found, scheduled, batch_rule


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
