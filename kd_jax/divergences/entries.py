"""The contributions of the single entries to those divergences that are plain sums over the vocabulary."""

from collections.abc import Callable

import jax.numpy as jnp

from kd_jax.divergences.shared import LogProbs
from kd_jax.divergences.weighted_kl import todi_entries
from kd_jax.logspace import Weight, has_mass, log_mix, log_ratio, over_vocab, promote, weigh
from kd_jax.resolve import check_fraction


def _forward_kl(log_p: LogProbs, log_q: LogProbs) -> LogProbs:
    """Returns ``p (log p - log q)``, which may be negative; 0 where p has no mass."""
    log_p, log_q = promote(log_p, log_q)
    infinite = has_mass(log_p) & ~has_mass(log_q)
    return jnp.where(infinite, jnp.inf, jnp.exp(log_p) * log_ratio(log_p, log_q))


def _reverse_kl(log_p: LogProbs, log_q: LogProbs) -> LogProbs:
    return _forward_kl(log_q, log_p)


def _mixed_kl(log_p: LogProbs, log_q: LogProbs, *, forward_weight: Weight = 0.5) -> LogProbs:
    w = over_vocab(check_fraction("forward_weight", forward_weight))
    return weigh(w, _forward_kl(log_p, log_q)) + weigh(1 - w, _reverse_kl(log_p, log_q))


def _jeffreys(log_p: LogProbs, log_q: LogProbs) -> LogProbs:
    return _forward_kl(log_p, log_q) + _reverse_kl(log_p, log_q)


def _jensen_shannon(log_p: LogProbs, log_q: LogProbs, *, weight: Weight = 0.5) -> LogProbs:
    w = check_fraction("weight", weight)
    log_m, w = log_mix(log_p, log_q, w), over_vocab(w)
    return weigh(w, _forward_kl(log_p, log_m)) + weigh(1 - w, _forward_kl(log_q, log_m))


def _skew_forward_kl(log_p: LogProbs, log_q: LogProbs, *, skew: Weight = 0.1) -> LogProbs:
    return _forward_kl(log_p, log_mix(log_p, log_q, check_fraction("skew", skew)))


def _skew_reverse_kl(log_p: LogProbs, log_q: LogProbs, *, skew: Weight = 0.1) -> LogProbs:
    return _skew_forward_kl(log_q, log_p, skew=skew)


def _total_variation(log_p: LogProbs, log_q: LogProbs) -> LogProbs:
    log_p, log_q = promote(log_p, log_q)
    return jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)) / 2


# From the name of a divergence to a function of the same arguments that returns the summands as the formula has them.
# The functions of the divergences add terms to the summands that cancel in the sum over the whole vocabulary. Those
# terms would be wrong where entries are clipped, or where the sum is over a part of the vocabulary.
ENTRIES: dict[str, Callable[..., LogProbs]] = {
    "forward_kl": _forward_kl,
    "jeffreys": _jeffreys,
    "jensen_shannon": _jensen_shannon,
    "mixed_kl": _mixed_kl,
    "reverse_kl": _reverse_kl,
    "skew_forward_kl": _skew_forward_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "todi": todi_entries,
    "total_variation": _total_variation,
}
