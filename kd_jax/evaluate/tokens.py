"""Distances of a student's next-token distributions from its teacher's and from the text, at each token."""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from kd_jax.objectives import cross_entropy
from kd_jax.sharding import fetch_whole, put_batch
from kd_jax.teachers import Teacher, as_teacher, compare, teacher_arrays
from kd_jax.teachers.online import HiddenModel

ALONE = ("cross_entropy", "entropy", "confidence", "accuracy")
NEEDED = ("tokens", "targets", "mask", "loss_mask")
BINS = 15  # bins of confidence for the calibration error


@functools.partial(jax.jit, static_argnames=("student", "teacher", "vocab_size", "chunk", "mesh"))
def token_values(
    student: HiddenModel, params: PyTree, teacher: Teacher | HiddenModel | None, teacher_params: PyTree,
    batch: dict[str, Array], *, vocab_size: int, chunk: int | None = None, mesh: jax.sharding.Mesh | None = None,
) -> dict[str, Array]:  # fmt: skip
    """Returns the measures at each counted token, at temperature 1, and 0 at the other tokens.

    Args:
      student: a model with `hidden` and `stored_head`.
      params: the student's parameters.
      teacher: a teacher, a model, or None. With None, only measures that need no teacher are returned.
      teacher_params: the teacher's parameters.
      batch: the batch, as in `make_train_step`.
      vocab_size: the number of token ids in use.
      chunk: the argument of `token_sum`.
      mesh: the argument of `token_sum`.

    Returns:
      name -> [B, L], in nats or as shares. Always: cross_entropy (-log q of the text's token), entropy of q, confidence
        (q of the student's likeliest token), and accuracy (1 if that token is the text's token). With a teacher:
        forward_kl (KL(p || q)), reverse_kl (KL(q || p)), total_variation, and top1_agreement (1 if both models have the
        same likeliest token). With a cached teacher: the names in `Teacher.measures`. In a cache of the k likeliest
        tokens, the first three measures are over k + 1 outcomes, and their names begin with coarse_. In a cache of
        samples, the only measure is sampled_forward_kl, whose expected mean is the mean of KL(p || q).
    """
    teacher = as_teacher(teacher)

    def values(teacher_side: PyTree, student_side: Array, log_q: Array, target: Array) -> Array:
        best, plogp = jnp.argmax(log_q, axis=-1), jnp.where(log_q != -jnp.inf, jnp.exp(log_q) * log_q, 0)
        columns = [cross_entropy(log_q, target), -plogp.sum(axis=-1), jnp.exp(log_q.max(axis=-1)), best == target]
        columns += teacher.measure(teacher_side, student_side, log_q)
        return jnp.stack([column.astype(log_q.dtype) for column in columns], axis=-1)

    names = (*ALONE, *teacher.measures)
    weight = jnp.repeat(batch["loss_mask"][..., None].astype(jnp.float32), len(names), axis=-1)
    _, measured = compare(
        values, student, params, teacher, teacher_params, batch, weight, batch["targets"], chunk=chunk,
        vocab_size=vocab_size, mesh=mesh,
    )  # fmt: skip
    return {name: measured[..., i] for i, name in enumerate(names)}


def collect(
    student: HiddenModel, params: PyTree, teacher: Teacher | HiddenModel | None, teacher_params: PyTree,
    batches: Iterable[dict[str, np.ndarray]], mesh: jax.sharding.Mesh, *, vocab_size: int, chunk: int | None = None,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Returns `token_values` of all counted tokens of the batches. Every process gets the values of all processes.

    Args:
      student, params, teacher, teacher_params: the arguments of `token_values`.
      batches: NumPy batches, with this process's rows of each batch.
      mesh: the mesh on which the batches are placed.
      vocab_size, chunk: the arguments of `token_values`.

    Returns:
      name -> [N], and "place": the index of a token among the counted tokens of a row, from 0.
    """
    parts = []
    for batch in batches:
        placed = put_batch(mesh, {name: batch[name] for name in NEEDED} | teacher_arrays(batch))
        values = token_values(
            student, params, teacher, teacher_params, placed, vocab_size=vocab_size, chunk=chunk, mesh=mesh
        )
        counted = fetch_whole(placed["loss_mask"])
        values = {name: fetch_whole(values[name])[counted] for name in (*ALONE, *as_teacher(teacher).measures)}
        parts.append(values | {"place": (np.cumsum(counted, axis=1) - 1)[counted]})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def summary(values: dict[str, np.ndarray]) -> dict[str, float]:
    """Returns the means of the values of `collect`, the perplexity, and the expected calibration error.

    The calibration error uses 15 bins of confidence.

    References:
      Guo et al., "On Calibration of Modern Neural Networks", https://arxiv.org/abs/1706.04599, 2017, eq. 5.
    """
    means = {name: float(value.mean(dtype=np.float64)) for name, value in values.items() if name != "place"}
    bins = np.minimum((values["confidence"] * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, weights=values["confidence"] - values["accuracy"], minlength=BINS)
    calibration = float(np.abs(gaps).sum() / len(bins))
    return means | {"perplexity": float(np.exp(means["cross_entropy"])), "calibration_error": calibration}


def evaluate(*arguments: Any, vocab_size: int, chunk: int | None = None) -> dict[str, float]:
    """Returns `summary` of the values of `collect` for the same arguments."""
    return summary(collect(*arguments, vocab_size=vocab_size, chunk=chunk))
