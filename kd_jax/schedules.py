"""Schedules: functions from a step to a number. The module has optax's schedules, and four that optax lacks.

optax has two protocols. A plain schedule is a function ``step -> value``. A stateful schedule has the methods ``init``,
``update`` and ``__call__``. ``as_stateful`` converts a plain schedule to a stateful schedule, so a training step reads
and advances all schedules in the same way::

    state = schedule.init()
    value = schedule(state, step=step)                  # the value that this step uses
    state = schedule.update(state, step=step, loss=loss)  # the state for the next step
"""

import numbers
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float
from optax.schedules import (
    StatefulSchedule,
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

from kd_jax.resolve import check_number

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


class TaidState(NamedTuple):
    """The state of TAID: scalars in JAX's default floating type."""

    value: Float[Array, ""]
    momentum: Float[Array, ""]
    previous_loss: Float[Array, ""]  # infinite before the first update


class taid:
    """TAID's path: ``t <- min(end, max(start + (end - start) k / N, t + alpha sigmoid(m) (1 - t)))``.

    The class has a name in lower case because a config names it like optax's functions.

    ``m`` is the running mean of the relative decrease of the loss. The path is therefore faster while the loss falls,
    and slower while the loss rises. The path never falls below the straight line from start to end. The first update
    only stores the loss.

    With the published ``beta`` the momentum hardly changes, so ``sigmoid(m)`` stays near a half. With the published
    ``alpha`` the adaptive step exceeds the step of the line only in runs of more than ``2 / alpha`` steps. Shorter runs
    follow the line.

    Args:
      total_steps: N, the number of updates in the run.
      start: the teacher's first weight, in ``[0, 1)``.
      end: the teacher's last weight, in ``(0, 1]`` and not below ``start``.
      alpha: the size of an adaptive step, in ``[0, 1]``.
      beta: the decay of the momentum, in ``[0, 1]``.
      disable_adaptive: True to follow only the straight line.

    Raises:
      ValueError: a number is out of range.

    Example:
      >>> schedule = taid(total_steps=10, alpha=0.5)
      >>> state = schedule.init()
      >>> state = schedule.update(state, step=0, loss=2.0)  # stores the loss
      >>> state = schedule.update(state, step=1, loss=1.0)
      >>> round(float(schedule(state, step=2)), 4)  # 0.4 + 0.5 sigmoid(0.005) 0.6
      0.5504

    References:
      Shing et al., `TAID <https://arxiv.org/abs/2501.16937>`_, 2025.
    """

    def __init__(
        self,
        total_steps: int,
        start: float = 0.4,
        end: float = 1.0,
        alpha: float = 5e-4,
        beta: float = 0.99,
        disable_adaptive: bool = False,
    ):
        self.total_steps = check_number("total_steps", total_steps, low=1)
        self.end = check_number("end", end, 0.0, 1.0)
        self.start = check_number("start", start, 0.0, 1.0)
        if not self.start <= self.end or self.start == 1 or self.end == 0:
            raise ValueError(
                f"start is {start!r} and end is {end!r}, but taid needs start below 1, end above 0, and start <= end."
            )
        self.alpha = check_number("alpha", alpha, 0.0, 1.0)
        self.beta = check_number("beta", beta, 0.0, 1.0)
        self.disable_adaptive = disable_adaptive

    def init(self) -> TaidState:
        """Returns the state before the first step."""
        return TaidState(jnp.array(self.start, float), jnp.array(0.0, float), jnp.array(jnp.inf, float))

    def __call__(self, state: TaidState, **unused: object) -> Float[Array, ""]:
        """Returns the teacher's weight for the current step."""
        return state.value

    def update(self, state: TaidState, *, step: ArrayLike, loss: ArrayLike, **unused: object) -> TaidState:
        """Returns the state after a step, without a gradient.

        Args:
          state: the state before the step.
          step: the number of the step, from 0.
          loss: the loss of the step.
          **unused: arguments of other schedules.
        """
        loss = jax.lax.stop_gradient(jnp.asarray(loss, state.value.dtype))
        first = jnp.isinf(state.previous_loss)
        previous = jnp.where(first, loss, state.previous_loss)
        fall = (previous - loss) / (previous + 1e-15)
        momentum = self.beta * state.momentum + (1 - self.beta) * fall
        line = self.start + (self.end - self.start) * jnp.asarray(step, loss.dtype) / self.total_steps
        adaptive = state.value + self.alpha * jax.nn.sigmoid(momentum) * (1 - state.value)
        value = jnp.minimum(self.end, line if self.disable_adaptive else jnp.maximum(line, adaptive))
        return TaidState(jnp.where(first, state.value, value), jnp.where(first, state.momentum, momentum), loss)


class SkewState(NamedTuple):
    """The state of DistiLLM-2's curriculum: the sum and the number of the gaps in the first steps."""

    total: Float[Array, ""]
    count: Float[Array, ""]


class distillm2_skew:
    """The skew ``1 - (1 - base) m / gap``, clipped to ``[low, base]``.

    The skew is the weight of the divergence's first argument in the assistant. A larger gap between the two models
    gives a larger skew.

    - ``gap`` is ``p(y | x) - q(y | x)`` for a teacher's response y, and ``q(y | x) - p(y | x)`` for a student's
      response. Each probability is the exponential of the mean log-probability of the response's tokens.
    - ``m`` is the mean gap over the first ``reference_steps``. During these steps the skew is ``base``.
    - A gap of 0 or less gives ``base``.

    The rule follows from ``log(p / r) ~ (1 - skew)(p - q)``: the rule keeps the product on the right constant. The skew
    is a constant to the gradient.

    Args:
      reference_steps: the number of steps over which ``m`` is averaged, usually the first epoch.
      rows: "teacher" or "student", the model that wrote the rows. With "teacher" the skew is the weight of the teacher
        in ``KL(p || r)``. With "student" the skew is the weight of the student in ``KL(q || r)``. The returned value is
        always the teacher's weight, which is ``1 - skew`` with "student".
      base: the largest skew, in ``(0, 1)``.
      low: the smallest skew, in ``[0, base]``.
      per_row: True for a skew for each row, as in the published code. False for one skew from the batch's mean gap.

    Raises:
      ValueError: a number is out of range.

    References:
      Ko et al., `DistiLLM-2 <https://arxiv.org/abs/2503.07067>`_, 2025. The published code contains this curriculum but
      never runs it.
    """

    needs_scores = True

    def __init__(
        self, reference_steps: int, rows: str = "teacher", base: float = 0.1, low: float = 0.01, per_row: bool = False
    ):
        self.reference_steps = check_number("reference_steps", reference_steps, low=1)
        self.base = check_number("base", base, 0.0, 1.0)
        if self.base == 1:
            raise ValueError(
                f"base must be below 1, but is {base!r}: with a skew of 1 the assistant equals the model that is "
                "compared with the assistant."
            )
        self.low = check_number("low", low, 0.0, self.base)
        if rows not in ("teacher", "student"):
            raise ValueError(f"rows must be 'teacher' or 'student', but is {rows!r}.")
        self.rows, self.per_row = rows, per_row

    def init(self) -> SkewState:
        """Returns the state before the first step."""
        return SkewState(jnp.array(0.0, float), jnp.array(0.0, float))

    def _gap(self, log_p: Array, log_q: Array, counted: Array) -> Array:
        gap = jnp.where(counted, jnp.exp(log_p) - jnp.exp(log_q), 0)
        return -gap if self.rows == "student" else gap

    def __call__(
        self, state: SkewState, *, step: ArrayLike, log_p: Array, log_q: Array, counted: Array, **unused: object
    ) -> Float[Array, "..."]:
        """Returns the teacher's weight in the assistant, one per row or one for all rows.

        The arguments `log_p`, `log_q` and `counted` are those of `kd_jax.objectives.row_means`.
        """
        gap = self._gap(log_p, log_q, counted)
        if not self.per_row:
            gap = gap.sum() / jnp.maximum(counted.sum(), 1)
        reference = state.total / jnp.maximum(state.count, 1)
        skew = jnp.clip(1 - (1 - self.base) * reference / (gap + 1e-5), self.low, self.base)
        skew = jnp.where((gap <= 0) | (jnp.asarray(step) < self.reference_steps), self.base, skew)
        return 1 - skew if self.rows == "student" else skew

    def update(
        self, state: SkewState, *, step: ArrayLike, log_p: Array, log_q: Array, counted: Array, **unused: object
    ) -> SkewState:
        """Returns the state after a step, computed from the rows that the step used."""
        early = jnp.asarray(step) < self.reference_steps
        gap = self._gap(log_p, log_q, counted).sum()
        return SkewState(
            state.total + jnp.where(early, gap, 0), state.count + jnp.where(early, counted.sum(), 0).astype(float)
        )


class FractionState(NamedTuple):
    """The state of `adaptive_fraction`: scalars in JAX's default floating type."""

    value: Float[Array, ""]
    average: Float[Array, ""]  # infinite before the first update
    reference: Float[Array, ""]  # infinite until the warm-up has passed


class adaptive_fraction:
    """A fraction that grows by a factor when the average loss has risen, and shrinks when the average loss has fallen.

    The class has a name in lower case because a config names it like optax's functions.

    ``e`` is the moving average of the losses, ``e = decay e + (1 - decay) loss``, and the first loss is its first
    value. The first update after the warm-up stores ``e`` as the reference. Then each update compares:

    - ``e > (1 + tolerance) reference``: the fraction is multiplied by ``1 + rate``, but is at most 1.
    - ``e < (1 - tolerance) reference``: the fraction is multiplied by ``1 - rate``, but is at least ``smallest``.

    In both cases ``e`` becomes the reference. A changed fraction holds from the next step.

    Args:
      total_steps: the number of updates in the run.
      start: the first fraction, from ``smallest`` to 1.
      smallest: the smallest fraction, in ``[0, 1]``.
      rate: the relative change of the fraction, in ``[0, 1]``.
      tolerance: the relative change of the average loss that does not change the fraction, in ``[0, 1]``.
      decay: the decay of the average, in ``[0, 1]``.
      warmup: the part of the run without a change, in ``[0, 1]``.

    Raises:
      ValueError: a number is out of range.

    Example:
      >>> schedule = adaptive_fraction(total_steps=10, rate=0.1, tolerance=0.1, decay=0.0, warmup=0.0)
      >>> state = schedule.init()
      >>> for step, loss in enumerate((2.0, 1.9, 1.0)):  # the second loss is within the tolerance
      ...     state = schedule.update(state, step=step, loss=loss)
      >>> round(float(schedule(state, step=3)), 4)
      0.9

    References:
      Xie et al., `AdaKD <https://arxiv.org/abs/2510.11615>`_, 2025, for the share of kept tokens. The published code
      updates the average at every microbatch; here an update is a step of the optimiser.
    """

    def __init__(
        self,
        total_steps: int,
        start: float = 1.0,
        smallest: float = 0.1,
        rate: float = 0.1,
        tolerance: float = 0.1,
        decay: float = 0.99,
        warmup: float = 0.05,
    ):
        self.total_steps = check_number("total_steps", total_steps, low=1)
        self.smallest = check_number("smallest", smallest, 0.0, 1.0)
        self.start = check_number("start", start, self.smallest, 1.0)
        self.rate = check_number("rate", rate, 0.0, 1.0)
        self.tolerance = check_number("tolerance", tolerance, 0.0, 1.0)
        self.decay = check_number("decay", decay, 0.0, 1.0)
        self.warmup = check_number("warmup", warmup, 0.0, 1.0)

    def init(self) -> FractionState:
        """Returns the state before the first step."""
        return FractionState(jnp.array(self.start, float), jnp.array(jnp.inf, float), jnp.array(jnp.inf, float))

    def __call__(self, state: FractionState, **unused: object) -> Float[Array, ""]:
        """Returns the fraction for the current step."""
        return state.value

    def update(self, state: FractionState, *, step: ArrayLike, loss: ArrayLike, **unused: object) -> FractionState:
        """Returns the state after a step, without a gradient.

        Args:
          state: the state before the step.
          step: the number of the step, from 0.
          loss: the loss of the step.
          **unused: arguments of other schedules.
        """
        loss = jax.lax.stop_gradient(jnp.asarray(loss, state.value.dtype))
        average = jnp.where(jnp.isinf(state.average), loss, self.decay * state.average + (1 - self.decay) * loss)
        has_reference = jnp.isfinite(state.reference)
        rises = has_reference & (average > (1 + self.tolerance) * state.reference)
        falls = has_reference & (average < (1 - self.tolerance) * state.reference)
        larger = jnp.minimum(state.value * (1 + self.rate), 1)
        smaller = jnp.maximum(state.value * (1 - self.rate), self.smallest)
        is_warm = jnp.asarray(step) >= self.warmup * self.total_steps
        reference = jnp.where(rises | falls | (is_warm & ~has_reference), average, state.reference)
        return FractionState(jnp.where(rises, larger, jnp.where(falls, smaller, state.value)), average, reference)


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
