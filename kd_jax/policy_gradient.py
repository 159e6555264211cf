"""The gradient of a sequence's KL(q || p) from samples: rewards, returns, advantages, and the clipped surrogate.

A token that the student drew is rewarded with log p - log q. All of it is arithmetic on arrays [B, L] of log-probabilities
of tokens that were drawn; the distributions over the vocabulary come in only where `objectives` says so.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kd_jax.resolve import check_number


class Scores(NamedTuple):
    """Log-probabilities of a batch's targets, in nats, without gradient; 0 where `counted` is False.

    Attributes:
      log_p: under the teacher.
      log_q: under the student as it is.
      drawn_log_q: under the student that drew them; where nobody did, `log_q`.
      counted: where there is a target that counts.
    """

    log_p: Float[Array, "B L"]
    log_q: Float[Array, "B L"]
    drawn_log_q: Float[Array, "B L"]
    counted: Bool[Array, "B L"]


def rewards(scores: Scores, scale: float = 1.0, limit: float = float("inf")) -> Float[Array, "B L"]:
    """(log p - log q) / scale of each token for the student that drew it, cut at -limit and limit."""
    value = jnp.clip((scores.log_p - scores.drawn_log_q) / scale, -limit, limit)
    return jnp.where(scores.counted, value, 0)


def returns(
    rewards: Float[Array, "B L"],
    counted: Bool[Array, "B L"],
    *,
    discount: float = 1.0,
    include_current: bool = False,
    length_normalised: bool = True,
) -> Float[Array, "B L"]:
    """R_t = sum over i > t of discount^(i - t - 1) r_i, divided by the number of tokens in the sum.

    Args:
      rewards: 0 where `counted` is False.
      counted: one run of True a row.
      discount: of what comes later, in [0, 1].
      include_current: the sum begins at t: the token's own reward, whose exact expectation a reverse KL has as well.
      length_normalised: divide by the number of tokens; without it long responses weigh more.

    Returns:
      A value a token, 0 where nothing follows, or where `counted` is False.

    References:
      Gu et al., "MiniLLM", https://arxiv.org/abs/2306.08543, 2024, section 2.2: discount 1 and the current token left
      out; its code has 0.95 and includes it.
    """

    def back(later: Array, now: Array) -> tuple[Array, Array]:
        total = now + jnp.array([discount, 1.0], now.dtype)[:, None] * later
        return total, total if include_current else later

    pairs = jnp.stack([rewards, counted.astype(rewards.dtype)]).transpose(2, 0, 1)  # [L, 2, B]
    _, sums = jax.lax.scan(back, jnp.zeros_like(pairs[0]), pairs, reverse=True)
    total, count = sums[:, 0].T, sums[:, 1].T
    return jnp.where(counted, total / jnp.maximum(count, 1) if length_normalised else total, 0)


def whiten(values: Float[Array, "B L"], over: Bool[Array, "B L"]) -> Float[Array, "B L"]:
    """Values with mean 0 and variance 1 (the unbiased one) over the positions `over` of the whole batch."""
    count = jnp.maximum(over.sum(), 2)
    mean = jnp.where(over, values, 0).sum() / count
    variance = jnp.where(over, (values - mean) ** 2, 0).sum() / (count - 1)
    return (values - mean) * jax.lax.rsqrt(variance + 1e-8)


def importance(scores: Scores, teacher_share: float) -> Float[Array, "B L"]:
    """q / ((1 - a) q + a p) of each token, in (0, 1 / (1 - a)]: what it weighs when it was drawn from that mixture."""
    odds = jnp.exp(jnp.minimum(scores.log_p - scores.drawn_log_q, 80.0))  # beyond it the weight is 0 in float32
    return 1 / ((1 - teacher_share) + teacher_share * odds)


def importance_now(scores: Scores, teacher_share: float) -> Float[Array, "B L"]:
    """The same for the student as it is, which may have been trained on these rows since it drew them."""
    return jnp.exp(scores.log_q - scores.drawn_log_q) * importance(scores, teacher_share)


def response_slots(counted: Bool[Array, "B L"], most: int | None) -> Bool[Array, "B L"]:
    """Where a response of at most `most` tokens could have had one: from a row's first that counts."""
    place = jnp.cumsum(jnp.cumsum(counted, axis=1) > 0, axis=1)
    return (place > 0) & (place <= (counted.shape[1] if most is None else most))


def clipped_surrogate(
    log_q: Float[Array, "..."],
    drawn_log_q: Float[Array, "..."],
    advantage: Float[Array, "..."],
    importance: Float[Array, "..."],
    clip: float,
) -> Float[Array, "..."]:
    """-min(ratio A, clip(ratio, 1 - clip, 1 + clip) A), ratio = importance * q / (q when it was drawn).

    Args:
      log_q: of the drawn tokens under the student, with gradient.
      drawn_log_q, advantage, importance: constants.
      clip: how far the ratio is followed; 0: wherever it goes.

    Returns:
      A loss per token; with ratio 1 its gradient is -A * the gradient of log q.

    References:
      Schulman et al., "Proximal Policy Optimization Algorithms", https://arxiv.org/abs/1707.06347, 2017, eq. 7.
    """
    ratio = jnp.exp(log_q - drawn_log_q) * importance
    if clip == 0:
        return -ratio * advantage
    return -jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - clip, 1 + clip) * advantage)


def make_signals(
    options: Mapping[str, Any], teacher_share: float, max_new_tokens: int | None
) -> Callable[[Scores], tuple[Array, Array, Array]]:
    """From scores to what the surrogate takes of each token: advantage, log q when it was drawn, importance weight.

    Args:
      options: as `configs.base.policy` declares them.
      teacher_share: of the mixture that the tokens were drawn from.
      max_new_tokens: of a response; None: as many as a row has room for.

    Raises:
      ValueError: an option out of its range, or a baseline that is not the rewards' mean.
    """
    options = dict(options)
    number = lambda name, low, high=float("inf"): check_number(f"policy.{name}", options[name], low, high)
    discount, limit = number("discount", 0, 1), number("reward_limit", 0) or float("inf")
    scale = number("reward_scale", 1e-6)
    number("clip", 0)  # the surrogate's
    for name, known in (("baseline", ("none", "kl")), ("whiten", ("none", "counted", "all"))):
        if options[name] not in known:
            raise ValueError(f"policy.{name}={options[name]!r} is not one of {', '.join(known)}.")
    alone = discount == 0 and options["include_current"] and not options["length_normalised"]
    if options["baseline"] == "kl" and not (alone and limit == float("inf") and options["whiten"] == "none"):
        raise ValueError(
            "policy.baseline='kl' is the mean of a token's own reward: it goes with discount=0, include_current=True, "
            "length_normalised=False, reward_limit=0 and whiten='none'."
        )

    def signals(scores: Scores) -> tuple[Array, Array, Array]:
        advantage = returns(
            rewards(scores, scale, limit), scores.counted, discount=discount,
            include_current=options["include_current"], length_normalised=options["length_normalised"],
        )  # fmt: skip
        if options["whiten"] != "none":
            slots = response_slots(scores.counted, max_new_tokens)
            advantage = whiten(advantage, slots if options["whiten"] == "all" else scores.counted)
        return advantage, scores.drawn_log_q, importance(scores, teacher_share)

    return signals
