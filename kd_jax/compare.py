"""Runs two models on the same tokens, and computes a loss of their next-token distributions without logits."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Array

from kd_jax.head_loss import token_sum
from kd_jax.sharding import for_lookup
from kd_jax.teacher_cache import CachedTeacher


def compare(
    token_loss: Callable[..., Array], student: Any, params: Any, teacher: Any, teacher_params: Any,
    batch: dict[str, Array], coefficient: Array, *extras: Array, vocab_size: int, temperature: float = 1.0,
    chunk: int | None = None, mesh: Any = None,
) -> tuple[Array, Array]:  # fmt: skip
    """Returns `head_loss.token_sum` of both models on a batch.

    Args:
      token_loss: (log_p, seen, log_q, *extras) -> a value per token or K values per token, as in `token_sum`. `log_p`
        are the teacher's log-probabilities, None without a teacher. `seen` are the student's log-probabilities over the
        same outcomes as `log_p`: either `log_q` or the result of `CachedTeacher.see`.
      student: a model with `hidden(params, tokens, mask)` and `stored_head(params)`.
      params: the student's parameters, which get gradients.
      teacher: a model with the same two methods, a `CachedTeacher`, or None.
      teacher_params: the teacher's parameters.
      batch: tokens and mask [B, L], and the arrays of a cached teacher.
      coefficient, extras: the coefficients and further arrays, as in `token_sum`.
      vocab_size, temperature, chunk, mesh: the options of `token_sum`.

    Returns:
      The sum, and the loss at each position, as in `token_sum`.
    """
    inputs = batch["tokens"], batch["mask"]
    params, teacher_hidden, teacher_head, teacher_tied = for_lookup(mesh, params), None, None, False
    kept: tuple[Array, ...] = ()
    if isinstance(teacher, CachedTeacher):
        kept, teacher_hidden = teacher.kept(batch), teacher.hidden(batch)
        teacher_head, teacher_tied = teacher.stored_head(teacher_params)
    elif teacher is not None:
        teacher_params = for_lookup(mesh, teacher_params)
        teacher_hidden = teacher.hidden(teacher_params, *inputs)
        teacher_head, teacher_tied = teacher.stored_head(teacher_params)
    head, tied = student.stored_head(params)

    def loss(log_p: Array | None, log_q: Array, *rest: Array) -> Array:
        its, rest = rest[: len(kept)], rest[len(kept) :]
        log_p, seen = teacher.see(log_p, log_q, *its) if kept else (log_p, log_q)
        return token_loss(log_p, seen, log_q, *rest)

    return token_sum(
        loss, student.hidden(params, *inputs), head, teacher_hidden, teacher_head, coefficient, *kept, *extras,
        chunk=chunk, tied=(tied, teacher_tied), vocab_size=vocab_size, temperature=temperature, mesh=mesh,
    )  # fmt: skip
