"""Statistics of counted tokens over each row, or over the global batch.

All functions take arrays [B, L]. ``counted`` is True where a token counts, and only counted tokens enter a statistic.
``row`` is a number for each token, equal within a row. A row's tokens are neighbours in one line of the array, and a
line may hold several packed rows. A statistic of a row is returned for each of the row's tokens, counted or not.
Every line is processed without its neighbours, except where the statistic is over the batch. The sums need no atomic
additions, so that a result is the same in every run.
"""

import fractions
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from kd_jax.resolve import check_number, nearest

SCOPES = ("row", "batch")
# An option of a rule: a number of the config, or the value of a schedule at each token.
Option = float | Float[Array, "*tokens"]


class _Runs(NamedTuple):
    """The divisions of [G, N] positions into runs of neighbours: rows, or one run for the whole batch.

    Attributes:
      number: the number of each position's run within its line.
      first: the index of the first position of each position's run.
      last: the index of the last position of the run.
    """

    number: Int[Array, "G N"]
    first: Int[Array, "G N"]
    last: Int[Array, "G N"]


def row_sums(values: Shaped[Array, "B L"], row: Int[Array, "B L"]) -> Shaped[Array, "B L"]:
    """Returns the sum of each row's values, at each of the row's tokens.

    Example:
      >>> row_sums(jnp.array([[1.0, 2.0, 4.0]]), jnp.array([[0, 0, 1]])).tolist()
      [[3.0, 3.0, 4.0]]
    """
    runs = _runs(row, "row")
    return _take(_running_sums(values, runs), runs.last)


def earlier_sums(values: Shaped[Array, "B L"], row: Int[Array, "B L"]) -> Shaped[Array, "B L"]:
    """Returns the sum of the values that stand before each token in the token's row.

    Example:
      >>> earlier_sums(jnp.array([[1.0, 2.0, 4.0, 8.0]]), jnp.array([[0, 0, 0, 1]])).tolist()
      [[0.0, 1.0, 3.0, 0.0]]
    """
    runs = _runs(row, "row")
    inclusive = _running_sums(values, runs)
    return jnp.where(_is_first(runs), 0, jnp.roll(inclusive, 1, axis=-1))


def row_means(
    values: Float[Array, "B L"], counted: Bool[Array, "B L"], row: Int[Array, "B L"]
) -> tuple[Float[Array, "B L"], Bool[Array, "B L"]]:
    """Returns the mean of each row's counted values, and an array that marks one counted token of each row.

    The mean is 0 for a row without a counted token. Such a row has no mark.
    """
    count = counts(counted, row, "row")
    means = row_sums(jnp.where(counted, values, 0), row) / jnp.maximum(count, 1)
    return means, counted & (earlier_sums(counted.astype(jnp.int32), row) == 0)


def counts(counted: Bool[Array, "B L"], row: Int[Array, "B L"], within: str) -> Int[Array, "B L"]:
    """Returns the number of counted tokens in each token's row, or in the batch."""
    if within == "batch":
        return jnp.full(row.shape, counted.sum())
    return row_sums(counted.astype(jnp.int32), row)


def quantiles(
    values: Float[Array, "B L"],
    counted: Bool[Array, "B L"],
    row: Int[Array, "B L"],
    level: Option,
    *,
    interpolation: str = "linear",
    within: str = "batch",
) -> Float[Array, "B L"]:
    """Returns the quantile of the counted values in each token's row, or in the batch.

    Args:
      values: the numbers of which the quantile is taken.
      counted: True where a number counts.
      row: the number of each token's row.
      level: the share of values below the quantile, in [0, 1]; or an array with a share for each token, equal within
        a row, or in the batch.
      interpolation: 'linear' to interpolate between the neighbours of the position level (n - 1), as NumPy and PyTorch
        do. 'lower' to take the lower neighbour; at level 0.5 this is the lower median.
      within: 'row' or 'batch'.

    Returns:
      The quantile at each token. The number is arbitrary, but not NaN, where nothing counts.

    Raises:
      ValueError: a number is out of range, or a name is unknown.

    Example:
      >>> values, counted = jnp.array([[1.0, 2.0, 4.0, 9.0]]), jnp.array([[True, True, True, False]])
      >>> float(quantiles(values, counted, jnp.zeros((1, 4), int), 0.75)[0, 0])
      3.0
    """
    level = check_option("the level of a quantile", level, 0.0, 1.0)
    check_name("interpolation", interpolation, ("linear", "lower"))
    runs = _runs(row, within)
    ordered = _ascending(values, counted, runs)
    last = jnp.maximum(counts(counted, row, within) - 1, 0).reshape(runs.first.shape)
    level = level.reshape(last.shape) if isinstance(level, jax.Array) else level
    whole, part = _multiple(level, last)
    low = _take(ordered, runs.first + whole)
    high = _take(ordered, runs.first + jnp.minimum(whole + 1, last))
    # Without a neighbour to go to, and from minus infinity, the difference is not used.
    stays = (interpolation == "lower") | (part == 0) | (low == high) | ~jnp.isfinite(low)
    return jnp.where(stays, low, low + part.astype(values.dtype) * (high - low)).reshape(row.shape)


def largest(
    values: Float[Array, "B L"],
    counted: Bool[Array, "B L"],
    row: Int[Array, "B L"],
    count: Int[Array, "B L"],
    *,
    ties: str,
    within: str,
) -> Bool[Array, "B L"]:
    """Returns True at the tokens with the largest counted values of each row, or of the batch.

    Args:
      values: the numbers that are compared.
      counted: True where a number counts.
      row: the number of each token's row.
      count: how many tokens are chosen, equal within a row, or in the batch.
      ties: 'all' to choose every token that equals the last chosen one; 'first' to choose the earlier token.
      within: 'row' or 'batch'.

    Returns:
      True at chosen tokens. A row, or a batch, of fewer counted tokens than `count` has all of them chosen.

    Raises:
      ValueError: a name is unknown.

    Example:
      >>> values, row = jnp.array([[3.0, 5.0, 3.0, 1.0]]), jnp.array([[0, 0, 0, 0]])
      >>> chosen = lambda ties: largest(values, row == 0, row, row + 2, ties=ties, within="row").astype(int).tolist()
      >>> chosen("all"), chosen("first")
      ([[1, 1, 1, 0]], [[1, 1, 0, 0]])
    """
    check_name("ties", ties, ("all", "first"))
    runs = _runs(row, within)
    shape = runs.first.shape
    count = jnp.minimum(count, counts(counted, row, within)).reshape(shape)
    if ties == "all":
        number = counts(counted, row, within).reshape(shape)
        least = _take(_ascending(values, counted, runs), runs.first + jnp.clip(number - count, 0, shape[-1] - 1))
        chosen = (values.reshape(shape) >= least) & (count > 0)
    else:
        chosen = _descending_rank(values, counted, runs) < count
    return chosen.reshape(row.shape) & counted


def share(fraction: Option, count: Int[Array, "*shape"], rounding: str) -> Int[Array, "*shape"]:
    """Returns ``fraction * count``, rounded to a whole number.

    The product has no rounding error if the fraction is a ratio of whole numbers below 46 340, or a small multiple of
    one millionth. With an array of fractions, a product that differs from a whole number by no more than the error of
    floating-point numbers is this whole number.

    Args:
      fraction: a number in [0, 1], or an array of these in the shape of `count`.
      count: numbers of tokens.
      rounding: 'floor' or 'ceil'.

    Raises:
      ValueError: the fraction is out of range, or the name is unknown.

    Example:
      >>> [int(share(0.07, jnp.array(100), rounding)) for rounding in ("floor", "ceil")]  # 0.07 * 100 > 7
      [7, 7]
    """
    check_name("round", rounding, ("floor", "ceil"))
    whole, part = _multiple(check_option("fraction", fraction, 0.0, 1.0), count)
    return whole + (part > 0) if rounding == "ceil" else whole


def check_name(option: str, value: object, known: tuple[str, ...]) -> None:
    """Checks that an option has one of the known values.

    Raises:
      ValueError: the option has another value.
    """
    if value not in known:
        raise ValueError(f"{option}={value!r} is not one of {', '.join(known)}{nearest(value, known)}.")


def check_option(name: str, value: Option, low: float = -math.inf, high: float = math.inf) -> Option:
    """Returns an option, after a check that a Python number is finite and from `low` to `high`.

    The value of a schedule is an array, and is not checked, because the array may be traced.

    Raises:
      ValueError: the number is out of range.
    """
    return value if isinstance(value, jax.Array) else check_number(name, value, low, high)


def _runs(row: Array, within: str) -> _Runs:
    check_name("within", within, SCOPES)
    if within == "batch":
        number = jnp.zeros((1, row.size), jnp.int32)
        return _Runs(number, number, number + row.size - 1)
    change = row[:, 1:] != row[:, :-1]
    edge = jnp.ones((row.shape[0], 1), bool)
    begins, ends = jnp.concatenate([edge, change], axis=1), jnp.concatenate([change, edge], axis=1)
    index = jnp.broadcast_to(jnp.arange(row.shape[1], dtype=jnp.int32), row.shape)
    first = jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
    last = jax.lax.cummin(jnp.where(ends, index, row.shape[1] - 1), axis=1, reverse=True)
    return _Runs(jnp.cumsum(begins, axis=1, dtype=jnp.int32), first, last)


def _is_first(runs: _Runs) -> Array:
    return runs.first == jnp.arange(runs.first.shape[-1])


def _running_sums(values: Array, runs: _Runs) -> Array:
    """Returns the sum of each run's values up to and including each position.

    A difference of two sums over the whole line would lose digits to the rows that stand before.
    """

    def add(earlier: tuple[Array, Array], later: tuple[Array, Array]) -> tuple[Array, Array]:
        return earlier[0] | later[0], later[1] + jnp.where(later[0], 0, earlier[1])

    return jax.lax.associative_scan(add, (_is_first(runs), values), axis=-1)[1]


def _keys(counted: Array, runs: _Runs) -> Array:
    """Returns the keys by which a sort keeps each run where it is, and puts its counted tokens first."""
    return 2 * runs.number + ~counted.reshape(runs.number.shape)


def _ascending(values: Array, counted: Array, runs: _Runs) -> Array:
    """Returns the counted values of each run in ascending order, and then zeros up to the end of the run."""
    operands = _keys(counted, runs), jnp.where(counted, values, 0).reshape(runs.number.shape)
    return jax.lax.sort(operands, num_keys=2)[1]


def _descending_rank(values: Array, counted: Array, runs: _Runs) -> Array:
    """Returns the place of each position among its run's counted values, from 0 for the largest value.

    Of equal values the earlier one comes first.
    """
    keys, index = _keys(counted, runs), jnp.broadcast_to(jnp.arange(runs.number.shape[-1]), runs.number.shape)
    order = jax.lax.sort((keys, -values.reshape(keys.shape), index), num_keys=2, is_stable=True)[2]
    _, rank = jax.lax.sort((order, index), num_keys=1)
    return rank - runs.first


def _multiple(fraction: Option, count: Array) -> tuple[Array, Array]:
    """Returns the whole part of ``fraction * count`` as an integer, and the rest as a number in [0, 1).

    In float32 the product of 0.05 and a large count may be on the wrong side of a whole number.
    """
    if isinstance(fraction, jax.Array):
        product = fraction * count
        nearest_whole = jnp.round(product)
        is_whole = jnp.abs(product - nearest_whole) <= 2 * jnp.finfo(product.dtype).eps * product
        product = jnp.where(is_whole, nearest_whole, product)
        whole = jnp.floor(product)
        return whole.astype(count.dtype), product - whole
    ratio = fractions.Fraction(fraction).limit_denominator(10**6)
    if ratio.numerator * ratio.denominator >= 2**31:  # the products below are of 32 bits
        ratio = ratio.limit_denominator(46_340)
    quotient, rest = count // ratio.denominator, count % ratio.denominator
    product = rest * ratio.numerator
    whole = quotient * ratio.numerator + product // ratio.denominator
    return whole, (product % ratio.denominator) / ratio.denominator


def _take(values: Array, index: Array) -> Array:
    return jnp.take_along_axis(values, index, axis=-1)
