"""What is kept of a teacher's distributions in place of the teacher, and how a student's are compared with it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kd_jax.objectives import Term
from kd_jax.storage.untrusted import clip

KINDS = ("hidden", "top_k", "samples")
BLOCK = 256  # ids that a draw is looked for among, once the block is drawn that they are in


class Draws(NamedTuple):
    """Tokens that the teacher drew, whose ids are elsewhere: what each weighs, and the entropy that they were drawn from."""

    weights: Float[Array, "*batch k"]
    entropy: Float[Array, "*batch"]


@dataclasses.dataclass(frozen=True)
class CachedTeacher:
    """A teacher that has read every row before the run: a batch brings what it said.

    Attributes:
      kind: 'hidden': its hidden states, from which its logits are made as ever: nothing is left out. 'top_k': its k likeliest
        tokens, and the mass of all others as one more outcome. 'samples': k draws with their weights.
      tied: of hidden: whether the output matrix is an embedding [V, D].
      path: of the teacher, where the cache was written.
    """

    kind: str
    tied: bool = False
    path: str = ""

    def described(self, path: str) -> str:
        """Whose it is, for a config that has this teacher.path, which is not read."""
        other = f" (of {clip(self.path)}; teacher.path={path} is not read)" if path not in ("", self.path) else ""
        return f"teacher's {self.kind} from its cache{other}"

    def hidden(self, batch: Mapping[str, Array]) -> Float[Array, "B L D"] | None:
        """Its hidden states; None where others are kept. A batch has their bits, which NumPy can hold and save."""
        if self.kind != "hidden":
            return None
        return jax.lax.bitcast_convert_type(batch["teacher_hidden"], jnp.bfloat16)

    def stored_head(self, params: Any) -> tuple[Array | None, bool]:
        """As of a `models.Model`; no matrix where there are no hidden states."""
        return (params["embed"]["embedding"] if self.tied else params["head"]["kernel"]) if params else None, self.tied

    def kept(self, batch: Mapping[str, Array]) -> tuple[Array, ...]:
        """What `see` needs of a batch, arrays [B, L, ...]."""
        names = {"hidden": (), "top_k": ("ids", "log_probs"), "samples": ("ids", "weights", "entropy")}[self.kind]
        return tuple(batch[f"teacher_{name}"] for name in names)

    def see(self, log_p: Array | None, log_q: Float[Array, "*batch V"], *kept: Array) -> tuple[Any, Array]:
        """What of the two is compared.

        Args:
          log_p: the teacher's whole distribution, where the hidden states gave it.
          log_q: the student's.
          *kept: of `kept`.

        Returns:
          hidden: both as they are. top_k: both over the k tokens and all others, [..., k + 1]. samples: `Draws`, and log q of
          what was drawn, [..., k].
        """
        if self.kind == "top_k":
            return kept[1], coarsen(log_q, kept[0])
        if self.kind == "samples":
            return Draws(*kept[1:]), jnp.take_along_axis(log_q, kept[0], axis=-1, mode="clip")
        return log_p, log_q

    def terms(self, terms: Sequence[Term]) -> tuple[Term, ...]:
        """An objective's terms, of which those that a teacher is needed for compare with what is kept."""
        if self.kind != "samples":
            return tuple(terms)
        drawn = lambda draws, seen, *rest: sampled_forward_kl(draws, seen)
        return tuple(dataclasses.replace(term, loss=drawn) if term.needs_teacher else term for term in terms)


def coarsen(log_q: Float[Array, "*batch V"], ids: Int[Array, "*batch k"]) -> Float[Array, "*batch k+1"]:
    """The log-probabilities of k different ids and, as one more outcome, of all others together.

    The others' is summed over them, and not what the k leave of 1, which is nothing but rounding where they have nearly all.

    Args:
      log_q: log-probabilities, normalised over the last axis.
      ids: within the vocabulary, none of them twice, and not all of it.

    Returns:
      Log-probabilities, normalised over the last axis.

    Example:
      >>> log_q = jnp.log(jnp.array([0.5, 0.1, 0.3, 0.1]))
      >>> jnp.exp(coarsen(log_q, jnp.array([2, 0]))).round(3).tolist()
      [0.30000001192092896, 0.5, 0.20000000298023224]
    """
    some = jnp.take_along_axis(log_q, ids, axis=-1, mode="clip")
    others = jnp.put_along_axis(log_q, ids, -jnp.inf, axis=-1, inplace=False, mode="clip")
    return jnp.concatenate([some, jax.nn.logsumexp(others, axis=-1, keepdims=True)], axis=-1)


def sampled_forward_kl(draws: Draws, log_q: Float[Array, "*batch k"]) -> Float[Array, "*batch"]:
    """``sum_j w_j (-log q(token j)) - H(p)``: without bias for ``KL(p || q)``, in value and gradient.

    Args:
      draws: with weights whose mean over draws is p(token) / (k times the probability that it is drawn with).
      log_q: the student's log-probabilities of the drawn tokens.

    Returns:
      Nats per token; of one draw it may be negative, its mean is not.

    Example:
      >>> draws = Draws(jnp.array([0.75, 0.25]), jnp.array(0.5623))  # of p = (3/4, 1/4), of four draws three the first
      >>> round(float(sampled_forward_kl(draws, jnp.log(jnp.array([0.5, 0.5])))), 4)
      0.1308

    References:
      Anshumann et al., "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs",
      https://arxiv.org/abs/2503.16870, 2025.
    """
    drawn = draws.weights > 0  # the rest fills the row up
    return -jnp.sum(jnp.where(drawn, draws.weights * jnp.where(drawn, log_q, 0), 0), axis=-1) - draws.entropy


def draw(log_p: Array, uniform: Array, power: float = 1.0) -> dict[str, Array]:
    """Tokens drawn from p to a power, normalised, and what each weighs, so that the weighted mean over draws is p's.

    A block of ids is drawn and then an id in it: a sum of probabilities over a whole vocabulary would have lost the small ones.

    Args:
      log_p: [..., V], normalised.
      uniform: [..., k, 2] in (0, 1].
      power: of the probabilities.

    Returns:
      teacher_ids and teacher_weights [..., k], and teacher_entropy [...], p's own.
    """
    log_t = log_p if power == 1 else jax.nn.log_softmax(power * log_p, axis=-1)
    width = min(BLOCK, log_p.shape[-1])
    more = [(0, 0)] * (log_p.ndim - 1) + [(0, -log_p.shape[-1] % width)]
    blocks = jnp.pad(jnp.exp(log_t), more).reshape(*log_p.shape[:-1], -1, width)
    block = _first_reaching(jnp.cumsum(blocks.sum(axis=-1), axis=-1)[..., None, :], uniform[..., 0])
    inside = jnp.take_along_axis(blocks, block[..., None], axis=-2)
    ids = block * width + _first_reaching(jnp.cumsum(inside, axis=-1), uniform[..., 1])
    ids = jnp.minimum(ids, log_p.shape[-1] - 1)
    ratio = jnp.take_along_axis(log_p, ids, axis=-1) - jnp.take_along_axis(log_t, ids, axis=-1)
    weights = jnp.where(ratio == ratio, jnp.exp(ratio), 0) / uniform.shape[-2]
    entropy = -jnp.sum(jnp.where(log_p > -jnp.inf, jnp.exp(log_p) * log_p, 0), axis=-1)
    return {"teacher_ids": ids, "teacher_weights": weights, "teacher_entropy": entropy}


def _first_reaching(sums: Array, uniform: Array) -> Array:
    """The first place whose running sum is at least this share, above 0, of the last one: one that has mass."""
    return jnp.sum(sums < uniform[..., None] * sums[..., -1:], axis=-1)


def merged(drawn: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Of `draw`, the same with every token once, its weights added up, and zeros behind, which compress to nothing."""
    order = np.argsort(drawn["teacher_ids"], axis=-1, kind="stable")
    ids, weights = (np.take_along_axis(drawn[f"teacher_{name}"], order, axis=-1) for name in ("ids", "weights"))
    place = np.cumsum(np.diff(ids, axis=-1, prepend=ids[:, :1]) != 0, axis=-1)
    found = {"teacher_ids": np.zeros_like(ids), "teacher_weights": np.zeros_like(weights)}
    np.put_along_axis(found["teacher_ids"], place, ids, axis=-1)
    np.add.at(found["teacher_weights"], (np.arange(len(ids))[:, None], place), weights)
    return drawn | found
