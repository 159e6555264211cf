"""The row gates: functions that say which rows count.

A gate's parameters are those of a rule, see `kd_jax.token_weights.rules`. A gate returns True at the tokens of rows that
count. A token counts if its mask and its row's gate are True.
"""

from jaxtyping import Array, Bool, Float, Int

from kd_jax.token_weights import statistics
from kd_jax.token_weights.statistics import Option

__all__ = ["drop_lowest", "has_view"]


def drop_lowest(
    score: Float[Array, "B L"], counted: Bool[Array, "B L"], row: Int[Array, "B L"], *, fraction: Option
) -> Bool[Array, "B L"]:
    """Drops rows whose mean score is below a quantile of the means of the batch's rows.

    The mean is over a row's counted tokens. A row without a counted token enters no statistic, and does not count. The
    quantile is interpolated linearly, and a row that equals the quantile counts.

    Args:
      fraction: the level of the quantile, in [0, 1]; 0 drops no row.

    Raises:
      ValueError: the fraction is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> score, row = jnp.array([[-1.0, -1.0, -5.0, -2.0]]), jnp.array([[0, 0, 1, 2]])
      >>> drop_lowest(score, row >= 0, row, fraction=0.2).tolist()
      [[True, True, False, True]]

    References:
      "FiRe-OPD", https://arxiv.org/abs/2606.02684, 2026: the score is log_p, fraction 0.2.
    """
    fraction = statistics.check_option("fraction", fraction, 0.0, 1.0)
    means, one_of_row = statistics.row_means(score, counted, row)
    least = statistics.quantiles(means, one_of_row, row, fraction)
    return (means >= least) & (statistics.counts(counted, row, "row") > 0)


def has_view(has_view: Bool[Array, "*tokens"]) -> Bool[Array, "*tokens"]:
    """Keeps rows for which each model with a view that a term reads has a prompt of its own.

    Example:
      >>> import jax.numpy as jnp
      >>> has_view(jnp.array([[True, True], [False, False]])).tolist()
      [[True, True], [False, False]]
    """
    return has_view
