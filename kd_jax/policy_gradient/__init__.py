"""The gradient of a sequence's KL(q || p) from samples: rewards, returns, advantages, and the clipped surrogate.

The reward of a token that the student sampled is log p - log q, or another function of both, see `reward_shapes`. All
functions take arrays [B, L] with the
log-probabilities of sampled tokens. Distributions over the vocabulary are used only in `objectives`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kd_jax import resolve
from kd_jax.policy_gradient import reward_shapes
from kd_jax.resolve import check_number
from kd_jax.settings import Config


class Scores(NamedTuple):
    """Log-probabilities of a batch's targets, in nats, without gradient. They are 0 where `counted` is False.

    Attributes:
      log_p: the log-probabilities under the teacher.
      log_q: the log-probabilities under the current student.
      drawn_log_q: the log-probabilities under the student that sampled the tokens; `log_q` for text of other origin.
      counted: True where a target counts.
    """

    log_p: Float[Array, "B L"]
    log_q: Float[Array, "B L"]
    drawn_log_q: Float[Array, "B L"]
    counted: Bool[Array, "B L"]


def rewards(
    scores: Scores,
    scale: float = 1.0,
    limit: float = float("inf"),
    shape: Callable[..., Array] = reward_shapes.identity,
) -> Float[Array, "B L"]:
    """Returns shape(log p, log q) / scale of each token, clipped to [-limit, limit].

    Here q is the distribution of the student that sampled the token. `shape` is a function of `reward_shapes`.
    """
    value = jnp.clip(shape(scores.log_p, scores.drawn_log_q) / scale, -limit, limit)
    return jnp.where(scores.counted, value, 0)


def returns(
    rewards: Float[Array, "B L"],
    counted: Bool[Array, "B L"],
    *,
    discount: float = 1.0,
    include_current: bool = False,
    length_normalised: bool = True,
) -> Float[Array, "B L"]:
    """Returns R_t = sum over i > t of discount^(i - t - 1) r_i, divided by the number of tokens in the sum.

    Args:
      rewards: the reward of each token, 0 where `counted` is False.
      counted: True where a token counts; each row has one run of True.
      discount: the factor for each later position, in [0, 1].
      include_current: True if the sum begins at t, with the token's own reward. A reverse KL already contains the exact
        expectation of this reward.
      length_normalised: True to divide by the number of tokens. Without the division, long responses weigh more.

    Returns:
      A value per token, 0 where the sum has no term, and where `counted` is False.

    References:
      Gu et al., "MiniLLM", https://arxiv.org/abs/2306.08543, 2024, section 2.2. The paper has discount 1 and
      excludes the current token. The paper's code has discount 0.95 and includes the current token.
    """

    def back(later: Array, now: Array) -> tuple[Array, Array]:
        total = now + jnp.array([discount, 1.0], now.dtype)[:, None] * later
        return total, total if include_current else later

    pairs = jnp.stack([rewards, counted.astype(rewards.dtype)]).transpose(2, 0, 1)  # [L, 2, B]
    _, sums = jax.lax.scan(back, jnp.zeros_like(pairs[0]), pairs, reverse=True)
    total, count = sums[:, 0].T, sums[:, 1].T
    return jnp.where(counted, total / jnp.maximum(count, 1) if length_normalised else total, 0)


def whiten(values: Float[Array, "B L"], over: Bool[Array, "B L"]) -> Float[Array, "B L"]:
    """Returns the values, shifted and scaled to mean 0 and variance 1 over the positions `over` of the global batch.

    The variance is the unbiased estimate.
    """
    count = jnp.maximum(over.sum(), 2)
    mean = jnp.where(over, values, 0).sum() / count
    variance = jnp.where(over, (values - mean) ** 2, 0).sum() / (count - 1)
    return (values - mean) * jax.lax.rsqrt(variance + 1e-8)


def importance(scores: Scores, teacher_share: float) -> Float[Array, "B L"]:
    """Returns q / ((1 - a) q + a p) of each token, in (0, 1 / (1 - a)].

    The result is the importance weight of a token that was sampled from the mixture with the teacher's share a.
    """
    # Exponents above 80 would overflow in float32, and their weight is 0 to within rounding.
    odds = jnp.exp(jnp.minimum(scores.log_p - scores.drawn_log_q, 80.0))
    return 1 / ((1 - teacher_share) + teacher_share * odds)


def importance_now(scores: Scores, teacher_share: float) -> Float[Array, "B L"]:
    """Returns the importance weight of each token for the current student.

    The current student may differ from the student that sampled the rows, because training has continued since then.
    """
    return jnp.exp(scores.log_q - scores.drawn_log_q) * importance(scores, teacher_share)


def response_slots(counted: Bool[Array, "B L"], most: int | None) -> Bool[Array, "B L"]:
    """Returns True at the positions that a response of at most `most` tokens can fill.

    The positions begin at the first counted token of a row.
    """
    position = jnp.cumsum(jnp.cumsum(counted, axis=1) > 0, axis=1)  # from 1 at the first counted token
    return (position > 0) & (position <= (counted.shape[1] if most is None else most))


def clipped_surrogate(
    log_q: Float[Array, "..."],
    drawn_log_q: Float[Array, "..."],
    advantage: Float[Array, "..."],
    importance: Float[Array, "..."],
    clip: float,
) -> Float[Array, "..."]:
    """Returns -min(ratio A, clip(ratio, 1 - clip, 1 + clip) A), the clipped surrogate.

    The ratio is importance * q / (q at the time when the token was sampled).

    Args:
      log_q: the sampled tokens' log-probabilities under the student, with gradient.
      drawn_log_q: the sampled tokens' log-probabilities under the student that sampled them, a constant.
      advantage: the advantage A of each token, a constant.
      importance: the importance weight of each token, a constant.
      clip: the largest distance of the ratio from 1 before it is clipped; 0 for no clipping.

    Returns:
      A loss per token. With ratio 1, the gradient of the loss is -A times the gradient of log q.

    References:
      Schulman et al., "Proximal Policy Optimization Algorithms", https://arxiv.org/abs/1707.06347, 2017, eq. 7.
    """
    ratio = jnp.exp(log_q - drawn_log_q) * importance
    if clip == 0:
        return -ratio * advantage
    return -jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - clip, 1 + clip) * advantage)


def make_signals(
    options: Config, teacher_share: float, max_new_tokens: int | None
) -> Callable[[Scores], tuple[Array, Array, Array]]:
    """Returns the function from scores to the three arrays that the surrogate takes.

    The arrays are each token's advantage, log q at the time when the token was sampled, and importance weight.

    Args:
      options: the options that `kd_jax.settings.Policy` declares.
      teacher_share: the teacher's share of the mixture from which the tokens were sampled.
      max_new_tokens: the largest number of tokens in a response; None for all positions of a row.

    Raises:
      ValueError: an option is out of range, or the baseline is not the mean of the rewards.
    """
    number = lambda name, low, high=float("inf"): check_number(f"policy.{name}", options[name], low, high)
    discount, limit = number("discount", 0, 1), number("reward_limit", 0) or float("inf")
    shape = resolve.bind(options["reward"], reward_shapes)
    scale = number("reward_scale", 1e-6)
    number("clip", 0)  # checked here, used by the surrogate
    for name, known in (("baseline", ("none", "kl")), ("whiten", ("none", "counted", "all"))):
        if options[name] not in known:
            raise ValueError(f"policy.{name}={options[name]!r} is not one of {', '.join(known)}.")
    own_reward_only = discount == 0 and options["include_current"] and not options["length_normalised"]
    is_plain = limit == float("inf") and options["whiten"] == "none" and shape.func is reward_shapes.identity
    if options["baseline"] == "kl" and not (
        own_reward_only and is_plain and dict(options["members"]) == {"teacher": 1.0}
    ):
        raise ValueError(
            "policy.baseline='kl' is the mean of a token's own reward, so this baseline needs discount=0, "
            "include_current=True, length_normalised=False, reward_limit=0, whiten='none', reward='identity' and "
            "members={'teacher': 1.0}."
        )

    def signals(scores: Scores) -> tuple[Array, Array, Array]:
        advantage = returns(
            rewards(scores, scale, limit, shape), scores.counted, discount=discount,
            include_current=options["include_current"], length_normalised=options["length_normalised"],
        )  # fmt: skip
        if options["whiten"] != "none":
            slots = response_slots(scores.counted, max_new_tokens)
            advantage = whiten(advantage, slots if options["whiten"] == "all" else scores.counted)
        return advantage, scores.drawn_log_q, importance(scores, teacher_share)

    return signals
