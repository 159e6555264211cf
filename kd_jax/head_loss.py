"""The loss from hidden states and the two output matrices: logits exist for one chunk at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Positions of all rows together in one chunk. A CPU's caches like few; an accelerator's matrix units like many.
_CHUNK_TOKENS = {"cpu": 512}
_DEFAULT_CHUNK_TOKENS = 2048


def token_sum(
    token_loss: Callable[..., Array],
    student_hidden: Float[Array, "B L Ds"],
    student_head: Float[Array, "Ds V"],
    teacher_hidden: Float[Array, "B L Dt"] | None,
    teacher_head: Float[Array, "Dt V"] | None,
    coefficient: Float[Array, "B L *K"],
    *extras: Array,
    chunk: int | None = None,
) -> tuple[Float[Array, ""], Float[Array, "B L *K"]]:
    """sum of coefficient * token_loss(log_p, log_q), without ever holding tokens x vocabulary.

    Exact for any token loss that is a pure function of two log-distributions. The gradients of `student_hidden` and
    `student_head` are made chunk by chunk in the forward pass, since the coefficients are known beforehand: nothing
    is computed twice, and the backward pass only scales them.

    Args:
      token_loss: (log_p, log_q, *extras) -> a value per token, or K values per token. log_p is None without a
        teacher. Log-probabilities are float32, or float64 where the hidden states are.
      student_hidden: after the final norm.
      student_head: the output matrix.
      teacher_hidden: of the teacher; None where there is no teacher. No gradient flows to it.
      teacher_head: of the teacher.
      coefficient: of each token's value. A position whose coefficients are all 0 is never read, NaN or not.
      *extras: arrays [B, L, ...] that `token_loss` needs a slice of, such as targets.
      chunk: positions of the sequence whose logits are held at a time, all rows of the batch together; None
        chooses it from the shapes and the backend.

    Returns:
      total: the sum, differentiable once in `student_hidden` and `student_head`.
      values: token_loss at each position, 0 where nothing is counted; without gradient.
    """
    batch, length = student_hidden.shape[:2]
    if chunk is None:
        chunk = max(1, _CHUNK_TOKENS.get(jax.default_backend(), _DEFAULT_CHUNK_TOKENS) // batch)
    # Equal chunks: the padding of the last one is then at most a position a chunk.
    count = -(-length // min(chunk, length))
    chunk = -(-length // count)

    def split(array: Array) -> Array:
        # Along the sequence, so that a batch sharded over devices stays where it is.
        padding = [(0, 0), (0, count * chunk - length)] + [(0, 0)] * (array.ndim - 2)
        return jnp.moveaxis(jnp.pad(array, padding).reshape(batch, count, chunk, *array.shape[2:]), 1, 0)

    def sweep(
        with_gradient: bool, hidden: Array, head: Array, teacher: tuple[Array, Array] | None, rest: tuple[Array, ...]
    ) -> Any:
        teacher_head = None if teacher is None else teacher[1]

        def chunk_sum(hidden: Array, head: Array, teacher_hidden: Array | None, coefficient: Array, *extras: Array):
            live = coefficient != 0 if coefficient.ndim == 2 else jnp.any(coefficient != 0, axis=-1)
            # Zeroed hidden rows, not zeroed losses: NaN * 0 would poison the head's gradient.
            log_q = _log_probs(jnp.where(live[..., None], hidden, 0), head)
            log_p = None
            if teacher_hidden is not None and teacher_head is not None:
                log_p = _log_probs(jnp.where(live[..., None], teacher_hidden, 0), teacher_head)
            value = token_loss(log_p, log_q, *extras)
            value = jnp.where(live if value.ndim == 2 else live[..., None], value, 0)
            return jnp.sum(coefficient * value), value

        def body(carry: Any, xs: Any) -> Any:
            total, d_head = carry
            if not with_gradient:
                part, value = chunk_sum(xs[0], head, *xs[1:])
                return (total + part, d_head), (value, None)
            gradient = jax.value_and_grad(chunk_sum, argnums=(0, 1), has_aux=True)
            (part, value), (d_hidden, d_part) = gradient(xs[0], head, *xs[1:])
            return (total + part, d_head + d_part), (value, d_hidden)

        teacher_hidden = None if teacher is None else split(teacher[0])
        xs = (split(hidden), teacher_hidden, *(split(array) for array in rest))
        dtype = jnp.promote_types(head.dtype, jnp.float32)
        start = jnp.zeros((), dtype), jnp.zeros(head.shape, dtype) if with_gradient else None
        (total, d_head), (values, d_hidden) = jax.lax.scan(body, start, xs)
        return total, _join(values, length), d_head, None if d_hidden is None else _join(d_hidden, length)

    @jax.custom_vjp
    def run(hidden: Array, head: Array, teacher: Any, rest: tuple[Array, ...]) -> tuple[Array, Array]:
        return sweep(False, hidden, head, teacher, rest)[:2]

    def forward(hidden: Array, head: Array, teacher: Any, rest: tuple[Array, ...]) -> Any:
        total, values, d_head, d_hidden = sweep(True, hidden, head, teacher, rest)
        return (total, values), (d_hidden, d_head.astype(head.dtype))

    def backward(residuals: Any, cotangents: Any) -> Any:
        d_hidden, d_head = residuals
        scale = cotangents[0]
        return (d_hidden * scale).astype(d_hidden.dtype), (d_head * scale).astype(d_head.dtype), None, None

    run.defvjp(forward, backward)
    teacher = None if teacher_hidden is None else (teacher_hidden, teacher_head)
    return run(student_hidden, student_head, jax.lax.stop_gradient(teacher), (coefficient, *extras))


def _log_probs(hidden: Array, head: Array) -> Array:
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    return jax.nn.log_softmax(jnp.matmul(hidden, head, preferred_element_type=dtype), axis=-1)


def _join(chunks: Array, length: int) -> Array:
    joined = jnp.moveaxis(chunks, 0, 1)
    return joined.reshape(joined.shape[0], -1, *joined.shape[3:])[:, :length]
