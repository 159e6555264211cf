"""Teachers whose distributions were stored before the run, and the mathematics of the stored values.

A batch has the stored arrays at the counted tokens. Each kind of a cache is one class.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from kd_jax.models import sampling
from kd_jax.objectives import Comparison, Term
from kd_jax.storage.untrusted import clip
from kd_jax.supports.outcomes import coarsen
from kd_jax.teachers.protocol import NoTeacher, Outputs, Teacher, distances

BLOCK = 256  # the number of ids in a block; a draw first chooses a block, and then an id in the block


class Draws(NamedTuple):
    """Tokens that were sampled from the teacher, without their ids.

    Attributes:
      weights: the weight of each sampled token.
      entropy: the entropy of the teacher's distribution, in nats.
    """

    weights: Float[Array, "*batch k"]
    entropy: Float[Array, "*batch"]


@dataclasses.dataclass(frozen=True)
class Cached(Teacher):
    """A teacher that read every row before the run. Each subclass stands for one kind of stored arrays.

    Attributes:
      tied: True if the output matrix of a cache of hidden states is the tied embedding [V, D].
      path: the path of the teacher with which the cache was written.
      member: the name of the frozen model.
      logit_cap: the cap of the logits that the hidden states of a cache make, or None.
    """

    kind: ClassVar[str]
    tied: bool = False
    path: str = ""
    member: str = "teacher"
    logit_cap: float | None = None

    def on_new_text(self) -> Teacher:
        """Returns `NoTeacher`, because a cache has no values for text that is not in the dataset."""
        return NoTeacher()

    def described(self, path: str) -> str:
        """Returns the kind of the cache, and the path of the cache's teacher if the config has another path."""
        teacher = f" of the teacher {clip(self.path)} (teacher.path={path} is not read)"
        named = teacher if path not in ("", self.path) else ""
        return f"a cache of kind {self.kind}{named}; no texts of the teacher and no KLs on student text are measured"


@dataclasses.dataclass(frozen=True)
class CachedHidden(Cached):
    """The teacher's hidden states, from which the output matrix makes the whole distributions."""

    kind: ClassVar[str] = "hidden"

    def outputs(self, params: PyTree, batch: Mapping[str, Array]) -> Outputs:
        """Returns the stored hidden states, and the stored output matrix from `params`.

        A batch has the bits of the hidden states as integers, because NumPy has no bfloat16.
        """
        hidden = jax.lax.bitcast_convert_type(batch[name_in_batch("teacher_hidden", self.member)], jnp.bfloat16)
        head = params["embed"]["embedding"] if self.tied else params["head"]["kernel"]
        return Outputs(hidden, head, self.tied, logit_cap=self.logit_cap)


@dataclasses.dataclass(frozen=True)
class CachedTopK(Cached):
    """The teacher's k likeliest tokens, and the mass of all other tokens as one more outcome."""

    kind: ClassVar[str] = "top_k"
    is_whole: ClassVar[bool] = False
    measures: ClassVar[tuple[str, ...]] = (
        "coarse_forward_kl", "coarse_reverse_kl", "coarse_total_variation", "top1_agreement",
    )  # fmt: skip

    def outputs(self, params: PyTree, batch: Mapping[str, Array]) -> Outputs:
        """Returns the stored ids and log-probabilities as extras."""
        return Outputs(None, None, extras=(batch["teacher_ids"], batch["teacher_log_probs"]))

    def align(self, log_p: Array | None, log_q: Float[Array, "*batch V"], *extras: Array) -> tuple[Array, Array]:
        """Returns both distributions over the k tokens and the outcome of all other tokens, [..., k + 1]."""
        ids, log_probs = extras
        return log_probs, coarsen(log_q, ids)

    def terms(self, terms: Sequence[Term]) -> tuple[Term, ...]:
        """Returns the terms, of which a support of the teacher's likeliest ids takes the first tokens of the record."""
        losses = [of.loss.over_record() if isinstance(of.loss, Comparison) else of.loss for of in terms]
        return tuple(dataclasses.replace(of, loss=loss) for of, loss in zip(terms, losses, strict=True))

    def measure(self, teacher_side: Array, student_side: Array, log_q: Float[Array, "*batch V"]) -> tuple[Array, ...]:
        """Returns the distances over the k + 1 outcomes, which are at most the distances of the whole distributions."""
        return (
            *distances(teacher_side, student_side),
            student_side[..., 0] == log_q.max(axis=-1),
        )  # the first stored token is the likeliest


@dataclasses.dataclass(frozen=True)
class CachedSamples(Cached):
    """Tokens that were sampled from the teacher, with their weights, which suffice for KL(p || q) only."""

    kind: ClassVar[str] = "samples"
    is_whole: ClassVar[bool] = False
    measures: ClassVar[tuple[str, ...]] = ("sampled_forward_kl",)

    def outputs(self, params: PyTree, batch: Mapping[str, Array]) -> Outputs:
        """Returns the sampled ids, their weights, and the entropies as extras."""
        return Outputs(
            None, None, extras=tuple(batch[f"teacher_{name}"] for name in ("ids", "weights", "entropy"))
        )  # fmt: skip

    def align(self, log_p: Array | None, log_q: Float[Array, "*batch V"], *extras: Array) -> tuple[Draws, Array]:
        """Returns the `Draws`, and the student's log-probabilities of the sampled tokens, [..., k]."""
        ids, *weights_and_entropy = extras
        return Draws(*weights_and_entropy), jnp.take_along_axis(log_q, ids, axis=-1, mode="clip")

    def terms(self, terms: Sequence[Term]) -> tuple[Term, ...]:
        """Returns the terms with `sampled_forward_kl` as the loss of each term that needs the teacher."""
        loss = lambda sides, target, arrays: sampled_forward_kl(sides["teacher"], sides["student"])
        return tuple(dataclasses.replace(term, loss=loss) if term.needs_teacher else term for term in terms)

    def measure(self, teacher_side: Draws, student_side: Array, log_q: Float[Array, "*batch V"]) -> tuple[Array, ...]:
        """Returns `sampled_forward_kl`, whose expected mean is the mean of KL(p || q)."""
        return (sampled_forward_kl(teacher_side, student_side),)


CACHED: dict[str, type[Cached]] = {cached.kind: cached for cached in (CachedHidden, CachedTopK, CachedSamples)}
KINDS = tuple(CACHED)


def name_in_batch(name: str, member: str) -> str:
    """Returns the name in a batch of an array of a frozen model's cache.

    Example:
      >>> name_in_batch("teacher_hidden", "teacher"), name_in_batch("teacher_hidden", "reference")
      ('teacher_hidden', 'teacher_hidden_of_reference')
    """
    return name if member == "teacher" else f"{name}_of_{member}"


def sampled_forward_kl(draws: Draws, log_q: Float[Array, "*batch k"]) -> Float[Array, "*batch"]:
    """Returns ``sum_j w_j (-log q(token j)) - H(p)``, an estimate of ``KL(p || q)`` without bias in value and gradient.

    Args:
      draws: the weights and the entropy. The weight of a draw is p(token) / (k * the probability of drawing the token).
      log_q: the student's log-probabilities of the sampled tokens.

    Returns:
      Nats per token. One estimate may be negative, but the expected value is not.

    Example:
      >>> draws = Draws(jnp.array([0.75, 0.25]), jnp.array(0.5623))  # p = (3/4, 1/4); three of four draws are the first
      >>> round(float(sampled_forward_kl(draws, jnp.log(jnp.array([0.5, 0.5])))), 4)
      0.1308

    References:
      Anshumann et al., "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs",
      https://arxiv.org/abs/2503.16870, 2025.
    """
    drawn = draws.weights > 0  # the other entries are padding
    return -jnp.sum(jnp.where(drawn, draws.weights * jnp.where(drawn, log_q, 0), 0), axis=-1) - draws.entropy


def draw(log_p: Array, uniform: Array, power: float = 1.0) -> dict[str, Array]:
    """Samples tokens from the distribution proportional to p^power, with weights that correct for the power.

    For any function f, the expected value of ``sum_j w_j f(token j)`` is the mean of f under p. Each sample chooses a
    block of ids, and then an id in the block. A running sum of probabilities over the whole vocabulary would lose the
    small probabilities to rounding.

    Args:
      log_p: the log-probabilities [..., V], normalised.
      uniform: uniform random numbers [..., k, 2] in [0, 1].
      power: the power of the probabilities.

    Returns:
      teacher_ids and teacher_weights [..., k], and teacher_entropy [...], the entropy of p.
    """
    log_t = log_p if power == 1 else jax.nn.log_softmax(power * log_p, axis=-1)
    width = min(BLOCK, log_p.shape[-1])
    padding = [(0, 0)] * (log_p.ndim - 1) + [(0, -log_p.shape[-1] % width)]
    blocks = jnp.pad(jnp.exp(log_t), padding).reshape(*log_p.shape[:-1], -1, width)
    block = _at_share(blocks.sum(axis=-1)[..., None, :], uniform[..., 0])
    inside = jnp.take_along_axis(blocks, block[..., None], axis=-2)
    ids = block * width + _at_share(inside, uniform[..., 1])
    ids = jnp.minimum(ids, log_p.shape[-1] - 1)
    ratio = jnp.take_along_axis(log_p, ids, axis=-1) - jnp.take_along_axis(log_t, ids, axis=-1)
    # A token with probability 0 has the ratio -inf - (-inf), which is NaN and differs from itself.
    weights = jnp.where(ratio == ratio, jnp.exp(ratio), 0) / uniform.shape[-2]
    entropy = -jnp.sum(jnp.where(log_p != -jnp.inf, jnp.exp(log_p) * log_p, 0), axis=-1)
    return {"teacher_ids": ids, "teacher_weights": weights, "teacher_entropy": entropy}


def _at_share(parts: Array, share: Array) -> Array:
    """Returns the index of the part in which the running sum passes a share of the whole sum."""
    ends = jnp.cumsum(parts, axis=-1)
    return sampling.first_above(parts, ends, share * ends[..., -1])


def merged(drawn: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the arrays of `draw` with each token once, the sum of its weights, and zeros at the end.

    The zeros compress to nearly nothing.
    """
    order = np.argsort(drawn["teacher_ids"], axis=-1, kind="stable")
    ids, weights = (np.take_along_axis(drawn[f"teacher_{name}"], order, axis=-1) for name in ("ids", "weights"))
    column = np.cumsum(np.diff(ids, axis=-1, prepend=ids[:, :1]) != 0, axis=-1)
    new_ids, new_weights = np.zeros_like(ids), np.zeros_like(weights)
    np.put_along_axis(new_ids, column, ids, axis=-1)
    np.add.at(new_weights, (np.arange(len(ids))[:, None], column), weights)
    return drawn | {"teacher_ids": new_ids, "teacher_weights": new_weights}
