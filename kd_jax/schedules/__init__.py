"""Schedules: functions from a step to a number. The module has optax's schedules, and four that optax lacks.

optax has two protocols. A plain schedule is a function ``step -> value``. A stateful schedule has the methods ``init``,
``update`` and ``__call__``. ``as_stateful`` converts a plain schedule to a stateful schedule, so a training step reads
and advances all schedules in the same way::

    state = schedule.init()
    value = schedule(state, step=step)                  # the value that this step uses
    state = schedule.update(state, step=step, loss=loss)  # the state for the next step
"""

from optax.schedules import (
    constant_schedule,
    cosine_decay_schedule,
    cosine_onecycle_schedule,
    exponential_decay,
    join_schedules,
    linear_onecycle_schedule,
    linear_schedule,
    piecewise_constant_schedule,
    piecewise_interpolate_schedule,
    polynomial_schedule,
    sgdr_schedule,
    warmup_constant_schedule,
    warmup_cosine_decay_schedule,
    warmup_exponential_decay_schedule,
)

from kd_jax.schedules.adaptive import adaptive_fraction, adaptive_increase
from kd_jax.schedules.plain import as_stateful as as_stateful
from kd_jax.schedules.plain import by_stage
from kd_jax.schedules.plain import first_value as first_value
from kd_jax.schedules.skew import skew_by_gap

__all__ = [
    "adaptive_fraction",
    "adaptive_increase",
    "by_stage",
    "constant_schedule",
    "cosine_decay_schedule",
    "cosine_onecycle_schedule",
    "exponential_decay",
    "join_schedules",
    "linear_onecycle_schedule",
    "linear_schedule",
    "piecewise_constant_schedule",
    "piecewise_interpolate_schedule",
    "polynomial_schedule",
    "sgdr_schedule",
    "skew_by_gap",
    "warmup_constant_schedule",
    "warmup_cosine_decay_schedule",
    "warmup_exponential_decay_schedule",
]

# The names in configs of two schedules, after the methods that introduced the schedules: TAID and DistiLLM-2.
ALIASES = ("taid", "distillm2_skew")
taid, distillm2_skew = adaptive_increase, skew_by_gap
