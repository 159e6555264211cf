"""Compares TAID's schedule with a trace of its published code, and checks the protocol of all schedules."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kd_jax import schedules
from tests.helpers.paths import GOLDEN

TRACE = dict(np.load(GOLDEN / "taid_trace.npz"))
RUNS = sorted({key.rsplit("/", 1)[0] for key in TRACE})


@pytest.mark.parametrize("double", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize("run", RUNS)
def test_taid_trace(run, double):
    names = {"t_start": "start", "t_end": "end"}
    keywords = {names.get(k, k): float(v) for k, v in re.findall(r"(\w+)=([\d.]+)", run) if k != "N"}
    adaptive = "disable_adaptive=True" not in run
    steps = int(run.rsplit("N=", 1)[1])
    trace = {key.rsplit("/", 1)[1]: value for key, value in TRACE.items() if key.startswith(run + "/")}
    with jax.enable_x64(double):
        schedule = schedules.taid(total_steps=steps, disable_adaptive=not adaptive, **keywords)
        state = schedule.init()
        assert state.value.dtype == (jnp.float64 if double else jnp.float32)
        for step, loss in enumerate(trace["losses"]):
            np.testing.assert_allclose(schedule(state, step=step), trace["t_before"][step], rtol=2e-6)
            state = schedule.update(state, step=step, loss=loss)
            np.testing.assert_allclose(state.value, trace["t_after"][step], rtol=2e-6)
            np.testing.assert_allclose(state.momentum, trace["momentum"][step], rtol=1e-4, atol=1e-7)


def test_taid_is_a_pytree_that_scans_to_its_end():
    schedule = schedules.taid(total_steps=50, start=0.2, end=0.9)

    @jax.jit
    def run(state):
        def body(state, step):
            return schedule.update(state, step=step, loss=2.0 - 0.01 * step), schedule(state, step=step)

        return jax.lax.scan(body, state, jnp.arange(80))

    state, values = run(schedule.init())
    assert (np.diff(values) >= 0).all() and values[0] == np.float32(0.2)
    np.testing.assert_allclose(state.value, 0.9)  # the end value does not change after total_steps


def test_taid_passes_no_gradient():
    schedule = schedules.taid(total_steps=10, alpha=0.5)
    state = schedule.update(schedule.init(), step=0, loss=2.0)
    assert jax.grad(lambda loss: schedule.update(state, step=1, loss=loss).value)(1.0) == 0


@pytest.mark.parametrize(
    "keywords, named",
    [
        ({"total_steps": 0}, "total_steps .*0"),
        ({"total_steps": 10, "start": 1.0}, "start is 1.0"),
        ({"total_steps": 10, "start": -0.1}, "start .*-0.1"),
        ({"total_steps": 10, "end": 1.1}, "end .*1.1"),
        ({"total_steps": 10, "start": 0.5, "end": 0.4}, "start is 0.5 and end is 0.4"),
        ({"total_steps": 10, "alpha": 2}, "alpha .*2"),
        ({"total_steps": 10, "beta": float("nan")}, "beta .*nan"),
    ],
)
def test_taid_names_a_number_out_of_range(keywords, named):
    with pytest.raises(ValueError, match=named):
        schedules.taid(**keywords)


def test_one_protocol_for_all():
    for given in (0.25, schedules.constant_schedule(0.25), schedules.taid(total_steps=10, start=0.25)):
        schedule = schedules.as_stateful(given)
        assert isinstance(schedule, optax.schedules.StatefulSchedule)
        state = schedule.init()

        @jax.jit
        def step(state, number, schedule=schedule):
            return schedule(state, step=number), schedule.update(state, step=number, loss=1.0)

        value, new_state = step(state, 0)
        assert value == 0.25 and value.dtype == jnp.float32
        assert jax.tree.structure(new_state) == jax.tree.structure(state)
    assert schedules.as_stateful(schedule) is schedule
    rising = schedules.as_stateful(schedules.linear_schedule(0.0, 1.0, 4))
    assert [float(rising(rising.init(), step=step)) for step in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]


def test_every_schedule_is_optax_s_own_or_ours():
    for name in schedules.__all__:
        assert name in ("adaptive_fraction", "adaptive_increase", "skew_by_gap", "by_stage") or getattr(
            schedules, name
        ) is getattr(optax.schedules, name)
    missing = {name for name in dir(optax.schedules) if name.endswith("_schedule") and name[0] != "_"} - set(
        schedules.__all__
    )
    assert not missing


@pytest.mark.parametrize("schedule", [None, "0.1", float("inf"), True])
def test_what_is_no_schedule_is_named(schedule):
    with pytest.raises(ValueError, match=f"schedule.*{schedule!r}"):
        schedules.as_stateful(schedule)


def test_stages_have_equal_lengths_and_the_last_value_stays():
    schedule = schedules.by_stage((1.0, 1.33, 1.67, 2.0), total_steps=10)
    found = np.asarray(jax.vmap(schedule)(jnp.arange(12)))
    expected = [(1.0, 1.33, 1.67, 2.0)[min(4 * step // 10, 3)] for step in range(12)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("values", "steps", "words"),
    [((), 4, "at least one number"), ((1.0, float("nan")), 4, r"values\[1\]"), ((1.0, 2.0), 1, "total_steps")],
)
def test_stages_are_checked(values, steps, words):
    with pytest.raises(ValueError, match=words):
        schedules.by_stage(values, total_steps=steps)


@pytest.mark.parametrize("double", [False, True], ids=["float32", "float64"])
def test_an_adaptive_fraction_stays_between_its_bounds(double):
    with jax.enable_x64(double):
        schedule = schedules.adaptive_fraction(total_steps=8, smallest=0.6, rate=0.3, decay=0.0, warmup=0.25)
        state, found = schedule.init(), []
        for step, loss in enumerate((9.0, 6.0, 4.0, 2.0, 1.0, 1.05, 2.0, 4.0, 8.0)):
            state = schedule.update(state, step=step, loss=loss)
            found.append(float(schedule(state, step=step + 1)))
        assert jax.grad(lambda loss: schedule.update(state, step=9, loss=loss).value)(1.0) == 0
    # The warm-up has two steps, the third stores the reference, and 1.05 is within the tolerance.
    np.testing.assert_allclose(found, [1, 1, 1, 0.7, 0.6, 0.6, 0.78, 1, 1], rtol=1e-6)


@pytest.mark.parametrize(
    "keywords, named",
    [
        ({"start": 0.05}, "start .*0.1"),
        ({"decay": 1.5}, "decay"),
        ({"smallest": -0.1}, "smallest"),
        ({"rate": 2}, "rate"),
    ],
)
def test_an_adaptive_fraction_names_a_number_out_of_range(keywords, named):
    with pytest.raises(ValueError, match=named):
        schedules.adaptive_fraction(total_steps=10, **keywords)
