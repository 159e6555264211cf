"""Schedules that follow the loss of their term."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from kd_jax.resolve import check_number

__all__ = ["adaptive_fraction", "adaptive_increase"]


class IncreaseState(NamedTuple):
    """The state of `adaptive_increase`: scalars in JAX's default floating type."""

    value: Float[Array, ""]
    momentum: Float[Array, ""]
    previous_loss: Float[Array, ""]  # infinite before the first update


class adaptive_increase:
    """A weight that grows from ``start`` to ``end``, and faster while the loss falls.

    The update is ``t <- min(end, max(start + (end - start) k / N, t + alpha sigmoid(m) (1 - t)))``. The class has a name
    in lower case because a config names it like optax's functions.

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
      >>> schedule = adaptive_increase(total_steps=10, alpha=0.5)
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
                f"start is {start!r} and end is {end!r}; start must be below 1 and at most end, and end above 0."
            )
        self.alpha = check_number("alpha", alpha, 0.0, 1.0)
        self.beta = check_number("beta", beta, 0.0, 1.0)
        self.disable_adaptive = disable_adaptive

    def init(self) -> IncreaseState:
        """Returns the state before the first step."""
        return IncreaseState(jnp.array(self.start, float), jnp.array(0.0, float), jnp.array(jnp.inf, float))

    def __call__(self, state: IncreaseState, **unused: object) -> Float[Array, ""]:
        """Returns the teacher's weight for the current step."""
        return state.value

    def update(self, state: IncreaseState, *, step: ArrayLike, loss: ArrayLike, **unused: object) -> IncreaseState:
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
        return IncreaseState(jnp.where(first, state.value, value), jnp.where(first, state.momentum, momentum), loss)


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
