"""Makes the comparison of a term of kind divergence, from the description of the term in a config."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from optax.schedules import StatefulSchedule

from kd_jax import assistants, divergences, logit_transforms, resolve, schedules, supports, temperatures
from kd_jax.divergences import of_one
from kd_jax.objectives.comparison import Comparison, Temperatures, check_pair
from kd_jax.objectives.spec import has_function, name_of_call
from kd_jax.objectives.terms import needs_scores
from kd_jax.token_weights import temperatures as of_scores
from kd_jax.token_weights.specs import TokenFunction, make_temperature

TWO_SIDED = ("teacher_top_k", "union", "intersection")  # the supports that need a teacher
TEMPERATURE_RULES = tuple(of_scores.__all__)


def make_comparison(
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
    scheduled = {k: schedule_of(v) for k, v in keywords.items() if not isinstance(v, int | float)}
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
            scheduled[key] = schedule_of(value)
    if (pair_rule or batch_rule) and spec["teacher_temperature"] != 0:
        raise ValueError(
            f"temperature={spec['temperature']} gives the temperatures of all models; set teacher_temperature=0.0."
        )
    found = Temperatures(
        objective, numbers.get("temperature"), numbers.get("teacher_temperature"), pair_rule, transform,
        spec["temperature_squared"],
    )  # fmt: skip
    return found, scheduled, batch_rule


def schedule_of(spec: Any, of_rows: str = "") -> StatefulSchedule:
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
