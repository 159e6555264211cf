"""Schedules that are functions of the step, and their form as stateful schedules."""

import numbers
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float
from optax.schedules import StatefulSchedule, constant_schedule

from kd_jax.resolve import check_number

__all__ = ["as_stateful", "by_stage", "first_value"]


def by_stage(values: Sequence[float], total_steps: int) -> Callable[[ArrayLike], Array]:
    """Returns a schedule that takes each of several values for an equal part of a run.

    Args:
      values: the values of the stages, in order.
      total_steps: the number of steps of the run. Stage i of n begins at the step ``i * total_steps / n``, rounded up.

    Returns:
      ``step -> value``. After the run the value is the last one.

    Raises:
      ValueError: there is no value, a value is not a finite number, or there are fewer steps than values.

    Example:
      >>> schedule = by_stage((1.0, 1.5, 2.0), total_steps=9)
      >>> [float(schedule(step)) for step in (0, 2, 3, 8, 20)]
      [1.0, 1.0, 1.5, 2.0, 2.0]

    References:
      `POCL <https://arxiv.org/abs/2506.05695>`_, 2025: the temperature and the share of distillation by stage.
    """
    if not isinstance(values, list | tuple) or not values:
        raise ValueError(f"values={values!r} must be a list of at least one number, such as (1.0, 1.5, 2.0).")
    numbers_of_stages = [check_number(f"values[{i}]", value) for i, value in enumerate(values)]
    check_number("total_steps", total_steps, low=len(values))

    def schedule(step: ArrayLike) -> Array:
        stage = jnp.minimum(jnp.asarray(step) * len(values) // int(total_steps), len(values) - 1)
        return jnp.asarray(numbers_of_stages, float)[stage]

    return schedule


def as_stateful(schedule: float | Callable[[ArrayLike], ArrayLike] | StatefulSchedule) -> StatefulSchedule:
    """Returns a schedule as a stateful schedule.

    A plain schedule gets an empty state. A number becomes a constant schedule.

    Args:
      schedule: a finite Python number, a function ``step -> value``, or a stateful schedule.

    Returns:
      A stateful schedule: ``init() -> state``, ``schedule(state, step=...) -> value``, and
      ``update(state, step=..., loss=...) -> state``.

    Raises:
      ValueError: ``schedule`` is none of these.

    Example:
      >>> from optax.schedules import linear_schedule
      >>> schedule = as_stateful(linear_schedule(0.0, 1.0, 10))
      >>> float(schedule(schedule.init(), step=5))
      0.5
      >>> float(as_stateful(0.1)((), step=5)) == float(jnp.float32(0.1))
      True
    """
    if isinstance(schedule, StatefulSchedule):
        return schedule
    if callable(schedule):
        return _Stateless(schedule)
    if isinstance(schedule, numbers.Real):
        return _Stateless(constant_schedule(check_number("a constant schedule", schedule)))
    raise ValueError(f"a schedule must be a number, a function of the step, or a stateful schedule, not {schedule!r}.")


def first_value(schedule: StatefulSchedule) -> float:
    """Returns the value in the first step of a run.

    Example:
      >>> first_value(as_stateful(0.5))
      0.5
    """
    return float(jnp.asarray(schedule(schedule.init(), step=0)))


class _Stateless:
    """A plain schedule as a stateful schedule with an empty state.

    The step is an argument. optax's own wrapper counts the steps instead.
    """

    def __init__(self, schedule: Callable[[ArrayLike], ArrayLike]):
        self.schedule = schedule

    def init(self) -> tuple[()]:
        return ()

    def __call__(self, state: tuple[()], **arguments: ArrayLike) -> Float[Array, ""]:
        return jnp.asarray(self.schedule(arguments["step"]), float)

    def update(self, state: tuple[()], **unused: object) -> tuple[()]:
        return state
