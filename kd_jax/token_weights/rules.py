"""The rules: functions from scores of tokens to a weight for each token.

The names of a rule's positional parameters say what the rule needs.

- The name of a score of `kd_jax.token_weights.scores`, such as ``teacher_entropy``, asks for that score.
- ``score`` asks for the score that the spec names under ``of``.
- ``counted`` is True where a token counts, and ``row`` is a number for each token, equal within a row.
- ``position`` is the index of a token among its row's counted tokens, from 0; ``position_from_end`` is 0 at the last.
- ``drawn_log_q`` is the token's log-probability under the student that sampled it, and under the student elsewhere.
- ``divergence`` is the value of the term's own divergence. ``has_view`` is True where the teacher has a view of its own.

A rule with ``counted`` or ``row`` receives whole arrays [B, L] of the global batch. Only counted tokens enter its
statistics, and other tokens have weight 0. Any other rule receives its own tokens only, in an array of any shape, and
its weights at tokens that do not count have no meaning. Keyword-only parameters are options that a spec gives. The value
of an option with a schedule is an array with one number for each token, all equal; an option annotated as ``int``
receives whole numbers.

A weight is 1, 0, or another number that is not negative. A score that is not a number gives such a weight, so that an
error in a model does not look like a choice of the rule. An option that is unknown or out of range is a ValueError.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kd_jax.resolve import check_number
from kd_jax.token_weights import statistics
from kd_jax.token_weights.statistics import Option

__all__ = [
    "accept",
    "confidence_product",
    "first",
    "importance_now",
    "last",
    "prefix_gap",
    "product",
    "quantile",
    "relative_confidence",
    "sigmoid",
    "threshold",
    "top_fraction",
]

Tokens = Float[Array, "*tokens"]
Batch = Float[Array, "B L"]
Counted = Bool[Array, "B L"]
Rows = Int[Array, "B L"]


def threshold(score: Tokens, *, at_least: Option | None = None, below: Option | None = None) -> Tokens:
    """Keeps tokens whose score is in ``[at_least, below)``; a bound that is not given does not apply.

    Args:
      at_least: the lower bound.
      below: the upper bound, which is not kept itself.

    Returns:
      1 or 0 per token.

    Example:
      >>> threshold(jnp.array([0.1, 0.8, 2.0]), at_least=0.8).tolist()
      [0.0, 1.0, 1.0]

    References:
      "Entropy-Aware On-Policy Distillation" (EOPD), https://arxiv.org/abs/2603.07079, 2026: teacher_entropy, at least
      0.8, divided by all counted tokens.
    """
    return _kept(_between(score, *_bounds(at_least, below, -math.inf, math.inf)), score)


def quantile(
    score: Batch,
    counted: Counted,
    row: Rows,
    *,
    at_least: Option | None = None,
    below: Option | None = None,
    within: str = "batch",
    interpolation: str = "linear",
) -> Batch:
    """Keeps tokens whose score lies between two quantiles of the counted scores.

    Args:
      at_least: the level in [0, 1] of the lower quantile. Scores that equal this quantile are kept.
      below: the level in [0, 1] of the upper quantile. Scores that equal this quantile are not kept.
      within: 'batch' or 'row', the tokens over which a quantile is taken.
      interpolation: 'linear' or 'lower', see `statistics.quantiles`; 'lower' at level 0.5 is the lower median.

    Returns:
      1 or 0 per token.

    Example:
      >>> counted = jnp.array([[True, True, True, False]])
      >>> quantile(jnp.array([[3.0, 1.0, 2.0, 9.0]]), counted, jnp.zeros((1, 4), int), at_least=0.5).tolist()
      [[1.0, 0.0, 1.0, 0.0]]

    References:
      Zhong et al., "Revisiting Knowledge Distillation for Autoregressive Language Models" (ATKD),
      https://arxiv.org/abs/2402.11890, 2024: mass_off_target, the lower median. "TIP",
      https://arxiv.org/abs/2604.14084, 2026: the best half of the tokens. "TSD-KD", https://arxiv.org/abs/2603.13260,
      2026: student_entropy. The code of TSD-KD also counts padding in its quantile; this rule never does.
    """
    at_least, below = _bounds(at_least, below, 0.0, 1.0)
    level = lambda value: statistics.quantiles(score, counted, row, value, interpolation=interpolation, within=within)
    bounds = [None if value is None else level(value) for value in (at_least, below)]
    return _kept_of_counted(_between(score, *bounds), score, counted)


def top_fraction(
    score: Batch,
    counted: Counted,
    row: Rows,
    *,
    fraction: Option,
    within: str = "batch",
    at_least_per_row: int = 0,
    ties: str = "all",
    round: str = "floor",
) -> Batch:
    """Keeps the tokens with the largest scores: ``fraction`` times the number of counted tokens, and at least one.

    Args:
      fraction: the share of tokens that is kept, in [0, 1].
      within: 'batch' or 'row', the tokens among which the largest are found.
      at_least_per_row: the number of tokens of each row that are kept in any case, the row's largest.
      ties: 'all' to keep every token that equals the last one kept, 'first' to keep the earlier ones of equal tokens.
        Which token is earlier depends on the order of the rows in the batch.
      round: 'floor' or 'ceil', how the number of kept tokens becomes a whole number.

    Returns:
      1 or 0 per token.

    Example:
      >>> score, counted = jnp.array([[3.0, 1.0, 2.0, 9.0]]), jnp.array([[True, True, True, False]])
      >>> top_fraction(score, counted, jnp.zeros((1, 4), int), fraction=0.5, round="ceil").tolist()
      [[1.0, 0.0, 1.0, 0.0]]

    References:
      "AdaKD", https://arxiv.org/abs/2510.11615, 2025: round='floor'. "TA-OPD", https://arxiv.org/abs/2605.26844, 2026:
      fraction 0.05, round='ceil', at_least_per_row=1. "TIP", https://arxiv.org/abs/2604.14084, 2026, keeps tokens at
      or above a quantile, as `quantile` does.
    """
    per_row = _whole("at_least_per_row", at_least_per_row, 0)
    count = jnp.maximum(statistics.share(fraction, statistics.counts(counted, row, within), round), 1)
    kept = statistics.largest(score, counted, row, count, ties=ties, within=within)
    if isinstance(per_row, jax.Array) or per_row:
        most = jnp.broadcast_to(per_row, row.shape)
        kept = kept | statistics.largest(score, counted, row, most, ties=ties, within="row")
    return _kept_of_counted(kept, score, counted)


def accept(teacher_rank_of_student_top: Tokens, *, k: int, otherwise: Option) -> Tokens:
    """Returns 1 where the student's likeliest token is among the teacher's k likeliest, and ``otherwise`` elsewhere.

    Args:
      k: the number of the teacher's tokens, at least 1.
      otherwise: the weight of other tokens, at least 0.

    Example:
      >>> [round(float(weight), 2) for weight in accept(jnp.array([0.0, 4.0, 5.0]), k=5, otherwise=0.01)]
      [1.0, 1.0, 0.01]

    References:
      "SelecTKD", https://arxiv.org/abs/2510.24021, 2025: k = 5, otherwise 0.01, divided by all counted tokens.
    """
    limit, otherwise = _whole("k", k, 1), statistics.check_option("otherwise", otherwise, 0)
    return jnp.where(teacher_rank_of_student_top < limit, 1.0, otherwise).astype(teacher_rank_of_student_top.dtype)


def relative_confidence(teacher_entropy: Tokens, student_entropy: Tokens, *, scale: Option = 1.0) -> Tokens:
    """Returns ``sigmoid(scale (H(q) - H(p)))``: more than 1/2 where the teacher is more certain than the student.

    Args:
      scale: the factor of the difference, per nat, at least 0.

    Example:
      >>> float(relative_confidence(jnp.array(1.0), jnp.array(1.0)))
      0.5

    References:
      "TSD-KD", https://arxiv.org/abs/2603.13260, 2026: scale 1, divided by all counted tokens.
    """
    return jax.nn.sigmoid(statistics.check_option("scale", scale, 0) * (student_entropy - teacher_entropy))


def confidence_product(
    teacher_entropy: Batch, student_entropy: Batch, counted: Counted, *, alpha: Option, beta: Option
) -> Batch:
    """Returns ``(1 + alpha (1 - H(p) / max H(p))) (1 + beta H(q) / max H(q))``, divided by its mean.

    Tokens of which the teacher is certain and the student is uncertain weigh most. The maxima and the mean are over the
    batch's counted tokens. A gate on rows does not change the weights.

    Args:
      alpha: the importance of the teacher's certainty, at least 0.
      beta: the importance of the student's uncertainty, at least 0.

    Returns:
      Weights with mean 1.

    Example:
      >>> one, counted = jnp.ones((1, 2)), jnp.ones((1, 2), bool)
      >>> confidence_product(one, one, counted, alpha=1.0, beta=1.0).tolist()
      [[1.0, 1.0]]

    References:
      "FiRe-OPD", https://arxiv.org/abs/2606.02684, 2026: alpha = beta = 1, divided by all counted tokens.
    """
    alpha, beta = statistics.check_option("alpha", alpha, 0), statistics.check_option("beta", beta, 0)

    def relative(entropy: Array) -> Array:
        greatest = jnp.max(jnp.where(counted, entropy, 0))
        return entropy / jnp.where(greatest > 0, greatest, 1)

    weight = (1 + alpha * (1 - relative(teacher_entropy))) * (1 + beta * relative(student_entropy))
    total = jnp.where(counted, weight, 0).sum()
    return jnp.where(counted, weight * counted.sum() / jnp.where(total == 0, 1, total), 0)


def prefix_gap(log_p: Batch, drawn_log_q: Batch, counted: Counted, row: Rows, *, gamma: Option) -> Batch:
    """Returns ``1 + gamma (1 - (sum over s < t of |a_s|) / (sum over s of |a_s|))`` with ``a = log p - log q``.

    The sums are over the counted tokens of a row, and q is the student that sampled the row. Early tokens weigh most;
    the weight falls from 1 + gamma to 1 as the models' disagreement adds up. A row without disagreement has 1 + gamma.

    Args:
      gamma: the additional weight of a row's first token, at least 0.

    Example:
      >>> log_p, counted = jnp.array([[-1.0, -1.0, -3.0]]), jnp.ones((1, 3), bool)
      >>> prefix_gap(log_p, jnp.zeros((1, 3)), counted, jnp.zeros((1, 3), int), gamma=0.5).round(2).tolist()
      [[1.5, 1.399999976158142, 1.2999999523162842]]

    References:
      "IW-OPD", https://arxiv.org/abs/2606.22600, 2026: gamma = 0.5, divided by all counted tokens.
    """
    gamma = statistics.check_option("gamma", gamma, 0)
    size = jnp.where(counted, jnp.abs(log_p - drawn_log_q), 0)
    total = statistics.row_sums(size, row)
    before = statistics.earlier_sums(size, row) / jnp.where(total == 0, 1, total)
    return jnp.where(counted, 1 + gamma * (1 - before), 0)


def importance_now(log_q: Tokens, drawn_log_q: Tokens, *, at_most: Option) -> Tokens:
    """Returns the probability of the token under the student, relative to the student that sampled the token.

    Args:
      at_most: the upper bound of the weight, above 0.

    Example:
      >>> importance_now(jnp.log(jnp.array([0.1, 0.8])), jnp.log(jnp.array([0.2, 0.2])), at_most=2.0).round(3).tolist()
      [0.5, 2.0]
    """
    limit = jnp.log(statistics.check_option("at_most", at_most, 1e-30))
    return jnp.exp(jnp.minimum(log_q - drawn_log_q, limit))


def first(position: Int[Array, "*tokens"], *, count: int) -> Tokens:
    """Keeps the first ``count`` counted tokens of every row.

    Args:
      count: the number of tokens, at least 1.

    Returns:
      1 or 0 per token.

    Example:
      >>> first(jnp.arange(4), count=2).tolist()
      [1.0, 1.0, 0.0, 0.0]

    References:
      "ESR", https://arxiv.org/abs/2605.27028, 2026, as a mask: divided by the kept tokens.
    """
    return jnp.asarray(position < _whole("count", count, 1), float)


def last(position_from_end: Int[Array, "*tokens"], *, count: int) -> Tokens:
    """Keeps the last ``count`` counted tokens of every row, as `first` keeps the first ones.

    Args:
      count: the number of tokens, at least 1.

    Returns:
      1 or 0 per token.

    Example:
      >>> last(jnp.array([3, 2, 1, 0]), count=2).tolist()
      [0.0, 0.0, 1.0, 1.0]
    """
    return first(position_from_end, count=count)


def sigmoid(score: Tokens, *, slope: Option) -> Tokens:
    """Returns ``sigmoid(slope score)``, a weight between 0 and 1.

    Args:
      slope: the factor of the score. A negative slope gives low scores more weight.

    Example:
      >>> float(sigmoid(jnp.array(0.0), slope=5.0))
      0.5

    References:
      "SDAR", https://arxiv.org/abs/2605.15155, 2026: the score is gap, slope 5, divided by all counted tokens.
    """
    return jax.nn.sigmoid(statistics.check_option("slope", slope) * score)


def product(*weights: Tokens) -> Tokens:
    """Returns the product of the weights of several rules, which a spec names under ``rules``.

    Example:
      >>> product(jnp.array([1.0, 0.0]), jnp.array([0.5, 0.5])).tolist()
      [0.5, 0.0]
    """
    return math.prod(weights[1:], start=weights[0])


def _whole(name: str, value: int | Array, low: int) -> int | Array:
    if isinstance(value, jax.Array):
        return value
    number = check_number(name, value, low)
    if number != int(number):
        raise ValueError(f"{name} must be a whole number, but is {value!r}.")
    return int(number)


Bound = Option | None


def _bounds(at_least: Bound, below: Bound, low: float, high: float) -> tuple[Bound, Bound]:
    """Returns the bounds after a check, which also refuses numbers between which no score can be."""
    if at_least is None and below is None:
        raise ValueError("the rule needs at_least or below, or both.")
    check = lambda name, value: None if value is None else statistics.check_option(name, value, low, high)
    at_least, below = check("at_least", at_least), check("below", below)
    if isinstance(at_least, float) and isinstance(below, float) and not at_least < below:
        raise ValueError(f"at_least={at_least:g} must be less than below={below:g}.")
    return at_least, below


def _between(score: Array, at_least: Bound, below: Bound) -> Array:
    kept = jnp.ones(score.shape, bool)
    kept = kept if at_least is None else kept & (score >= at_least)
    return kept if below is None else kept & (score < below)


def _kept(kept: Array, score: Array) -> Array:
    """Returns 1 and 0 in the type of the score, and NaN where the score is NaN."""
    return jnp.where(jnp.isnan(score), score, kept.astype(score.dtype))


def _kept_of_counted(kept: Array, score: Array, counted: Array) -> Array:
    return jnp.where(counted, _kept(kept, score), 0)
