"""Log-probabilities over some outcomes of a vocabulary, and over all other ids as one more outcome.

The functions take log-probabilities [..., V] and a `Support`, and are the arithmetic below `kd_jax.supports`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kd_jax.logspace import has_mass, promote

LogProbs = Float[Array, "*batch V"]
Target = Int[Array, "*batch"]

# The log-probability on both sides of an entry that is no outcome. Its exp is 0 and its differences are 0, so that
# ``exp(log_p) * (log_p - log_q)`` is 0. With -inf it would be NaN.
NO_OUTCOME = -1e4


class Support(NamedTuple):
    """The ids over which two distributions are compared.

    Attributes:
      ids: ids of the vocabulary. The ids at which `chosen` is True are different.
      chosen: False for an entry that does not count: a duplicate in a union, or an id outside an intersection.
    """

    ids: Int[Array, "*batch m"]
    chosen: Bool[Array, "*batch m"]


class Restricted(NamedTuple):
    """Two distributions over the outcomes of a support, and the outcome of the row's token.

    Attributes:
      log_p: the teacher's log-probabilities.
      log_q: the student's log-probabilities.
      target: the index of the row's token among the outcomes, or of the tail if the token is in the tail. It is -1 for
        a token that is in no outcome. None if no token was given.
    """

    log_p: Float[Array, "*batch m"]
    log_q: Float[Array, "*batch m"]
    target: Int[Array, "*batch"] | None


def all_chosen(ids: Int[Array, "*batch m"]) -> Support:
    """Returns the support of these ids, which must be different."""
    return Support(ids, jnp.ones(ids.shape, bool))


def coarsen(log_q: LogProbs, ids: Int[Array, "*batch k"]) -> Float[Array, "*batch k+1"]:
    """Returns the log-probabilities of k different ids and, as one more outcome, of all other ids together.

    The mass of the other ids is summed, because one minus the mass of the k ids would be only rounding error if the k
    ids have nearly all of the mass.

    Args:
      log_q: log-probabilities, normalised over the last axis.
      ids: different ids of the vocabulary, fewer than all ids.

    Returns:
      Log-probabilities, normalised over the last axis.

    Example:
      >>> log_q = jnp.log(jnp.array([0.5, 0.1, 0.3, 0.1]))
      >>> jnp.exp(coarsen(log_q, jnp.array([2, 0]))).round(3).tolist()
      [0.30000001192092896, 0.5, 0.20000000298023224]
    """
    (log_q,) = promote(log_q)
    support = all_chosen(ids)
    return over_support(log_q, support, members(support, log_q.shape[-1]), "tail")


def shortest_beginning(support: Support, log_q: LogProbs, at_least: float) -> Support:
    """Keeps an entry if the student's mass on the entries before it is below ``at_least``."""
    q = jnp.exp(jnp.take_along_axis(log_q, support.ids, axis=-1, mode="clip"))
    before = jnp.cumsum(q, axis=-1)[..., :-1]
    before = jnp.concatenate([jnp.zeros_like(q[..., :1]), before], axis=-1)
    return Support(support.ids, support.chosen & (before < at_least))


def with_target(support: Support, target: Target, size: int) -> Support:
    """Adds the row's token as one more entry, which is chosen if the token is an id and is not in the support."""
    ids, chosen = support
    is_new = _is_id(target, size) & ~jnp.any(chosen & (ids == target[..., None]), axis=-1)
    ids = jnp.concatenate([ids, target[..., None].astype(ids.dtype)], axis=-1)
    return Support(ids, jnp.concatenate([chosen, is_new[..., None]], axis=-1))


def members(support: Support, size: int) -> Bool[Array, "*batch V"]:
    """Returns True at the chosen ids of the vocabulary."""
    ids = jnp.where(support.chosen, support.ids, size)  # an index beyond the end is dropped
    nothing = jnp.zeros((*ids.shape[:-1], size), bool)
    return jnp.put_along_axis(nothing, ids, True, axis=-1, inplace=False, mode="drop")


def over_support(
    log_p: LogProbs, support: Support, members: Bool[Array, "*batch V"] | None, rest: str
) -> Float[Array, "*batch m"]:
    """Returns one side's log-probabilities over the entries of a support and, with a tail, over all other ids."""
    values = jnp.take_along_axis(log_p, support.ids, axis=-1, mode="clip")
    if rest == "renormalised":
        values = _renormalised(values, values, support.chosen)
    values = jnp.where(support.chosen, values, NO_OUTCOME)
    if members is None:
        return values
    others = jnp.where(jnp.all(members, axis=-1, keepdims=True), NO_OUTCOME, _log_mass(log_p, ~members))
    return jnp.concatenate([values, others], axis=-1)


def renormalised_over(log_p: LogProbs, support: Support, elsewhere: float) -> LogProbs:
    """Returns the log-probabilities renormalised over a support, and the number ``elsewhere`` at all other ids."""
    values = jnp.take_along_axis(log_p, support.ids, axis=-1, mode="clip")
    inside = members(support, log_p.shape[-1])
    return jnp.where(inside, _renormalised(log_p, values, support.chosen), elsewhere)


def _renormalised(
    log_p: Float[Array, "*batch n"], values: Float[Array, "*batch m"], chosen: Bool[Array, "*batch m"]
) -> Float[Array, "*batch n"]:
    """Returns ``log_p`` minus the logarithm of the mass of the chosen values, and ``log_p`` itself without mass."""
    mass = _log_mass(values, chosen)
    return log_p - jnp.where(has_mass(mass), mass, 0.0)


def _log_mass(log_p: Float[Array, "*batch n"], chosen: Bool[Array, "*batch n"]) -> Float[Array, "*batch 1"]:
    """Returns the logarithm of the mass of the chosen entries.

    Without mass the logarithm is -inf, and its gradient is 0, where that of `jax.nn.logsumexp` is NaN.
    """
    log_p = jnp.where(chosen, log_p, -jnp.inf)
    highest = jnp.max(jax.lax.stop_gradient(log_p), axis=-1, keepdims=True)
    some = has_mass(highest)
    highest = jnp.where(some, highest, 0.0)
    total = jnp.sum(jnp.exp(log_p - highest), axis=-1, keepdims=True)
    return jnp.where(some, highest + jnp.log(jnp.where(some, total, 1.0)), -jnp.inf)


def index(target: Target, support: Support, size: int, has_tail: bool) -> Target:
    """Returns the index of the row's token among the outcomes, as `Restricted` says."""
    here = support.chosen & (support.ids == target[..., None])
    absent = jnp.where(_is_id(target, size), support.ids.shape[-1], -1) if has_tail else -1
    return jnp.where(jnp.any(here, axis=-1), jnp.argmax(here, axis=-1), absent).astype(jnp.int32)


def index_in_whole(target: Target, size: int) -> Target:
    """Returns the index of the row's token among all ids: the token, or -1 if the token is no id."""
    return jnp.where(_is_id(target, size), target, -1).astype(jnp.int32)


def _is_id(target: Target, size: int) -> Bool[Array, "*batch"]:
    return (target >= 0) & (target < size)
