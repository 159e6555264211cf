"""A schedule that follows the probabilities of the rows."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from kd_jax.resolve import check_number

__all__ = ["skew_by_gap"]


class SkewState(NamedTuple):
    """The state of `skew_by_gap`: the sum and the number of the gaps in the first steps."""

    total: Float[Array, ""]
    count: Float[Array, ""]


class skew_by_gap:
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
