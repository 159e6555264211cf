"""Settings that make a loss independent of the student are errors, and similar valid settings are not."""

import jax
import jax.numpy as jnp
import pytest

from kd_jax import divergences, schedules
from kd_jax.run import checks
from kd_jax.run.build import make_objective
from kd_jax.settings import Settings
from tests.helpers.runs import smoke


def ramp(start, end, steps=10):
    return {"name": "linear_schedule", "init_value": start, "end_value": end, "transition_steps": steps}


def check(method="forward_kl", term=None, **changes):
    """Builds the terms and the source of a config as a run does. `term` holds changes of the first term."""
    config = smoke(method, "", **{"steps": 10} | changes)
    name = next(iter(config.objective.terms))
    for key, value in (term or {}).items():
        setattr(config.objective.terms[name], key, value)
    make_objective(Settings.parse(config))


def with_assistant(pair, weight, **changes):
    return dict(term=dict(assistant={"name": "arithmetic_mixture"}, pair=pair, weight=weight), **changes)


@pytest.mark.parametrize(
    ("name", "keyword", "value", "words"),
    [
        ("jensen_shannon", "weight", 0.0, "Use forward_kl for the limit at 0"),
        ("jensen_shannon", "weight", 1, "reverse_kl for the limit at 1"),
        ("skew_forward_kl", "skew", 1.0, "Use a skew below 1"),
        ("skew_reverse_kl", "skew", 1, "Use a skew below 1"),
    ],
)
def test_a_divergence_that_vanishes_is_refused_with_those_that_are_meant(name, keyword, value, words):
    log_p = jnp.log(jnp.array([0.5, 0.5]))
    with pytest.raises(ValueError, match=rf"{keyword}={value}.* 0 for all distributions") as error:
        getattr(divergences, name)(log_p, log_p, **{keyword: value})
    assert words in str(error.value)
    with pytest.raises(ValueError, match=f"objective.terms.distil: {keyword}={value}"):
        check(term=dict(divergence={"name": name, keyword: value}))


@pytest.mark.parametrize("weight", [1e-6, 0.5, 1 - 1e-6])
def test_the_limits_that_are_named_are_those_of_the_values(weight):
    log_p, log_q = jax.nn.log_softmax(jnp.array([[0.0, 1.0, 2.0], [1.0, -1.0, 0.5]]))
    with jax.enable_x64(True):
        value = divergences.jensen_shannon(log_p.astype(float), log_q.astype(float), weight=weight)
        if weight < 0.1:
            assert float(value / weight) == pytest.approx(float(divergences.forward_kl(log_p, log_q)), rel=1e-4)
        if weight > 0.9:
            assert float(value / (1 - weight)) == pytest.approx(float(divergences.reverse_kl(log_p, log_q)), rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (with_assistant(("teacher", "assistant"), 1.0), "weight is 1 for the whole run. The assistant then equals the teacher"),
        (with_assistant(("assistant", "teacher"), ramp(1.0, 1.0)), "weight is 1 for the whole run"),
        (with_assistant(("assistant", "student"), 0.0), "weight is 0 for the whole run. The assistant then equals the student"),
        (with_assistant(("student", "assistant"), ramp(0.0, 1.0, 1000), steps=1), "weight is 0 for the whole run"),
        (dict(term=dict(coefficient=0.0)), "coefficient is 0 for the whole run of 10 steps"),
        (dict(term=dict(coefficient=ramp(0.0, 0.0))), "coefficient is 0 for the whole run"),
        (dict(term=dict(coefficient={"name": "join_schedules", "schedules": (ramp(0.0, 0.0), ramp(0.0, 1.0)), "boundaries": (50,)})),
         "coefficient is 0 for the whole run"),
        (dict(term=dict(coefficient=ramp(0.0, float("inf")))), "coefficient is not finite in step"),
        (dict(method="minillm", objective__terms__text_labels__coefficient=0.0), "terms.text_labels.coefficient is 0"),
        (dict(term=dict(divergence={"name": f"{__name__}:of_the_teacher"})), "distil does not depend on the student"),
        (dict(term=dict(divergence={"name": "alpha_beta", "alpha": 200.0, "beta": 200.0})), "does not depend on the student"),
        (dict(objective__temperature=1e30), "objective.temperature=1e+30"),
        (dict(method="minillm", sampling__max_new_tokens=1), "terms.policy does not depend on the student"),
        (dict(method="minillm", objective__terms__policy__policy__reward_scale=1e30), "terms.policy does not depend"),
        (dict(method="minillm", objective__terms__policy__policy__reward_limit=1e-20), "terms.policy does not depend"),
        (dict(method="imitkd", term=dict(rows="student"), prefixes__fraction__end_value=0.0), "prefixes.fraction is 0 for the"),
    ],
)  # fmt: skip
def test_a_term_that_is_constant_for_the_whole_run_is_refused(changes, words):
    with pytest.raises(ValueError, match=r"objective\.terms\.\w+") as error:
        check(**changes)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        with_assistant(("teacher", "assistant"), 0.0),  # D(p || q)
        with_assistant(("assistant", "student"), 1.0),
        with_assistant(("student", "assistant"), ramp(0.0, 1.0)),  # the weight is 0 in one step only
        with_assistant(("teacher", "assistant"), ramp(0.0, 1.0, 9)),
        dict(term=dict(coefficient=ramp(1.0, 0.0, 2))),
        dict(term=dict(divergence={"name": "mixed_kl", "forward_weight": 0.0})),
        dict(term=dict(divergence={"name": "mixed_kl", "forward_weight": 1.0})),
        dict(term=dict(divergence={"name": "adaptive_kl", "head_mass": 0.0})),
        dict(term=dict(divergence={"name": "skew_forward_kl", "skew": 0.0})),
        dict(term=dict(divergence={"name": "alpha_beta", "alpha": 0.0, "beta": 0.0})),
        dict(term=dict(divergence={"name": "alpha_divergence", "alpha": 1.0})),
        dict(term=dict(divergence={"name": "jensen_shannon", "weight": 1e-4})),
        dict(method="minillm", sampling__max_new_tokens=2),
        dict(method="opd", sampling__max_new_tokens=1),
        dict(method="taid"),
    ],
)  # fmt: skip
def test_what_is_near_to_a_constant_loss_stays_possible(changes):
    check(**changes)


def of_the_teacher(log_p, log_q):
    return -(jnp.exp(log_p) * log_p).sum(-1)


@pytest.mark.parametrize(
    ("rate", "words"),
    [
        (0.0, "0 for the whole run of 3 steps"),
        (ramp(0.0, 1.0, 1000) | {"transition_begin": 10}, "0 for the whole run"),
        (ramp(0.1, -0.1, 2), "is -0.1 in step 2"),
        (float("nan"), "nan"),
    ],
)
def test_a_learning_rate_that_trains_nothing_is_refused(rate, words):
    given = {key: value for key, value in rate.items() if key != "name"} if isinstance(rate, dict) else None
    schedule = schedules.linear_schedule(**given) if given else schedules.constant_schedule(rate)
    with pytest.raises(ValueError, match="learning_rate is") as error:
        checks.check_learning_rate(schedule, 3)
    assert words in str(error.value)
    checks.check_learning_rate(schedules.linear_schedule(0.0, 1.0, 10), 3)


def test_a_skew_of_one_is_no_curriculum():
    with pytest.raises(ValueError, match="base must be below 1"):
        schedules.distillm2_skew(reference_steps=1, base=1.0)
