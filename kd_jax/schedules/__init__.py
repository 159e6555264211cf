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

from kd_jax.schedules.adaptive import adaptive_fraction, taid
from kd_jax.schedules.plain import as_stateful as as_stateful
from kd_jax.schedules.plain import by_stage
from kd_jax.schedules.plain import first_value as first_value
from kd_jax.schedules.skew import distillm2_skew

__all__ = [
    "adaptive_fraction",
    "by_stage",
    "constant_schedule",
    "cosine_decay_schedule",
    "cosine_onecycle_schedule",
    "distillm2_skew",
    "exponential_decay",
    "join_schedules",
    "linear_onecycle_schedule",
    "linear_schedule",
    "piecewise_constant_schedule",
    "piecewise_interpolate_schedule",
    "polynomial_schedule",
    "sgdr_schedule",
    "taid",
    "warmup_constant_schedule",
    "warmup_cosine_decay_schedule",
    "warmup_exponential_decay_schedule",
]
