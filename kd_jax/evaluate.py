"""How near a student is to its teacher and to the data, on held-out rows."""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from kd_jax import models
from kd_jax.compare import compare
from kd_jax.divergences import forward_kl, reverse_kl
from kd_jax.metrics import averages
from kd_jax.objectives import cross_entropy
from kd_jax.sharding import put_batch

WITH_TEACHER = ("forward_kl", "reverse_kl", "top1_agreement")


@functools.partial(jax.jit, static_argnames=("student", "teacher", "vocab_size", "chunk", "mesh"))
def token_sums(
    student: Any, params: Any, teacher: Any, teacher_params: Any, batch: dict[str, Array], *, vocab_size: int,
    chunk: int | None = None, mesh: Any = None,
) -> dict[str, tuple[Array, Array]]:  # fmt: skip
    """Sums over a batch's counted tokens, with their number, at temperature 1.

    Args:
      student: with `hidden` and `head`.
      params: the student's.
      teacher: the same, or None: then only what needs none is measured.
      teacher_params: the teacher's.
      batch: as in `make_train_step`.
      vocab_size: ids that have a meaning.
      chunk: as in `token_sum`.
      mesh: as in `token_sum`.

    Returns:
      cross_entropy (of the data under the student), and with a teacher forward_kl, KL(p || q), reverse_kl, KL(q || p),
      all in nats, and top1_agreement, the share of tokens at which both models' likeliest token is the same.
    """

    def values(log_p: Array | None, log_q: Array, target: Array) -> Array:
        columns = [cross_entropy(log_q, target)]
        if log_p is not None:
            same = jnp.argmax(log_p, axis=-1) == jnp.argmax(log_q, axis=-1)
            columns += [forward_kl(log_p, log_q), reverse_kl(log_p, log_q), same.astype(log_q.dtype)]
        return jnp.stack(columns, axis=-1)

    names = ("cross_entropy", *(() if teacher is None else WITH_TEACHER))
    weight = jnp.repeat(batch["loss_mask"][..., None].astype(jnp.float32), len(names), axis=-1)
    _, per_token = compare(
        values, student, params, teacher, teacher_params, batch, weight, batch["targets"], chunk=chunk,
        vocab_size=vocab_size, mesh=mesh,
    )  # fmt: skip
    sums, count = per_token.sum(axis=(0, 1)), weight[..., 0].sum()
    return {name: (sums[i], count) for i, name in enumerate(names)}


def evaluate(
    student: Any, params: Any, teacher: Any, teacher_params: Any, batches: Iterable[dict[str, np.ndarray]], mesh: Any,
    *, vocab_size: int, chunk: int | None = None,
) -> dict[str, float]:  # fmt: skip
    """The averages of `token_sums` over all counted tokens of the batches, and the perplexity.

    Args:
      batches: numpy batches, this process's rows of each.
      mesh: where they go.
      (others): as in `token_sums`.

    Returns:
      name -> value; nats a token, but for top1_agreement and perplexity.
    """
    totals: Any = None
    for batch in batches:
        sums = token_sums(
            student, params, teacher, teacher_params, put_batch(mesh, batch), vocab_size=vocab_size, chunk=chunk,
            mesh=mesh,
        )  # fmt: skip
        totals = sums if totals is None else jax.tree.map(jnp.add, totals, sums)
    values = averages(totals)
    return values | {"perplexity": float(np.exp(values["cross_entropy"]))}


def sample(
    model: Any, params: Any, tokenizer: Any, prompts: list[list[int]], *, max_new_tokens: int, seed: int
) -> list[str]:
    """One response per prompt, drawn at temperature 1, as text.

    Args:
      model: a `models.Model`.
      params: its parameters.
      tokenizer: decodes, and names the end and padding ids.
      prompts: token ids.
      max_new_tokens: where a response that has not ended is cut.
      seed: of the draw.
    """
    tokens, mask = models.left_pad(prompts, tokenizer.pad_id, model.config.max_positions - max_new_tokens)
    drawn, drawn_mask, _ = models.generate(
        model, params, jnp.array(tokens), jnp.array(mask), max_new_tokens=max_new_tokens, key=jax.random.key(seed),
        vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id,
    )  # fmt: skip
    return [
        tokenizer.decode([int(t) for t in row[keep]])
        for row, keep in zip(np.array(drawn), np.array(drawn_mask), strict=True)
    ]
