"""Divergences between two next-token distributions.

Each divergence is a function ``D(log_p, log_q, *, ...)`` that returns a value per token, in nats.

- ``log_p`` are the teacher's log-probabilities and ``log_q`` the student's. The functions do not depend on which model
  is which.
- Both are normalised over the last axis, the vocabulary. Each function sums over this axis.
- The value and the gradient are finite wherever the true value is finite, also where a log-probability is ``-inf`` and
  where ``p == q``.
- If the true value is infinite, the returned value is infinite. The entries that cause the infinite value add nothing
  to the gradient.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kd_jax.logspace import Number, Weight, alpha_beta_entries, mixture_kl_entries, over_vocab, promote, weigh
from kd_jax.resolve import check_fraction, check_number

__all__ = [
    "adaptive_kl",
    "alpha_beta",
    "alpha_divergence",
    "forward_kl",
    "jensen_shannon",
    "mixed_kl",
    "reverse_kl",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
]

LogProbs = Float[Array, "*batch vocab"]
PerToken = Float[Array, "*batch"]


def forward_kl(log_p: LogProbs, log_q: LogProbs) -> PerToken:
    """Returns ``KL(p || q) = sum p (log p - log q)``.

    Forward KL asks the student to cover every token that the teacher may choose. The value is infinite where the
    teacher has mass and the student has none.

    Returns:
      Nats per token, not negative.

    Example:
      >>> p, q = jnp.array([0.5, 0.5, 0.0]), jnp.array([0.5, 0.25, 0.25])
      >>> round(float(forward_kl(jnp.log(p), jnp.log(q))), 4)
      0.3466

    References:
      Hinton et al., `Distilling the Knowledge in a Neural Network <https://arxiv.org/abs/1503.02531>`_, 2015.
    """
    return jnp.sum(alpha_beta_entries(log_p, log_q, 1.0, 0.0), axis=-1)


def reverse_kl(log_p: LogProbs, log_q: LogProbs) -> PerToken:
    """Returns ``KL(q || p) = sum q (log q - log p)``.

    Reverse KL asks the student to choose only tokens that the teacher may choose. The value is infinite where the
    student has mass and the teacher has none.

    Returns:
      Nats per token, not negative.

    Example:
      >>> p, q = jnp.array([0.5, 0.25, 0.25]), jnp.array([0.5, 0.5, 0.0])
      >>> round(float(reverse_kl(jnp.log(p), jnp.log(q))), 4)
      0.3466

    References:
      Gu et al., `MiniLLM <https://arxiv.org/abs/2306.08543>`_, 2024.
    """
    return forward_kl(log_q, log_p)


def mixed_kl(log_p: LogProbs, log_q: LogProbs, *, forward_weight: Weight = 0.5) -> PerToken:
    """Returns ``w KL(p || q) + (1 - w) KL(q || p)``.

    The sum is a fixed compromise between covering the teacher and staying within the teacher's support. With
    ``w = 1/2`` the value is half of Jeffreys' divergence.

    Args:
      forward_weight: w, in ``[0, 1]``.

    Returns:
      Nats per token, not negative.

    Raises:
      ValueError: if ``forward_weight`` is a Python number outside ``[0, 1]``.

    Example:
      >>> p, q = jnp.array([0.5, 0.5, 0.0]), jnp.array([0.5, 0.25, 0.25])
      >>> round(float(mixed_kl(jnp.log(p), jnp.log(q), forward_weight=1.0)), 4)
      0.3466

    References:
      Wu et al., `Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large Language Models
      <https://arxiv.org/abs/2404.02657>`_, 2025 (the baseline FKL + RKL).
    """
    w = check_fraction("forward_weight", forward_weight)
    return weigh(w, forward_kl(log_p, log_q)) + weigh(1 - w, reverse_kl(log_p, log_q))


def adaptive_kl(
    log_p: LogProbs, log_q: LogProbs, *, head_mass: Number = 0.5, include_crossing: bool = True
) -> PerToken:
    """Returns ``h KL(p || q) + (1 - h) KL(q || p)``, with ``h`` the share of ``sum |p - q|`` in the teacher's head.

    The head is the smallest set of the teacher's top tokens whose mass reaches ``head_mass``. Tokens of equal
    probability are either all in the head or all outside. The paper's reason is that forward KL learns the head first
    and reverse KL the tail; notebooks/02_head_and_tail measures where this holds. ``h`` is a constant to the gradient,
    so the gradient need not be 0 at a minimum of the value.

    Args:
      head_mass: the mass of the teacher's head, in ``[0, 1]``.
      include_crossing: True if the token that reaches ``head_mass`` belongs to the head, as in the paper. The authors'
        code excludes this token unless it is the first.

    Returns:
      Nats per token, not negative; 0 where ``p == q``.

    Raises:
      ValueError: if ``head_mass`` is a Python number outside ``[0, 1]``.

    Example:
      >>> p, q = jnp.array([0.7, 0.2, 0.1]), jnp.array([0.7, 0.1, 0.2])  # they differ in the tail only
      >>> log_p, log_q = jnp.log(p), jnp.log(q)
      >>> bool(jnp.isclose(adaptive_kl(log_p, log_q), reverse_kl(log_p, log_q)))
      True

    References:
      Wu et al., `Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large Language Models
      <https://arxiv.org/abs/2404.02657>`_, 2025.
    """
    head_mass = check_number("head_mass", head_mass, 0.0, 1.0)
    log_p, log_q = promote(log_p, log_q)
    p, q = jnp.exp(jax.lax.stop_gradient(log_p)), jnp.exp(jax.lax.stop_gradient(log_q))
    gap = jnp.abs(p - q)
    total = jnp.sum(gap, axis=-1)
    in_head = jnp.sum(jnp.where(_head(p, head_mass, include_crossing), gap, 0.0), axis=-1)
    share = jnp.where(total > 0, in_head / jnp.where(total > 0, total, 1.0), 0.5)
    return weigh(share, forward_kl(log_p, log_q)) + weigh(1 - share, reverse_kl(log_p, log_q))


def jensen_shannon(log_p: LogProbs, log_q: LogProbs, *, weight: Weight = 0.5) -> PerToken:
    """Returns ``w KL(p || m) + (1 - w) KL(q || m)`` with ``m = w p + (1 - w) q``.

    The value is always finite, and is bounded by the entropy of ``(w, 1 - w)``. Divided by w, the value tends to
    ``KL(p || q)`` as w tends to 0. Divided by 1 - w, the value tends to ``KL(q || p)`` as w tends to 1. At w = 0 and
    w = 1 the value is 0 for all distributions, so these Python numbers are refused.

    Args:
      weight: w, the teacher's share of the mixture, in ``(0, 1)``.

    Returns:
      Nats per token, between 0 and ``-w log w - (1 - w) log(1 - w)``.

    Raises:
      ValueError: if ``weight`` is a Python number outside ``(0, 1)``.

    Example:
      >>> p, q = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
      >>> round(float(jensen_shannon(jnp.log(p), jnp.log(q))), 4)  # log 2
      0.6931

    References:
      Agarwal et al., `On-Policy Distillation of Language Models <https://arxiv.org/abs/2306.13649>`_, 2024.
    """
    w = check_fraction("weight", weight)
    _refuse_zero("weight", w, (0.0, 1.0), "Use forward_kl for the limit at 0, and reverse_kl for the limit at 1")
    of_p, of_q = mixture_kl_entries(log_p, log_q, w)
    w = over_vocab(w)
    return jnp.sum(weigh(w, of_p) + weigh(1 - w, of_q), axis=-1)


def skew_forward_kl(log_p: LogProbs, log_q: LogProbs, *, skew: Weight = 0.1) -> PerToken:
    """Returns ``KL(p || s p + (1 - s) q)``.

    The share of p gives the second distribution a lower bound. The value therefore never exceeds ``-log s``, and the
    gradients are bounded.

    Args:
      skew: s, in ``[0, 1)``; 0 is forward KL.

    Returns:
      Nats per token, between 0 and ``-log s``.

    Raises:
      ValueError: if ``skew`` is a Python number outside ``[0, 1)``.

    Example:
      >>> p, q = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
      >>> round(float(skew_forward_kl(jnp.log(p), jnp.log(q))), 4)  # -log 0.1
      2.3026

    References:
      Ko et al., `DistiLLM <https://arxiv.org/abs/2402.03898>`_, 2024.
    """
    s = check_fraction("skew", skew)
    _refuse_zero("skew", s, (1.0,), "Use a skew below 1; a skew of 0 gives forward_kl or reverse_kl")
    return jnp.sum(mixture_kl_entries(log_p, log_q, s)[0], axis=-1)


def skew_reverse_kl(log_p: LogProbs, log_q: LogProbs, *, skew: Weight = 0.1) -> PerToken:
    """Returns ``KL(q || s q + (1 - s) p)``.

    The share of q gives the second distribution a lower bound. The value therefore stays finite where the student has
    mass and the teacher has none.

    Args:
      skew: s, in ``[0, 1)``; 0 is reverse KL.

    Returns:
      Nats per token, between 0 and ``-log s``.

    Raises:
      ValueError: if ``skew`` is a Python number outside ``[0, 1)``.

    Example:
      >>> p, q = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
      >>> round(float(skew_reverse_kl(jnp.log(p), jnp.log(q))), 4)  # -log 0.1
      2.3026

    References:
      Ko et al., `DistiLLM <https://arxiv.org/abs/2402.03898>`_, 2024.
    """
    return skew_forward_kl(log_q, log_p, skew=skew)


def total_variation(log_p: LogProbs, log_q: LogProbs) -> PerToken:
    """Returns ``1/2 sum |p - q|``.

    Suppose that a token came from p or from q with equal chances. Then the best guess of the token's source is wrong
    with probability ``(1 - TV) / 2``. The value is symmetric and bounded, and depends on differences of probabilities,
    not on their ratios. The gradient is taken as 0 where ``p == q``.

    Returns:
      A number per token between 0 and 1, without a unit.

    Example:
      >>> p, q = jnp.array([0.5, 0.5, 0.0]), jnp.array([0.5, 0.25, 0.25])
      >>> float(total_variation(jnp.log(p), jnp.log(q)))
      0.25

    References:
      Wen et al., `f-Divergence Minimization for Sequence-Level Knowledge Distillation
      <https://arxiv.org/abs/2307.15190>`_, 2023.
    """
    log_p, log_q = promote(log_p, log_q)
    return jnp.sum(jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)), axis=-1) / 2


def alpha_divergence(log_p: LogProbs, log_q: LogProbs, *, alpha: Number) -> PerToken:
    """Returns ``(1 - sum p^alpha q^(1 - alpha)) / (alpha (1 - alpha))``, and its limits at alpha 0 and 1.

    The limit at 0 is ``KL(q || p)``, and the limit at 1 is ``KL(p || q)``. One parameter thus leads from reverse KL
    through the Hellinger distance (1/2) to forward KL. The function is ``alpha_beta`` with ``beta = 1 - alpha``. The
    value is always finite for alpha strictly between 0 and 1.

    Args:
      alpha: any finite Python number.

    Returns:
      Nats per token, not negative.

    Raises:
      ValueError: if ``alpha`` is not a finite number.

    Example:
      >>> log_p, log_q = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.9, 0.1]))
      >>> [round(float(alpha_divergence(log_p, log_q, alpha=alpha)), 4) for alpha in (0.999999, 1.0)]
      [0.5108, 0.5108]

    References:
      Cichocki & Amari, `Families of Alpha- Beta- and Gamma-Divergences <https://doi.org/10.3390/e12061532>`_,
      2010.
    """
    alpha = check_number("alpha", alpha)
    return jnp.sum(alpha_beta_entries(log_p, log_q, alpha, 1 - alpha), axis=-1)


def alpha_beta(log_p: LogProbs, log_q: LogProbs, *, alpha: Number, beta: Number) -> PerToken:
    """Returns ``-1/(ab) sum [p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)]`` and its limits.

    Here ``a`` is alpha and ``b`` is beta.

    For most pairs, a smaller alpha gives more weight to tokens on which p and q differ strongly. A larger beta gives
    more weight to tokens of which the student is sure (notebooks/01_divergences). Special cases are (1, 0), forward KL;
    (0, 1), reverse KL; ``a + b = 1``, the alpha-divergences; and (0, 0), half the squared difference of the logarithms.

    The function is continuous in both parameters, and the published code is not. The limits carry the factor ``1/b^2``
    at ``a = 0``, and ``1/a^2`` at ``b = 0`` and at ``a + b = 0``. An entry where p or q has no mass adds a finite
    amount only if ``a + b`` and the exponent of that distribution are positive.

    Args:
      alpha: the teacher's exponent, any finite Python number.
      beta: the student's exponent, any finite Python number.

    Returns:
      A number per token, not negative, in nats where ``a + b = 1``.

    Raises:
      ValueError: if ``alpha`` or ``beta`` is not a finite number.

    Example:
      >>> log_p, log_q = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.9, 0.1]))
      >>> [round(float(alpha_beta(log_p, log_q, alpha=1.0, beta=beta)), 4) for beta in (-1e-6, 0.0, 1e-6)]
      [0.5108, 0.5108, 0.5108]

    References:
      Cichocki et al., `Generalized Alpha-Beta Divergences <https://doi.org/10.3390/e13010134>`_, 2011;
      Wang et al., `ABKD <https://arxiv.org/abs/2505.04560>`_, 2025.
    """
    alpha, beta = check_number("alpha", alpha), check_number("beta", beta)
    return jnp.sum(alpha_beta_entries(log_p, log_q, alpha, beta), axis=-1)


def _head(p: Array, head_mass: float, include_crossing: bool) -> Array:
    """Returns True for the tokens in the teacher's head.

    A token is in the head if its probability is at least the largest threshold at which ``head_mass`` is reached.

    The threshold is found by bisection of the bits of floating-point numbers, which are in the same order as the
    numbers. The bisection takes some tens of sums over the vocabulary. A sort would cost as much as some hundreds.
    """
    integer = jnp.int64 if p.dtype == jnp.float64 else jnp.int32
    number = lambda bits: jax.lax.bitcast_convert_type(bits, p.dtype)[..., None]
    highest = jnp.max(p, axis=-1)

    def halve(_: jax.typing.ArrayLike, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        mass = jnp.sum(jnp.where(p >= number(middle), p, 0.0), axis=-1)
        reached = mass >= head_mass if include_crossing else mass > head_mass
        return jnp.where(reached, middle, low), jnp.where(reached, high, middle)

    # The bits of numbers below 2 are integers below 2**62 (float64) and 2**30 (float32).
    halvings = 62 if p.dtype == jnp.float64 else 30
    beyond = jax.lax.bitcast_convert_type(highest, integer) + 1
    crossing, _ = jax.lax.fori_loop(0, halvings, halve, (jnp.zeros_like(beyond), beyond))
    if include_crossing:
        return p >= number(crossing)
    return (p > number(crossing)) | (p == highest[..., None])


def _refuse_zero(name: str, value: Weight, ends: tuple[float, ...], advice: str) -> None:
    """Refuses a Python number at which a divergence is 0 for all distributions and has no gradient."""
    if isinstance(value, float) and value in ends:
        raise ValueError(
            f"{name}={value!r} makes this divergence 0 for all distributions, without any gradient. {advice}."
        )
