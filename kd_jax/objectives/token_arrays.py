"""Arrays [B, L] that need a whole batch: the tokens' shares of an average, the rows of the tokens, and their positions.

A batch without packing has one row in each line of its arrays. A packed batch has several, and its mask holds the number
of each token's row in the line, from 1, and 0 for padding.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kd_jax.policy_gradient import Scores

AVERAGES = ("token", "batch_token", "sequence", "row_sum")


def token_coefficients(
    average: str,
    mask: Bool[Array, "B L"] | Float[Array, "B L"],
    segments: Int[Array, "B L"] | None = None,
    batch_count: Int[Array, ""] | None = None,
) -> Float[Array, "B L"]:
    """Returns weights w such that sum(w * loss) is the average that `average` names.

    The average is over the global batch. Microbatches, devices and hosts each get a part of the coefficients and add up
    their sums, so the result does not depend on the division.

    Args:
      average: 'token' for the sum over all counted tokens, divided by their number. 'batch_token' for the same sum,
        divided by `batch_count`. 'sequence' for the mean over rows of the mean over each row's tokens; a row without a
        counted token is ignored. 'row_sum' for the mean over rows of the sum over each row's tokens.
      mask: True where a token counts; or the weight of each token, for an average that is divided by the sum of the
        weights in place of the number of tokens.
      segments: the number of each token's row, if several rows are packed into one; None without packing.
      batch_count: the number of the batch's tokens, of which a term may count only a part.

    Returns:
      Coefficients whose sum is 1, or 0 if no token counts. With 'row_sum', the sum is the mean length of the rows. With
      'batch_token', the sum is the share of the batch's tokens that count.

    Raises:
      ValueError: `batch_count` is missing for 'batch_token'.
    """
    counted = jnp.asarray(mask, float)
    if average == "token":
        return _divided(counted, counted.sum())
    if average == "batch_token":
        if batch_count is None:
            raise ValueError("average='batch_token' needs batch_count, the number of the batch's tokens.")
        return _divided(counted, batch_count)
    if segments is None:
        lengths = counted.sum(axis=-1, keepdims=True)
    else:
        same_row = segments[:, :, None] == segments[:, None, :]
        lengths = jnp.where(same_row, counted[:, None, :], 0).sum(axis=-1)
    share = _divided(counted, lengths)
    rows = share.sum()  # each row with a counted token adds 1
    return _divided(counted if average == "row_sum" else share, rows)


def row_means(scores: Scores) -> dict[str, Array]:
    """Returns the means of each row's counted tokens, for schedules.

    `log_p` and `log_q` are the mean log-probabilities under each model. `counted` is True if a row has a counted token.
    """
    count = scores.counted.sum(axis=1)
    mean = lambda values: jnp.where(scores.counted, values, 0).sum(axis=1) / jnp.maximum(count, 1)
    return {"log_p": mean(scores.log_p), "log_q": mean(scores.log_q), "counted": count > 0}


def row_numbers(counted: Bool[Array, "B L"], segments: Int[Array, "B L"] | None = None) -> Int[Array, "B L"]:
    """Returns a number for each token's row, equal within a row and different for different rows, below B * L.

    Args:
      counted: an array of the batch's shape.
      segments: the number of each token's row in its line, if rows are packed; None without packing.
    """
    first_of_line = jnp.arange(counted.shape[0])[:, None] * counted.shape[1]
    inside = jnp.zeros(counted.shape, jnp.int32) if segments is None else jnp.maximum(segments - 1, 0)
    return first_of_line + inside


def positions(counted: Bool[Array, "B L"], row: Int[Array, "B L"]) -> Int[Array, "B L"]:
    """Returns the index of each token among the counted tokens of its row, from 0.

    Args:
      counted: True where a token counts.
      row: the number of each token's row, as in `row_numbers`; the tokens of a row are next to each other.
    """
    before = jnp.cumsum(counted, axis=1) - counted
    is_first = jnp.pad(row[:, 1:] != row[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    # The number of counted tokens before a row never decreases along a line.
    return before - jax.lax.cummax(jnp.where(is_first, before, 0), axis=1)


def positions_from_end(counted: Bool[Array, "B L"], row: Int[Array, "B L"]) -> Int[Array, "B L"]:
    """Returns the number of counted tokens of the same row that follow each token."""
    return positions(counted[:, ::-1], row[:, ::-1])[:, ::-1]


def _divided(values: Array, divisor: Array) -> Array:
    """Returns values / divisor, and 0 where the divisor is 0."""
    return values / jnp.where(divisor > 0, divisor, 1)
