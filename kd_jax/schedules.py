"""Schedules: from a step to a number. optax's by their own names, and the one that optax lacks.

optax has two protocols: a plain schedule is ``step -> value``, a stateful one has ``init``, ``update`` and
``__call__``. ``as_stateful`` gives every schedule the second, so that a training step has one way to read and
advance them all::

    state = schedule.init()
    value = schedule(state, step=step)                  # the value this step uses
    state = schedule.update(state, step=step, loss=loss)  # what the next one will use
"""

import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
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
    """What TAID remembers: scalars in JAX's default floating type."""

    value: Float[Array, ""]
    momentum: Float[Array, ""]
    previous_loss: Float[Array, ""]  # infinite before the first update


class taid:
    """``t <- min(end, max(start + (end - start) k / N, t + alpha sigmoid(m) (1 - t)))``: TAID's path.

    A class, since it has three methods, with a lower-case name, since a config names it like optax's
    functions. ``m`` is the running mean of the loss's relative fall, so that the path is faster while the
    student follows and slower while it does not; the straight line from start to end is its floor. The first
    update only stores the loss. With the published ``beta`` the momentum hardly moves and ``sigmoid(m)``
    stays near a half, and with the published ``alpha`` the step exceeds the line's only in runs of more than
    ``2 / alpha`` steps: shorter ones follow the line.

    Args:
      total_steps: N, the number of updates in the run.
      start: the weight of the teacher at first, in ``[0, 1)``.
      end: the weight in the end, in ``(0, 1]`` and not below ``start``.
      alpha: the size of an adaptive step, in ``[0, 1]``.
      beta: the decay of the momentum, in ``[0, 1]``.
      disable_adaptive: follow the line alone.

    Raises:
      ValueError: for a number out of range.

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
            raise ValueError(f"taid goes up, from start < 1 to end > 0, but start is {start!r} and end is {end!r}.")
        self.alpha = check_number("alpha", alpha, 0.0, 1.0)
        self.beta = check_number("beta", beta, 0.0, 1.0)
        self.disable_adaptive = disable_adaptive

    def init(self) -> TaidState:
        """The state before the first step."""
        return TaidState(jnp.array(self.start, float), jnp.array(0.0, float), jnp.array(jnp.inf, float))

    def __call__(self, state: TaidState, **unused: Any) -> Float[Array, ""]:
        """The teacher's weight that the current step uses."""
        return state.value

    def update(
        self, state: TaidState, *, step: jax.typing.ArrayLike, loss: jax.typing.ArrayLike, **unused: Any
    ) -> TaidState:
        """The state after a step, from its number (the first is 0) and its loss, without gradient."""
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
    """What DistiLLM-2's curriculum remembers: of the first steps, the sum of the gaps and their number."""

    total: Float[Array, ""]
    count: Float[Array, ""]


class distillm2_skew:
    """The skew ``1 - (1 - base) m / gap``, cut to ``[low, base]``: more of the other model where the two are far apart.

    ``gap`` is ``p(y | x) - q(y | x)`` of a teacher's response y, or ``q(y | x) - p(y | x)`` of a student's, each the
    exponential of the mean log-probability of its tokens; ``m`` is its mean over the first ``reference_steps``, in which
    the skew is ``base``. From ``log(p / r) ~ (1 - skew)(p - q)``: that product is kept constant. A gap below 0 gives
    ``base``. The skew is a constant to the gradient.

    Args:
      reference_steps: how many steps make up ``m``: the first epoch.
      rows: "teacher": the skew is the weight of the teacher in ``KL(p || r)``. "student": it is that of the student in
        ``KL(q || r)``, so that the weight of the teacher, which is the value, is ``1 - skew``.
      base: the largest skew, in ``(0, 1)``.
      low: the smallest, in ``[0, base]``.
      per_row: a skew for each row, as in the published code, instead of one for the batch's mean gap.

    Raises:
      ValueError: for a number out of range.

    References:
      Ko et al., `DistiLLM-2 <https://arxiv.org/abs/2503.07067>`_, 2025; the published code never gets to it.
    """

    needs_scores = True

    def __init__(
        self, reference_steps: int, rows: str = "teacher", base: float = 0.1, low: float = 0.01, per_row: bool = False
    ):
        self.reference_steps = check_number("reference_steps", reference_steps, low=1)
        self.base = check_number("base", base, 0.0, 1.0)
        if self.base == 1:
            raise ValueError(
                "base must be below 1: with a skew of 1 the assistant is the very model that it is compared with."
            )
        self.low = check_number("low", low, 0.0, self.base)
        if rows not in ("teacher", "student"):
            raise ValueError(f"rows must be 'teacher' or 'student', but is {rows!r}.")
        self.rows, self.per_row = rows, per_row

    def init(self) -> SkewState:
        """The state before the first step."""
        return SkewState(jnp.array(0.0, float), jnp.array(0.0, float))

    def _gap(self, log_p: Array, log_q: Array, counted: Array) -> Array:
        gap = jnp.where(counted, jnp.exp(log_p) - jnp.exp(log_q), 0)
        return -gap if self.rows == "student" else gap

    def __call__(
        self, state: SkewState, *, step: jax.typing.ArrayLike, log_p: Array, log_q: Array, counted: Array, **unused: Any
    ) -> Float[Array, "..."]:
        """The teacher's weight in each row's assistant, or in all: from the rows' mean log-probabilities [B]."""
        gap = self._gap(log_p, log_q, counted)
        if not self.per_row:
            gap = gap.sum() / jnp.maximum(counted.sum(), 1)
        reference = state.total / jnp.maximum(state.count, 1)
        skew = jnp.clip(1 - (1 - self.base) * reference / (gap + 1e-5), self.low, self.base)
        skew = jnp.where((gap <= 0) | (jnp.asarray(step) < self.reference_steps), self.base, skew)
        return 1 - skew if self.rows == "student" else skew

    def update(
        self, state: SkewState, *, step: jax.typing.ArrayLike, log_p: Array, log_q: Array, counted: Array, **unused: Any
    ) -> SkewState:
        """The state after a step, from the same rows."""
        early = jnp.asarray(step) < self.reference_steps
        gap = self._gap(log_p, log_q, counted).sum()
        return SkewState(
            state.total + jnp.where(early, gap, 0), state.count + jnp.where(early, counted.sum(), 0).astype(float)
        )


def as_stateful(schedule: float | Callable[..., Any] | StatefulSchedule) -> StatefulSchedule:
    """Any schedule under the stateful protocol; a plain one gets the empty state, a number is a constant.

    Args:
      schedule: a finite Python number, a function ``step -> value``, or a stateful schedule.

    Returns:
      A stateful schedule: ``init() -> state``, ``schedule(state, step=...) -> value``,
      ``update(state, step=..., loss=...) -> state``.

    Raises:
      ValueError: if ``schedule`` is none of these.

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
    raise ValueError(f"a schedule is a number, a function of the step or a stateful schedule, not {schedule!r}.")


class _Stateless:
    """A plain schedule, with nothing to remember: the step is given, where optax's own wrapper counts."""

    def __init__(self, schedule: Callable[[Any], Any]):
        self.schedule = schedule

    def init(self) -> tuple[()]:
        return ()

    def __call__(self, state: tuple[()], *, step: Any = None, **unused: Any) -> Float[Array, ""]:
        return jnp.asarray(self.schedule(step), float)

    def update(self, state: tuple[()], **unused: Any) -> tuple[()]:
        return state
