"""The loss from hidden states and output matrices. Logits exist for only one chunk of tokens at a time.

`token_sum` is the function of this package. The module `sweep` goes through the tokens chunk by chunk, and the module
`arguments` checks the arguments.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from kd_jax.head_loss.arguments import Arrays, as_list, check_shapes, per_model
from kd_jax.head_loss.sweep import BATCH_AXES, Frozen, Sweep, is_counted, on_mesh, once, sizes_for, sweep_chunks

__all__ = ["token_sum"]


def token_sum(
    token_loss: Callable[..., Array],
    student_hidden: Float[Array, "..."],
    student_head: Float[Array, "..."],
    teacher_hidden: Arrays | None,
    teacher_head: Arrays | None,
    coefficient: Float[Array, "..."],
    *extras: Array,
    chunk: int | None = None,
    tied: tuple[bool, bool | Sequence[bool]] = (False, False),
    vocab_size: int | None = None,
    frozen_vocab_sizes: Sequence[int | None] | None = None,
    temperature: float = 1.0,
    soft_caps: tuple[float | None, float | Sequence[float | None] | None] = (None, None),
    normalised: bool = True,
    measured: int = 0,
    store_blocks: bool = False,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, ""], Float[Array, "..."]]:
    """Returns the sum of coefficient * token_loss(log_p, log_q), without an array of tokens x vocabulary.

    The result is exact for any token loss that is a pure function of two log-distributions. Only positions with a
    nonzero coefficient are computed. These positions are packed into chunks, and the remainder into shorter pieces.
    The coefficients are known, so the forward pass also computes the gradients of `student_hidden` and `student_head`,
    chunk by chunk. The backward pass only scales these gradients.

    Args:
      token_loss: (log_p, log_q, *extras) -> a value per token, or K values per token. log_p is None without a teacher,
        and a tuple if several frozen models are given. The log-probabilities are float64 if the hidden states are
        float64, and float32 otherwise.
      student_hidden: the student's hidden states after the final norm, [B, L, Ds].
      student_head: the student's output matrix, [Ds, V].
      teacher_hidden: the teacher's hidden states, [B, L, Dt], without gradient; None without a teacher; a list with the
        hidden states of each frozen model.
      teacher_head: the teacher's output matrix, [Dt, V]; None or a list, as `teacher_hidden`.
      coefficient: the factor of each token's value, [B, L], or of each token's K values, [B, L, K]. A value with
        coefficient 0 is not counted. A position whose coefficients are all 0 is never read, even if it holds NaN.
      *extras: arrays [B, L, ...], such as targets, of which `token_loss` gets a slice.
      chunk: the number of tokens per device whose logits are held at a time. None chooses a number from the shapes and
        the backend.
      tied: a pair, for the student and the teacher. True if the output matrix is given as the tied embedding [V, D].
        The embedding is then read without a transposed copy. With several frozen models, the second entry is a list.
      vocab_size: the number of token ids in use. Each head may have more columns. `token_loss` never sees these
        columns, and their gradient is 0.
      frozen_vocab_sizes: for each frozen model the number of ids in use, or None for `vocab_size`. `token_loss` then gets
        distributions over different numbers of ids.
      temperature: the divisor of both models' logits, applied after the soft caps.
      soft_caps: the caps of the student's and the teacher's logits: cap * tanh(logits / cap). With several frozen
        models, the second entry is None or a list.
      normalised: False to give `token_loss` logits in place of log-probabilities, after the soft caps and the division
        by the temperature.
      measured: the number of further values per token that `token_loss` returns after the K values, for a coefficient
        [B, L, K]. The further values are returned, but they are not a part of the sum.
      store_blocks: True for a loss of the logits themselves, such as a squared difference, without a softmax. On a CPU,
        each block of logits is then stored once more. Without the copy, XLA would copy a whole chunk for each block.
      mesh: the mesh from `kd_jax.sharding.make_mesh` that the arrays are on, or None. Each device packs its own rows.

    Returns:
      total: the sum, which can be differentiated once in `student_hidden` and `student_head`.
      values: the token loss at each position, 0 where the coefficient is 0; without gradient. Measured values are 0
        where all coefficients are 0.

    Raises:
      ValueError: shapes do not fit together, or a number is out of range; the message names the arguments. Or a
        gradient in float16 is requested.
      TypeError: the gradient is differentiated again.
    """
    devices = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    several = isinstance(teacher_hidden, list | tuple) or isinstance(teacher_head, list | tuple)
    frozen_hidden, frozen_head = as_list(teacher_hidden, several), as_list(teacher_head, several)
    all_tied = (tied[0], *per_model(tied[1], len(frozen_hidden)))
    caps = (soft_caps[0], *per_model(soft_caps[1], len(frozen_hidden)))
    token_arrays = {"coefficient": coefficient} | {f"extras[{i}]": array for i, array in enumerate(extras)}
    names = ["student", *(f"teacher[{i}]" if several else "teacher" for i in range(len(frozen_hidden)))]
    pairs = [(student_hidden, student_head), *zip(frozen_hidden, frozen_head, strict=True)]
    check_shapes(dict(zip(names, pairs, strict=True)), all_tied, token_arrays, devices)
    widths = [
        head.shape[0 if is_tied else 1] for (_, head), is_tied in zip(pairs, all_tied, strict=True) if head is not None
    ]
    sizes_of_frozen = list(frozen_vocab_sizes or [None] * len(frozen_hidden))
    shared = [w for w, own in zip(widths, [None, *sizes_of_frozen], strict=False) if own is None]
    for name, value, most in (("vocab_size", vocab_size, min(shared)), ("chunk", chunk, math.inf)):
        if value is not None and not 1 <= value <= most:
            limit = "" if most == math.inf else f" and at most {most}, the columns of the narrower output matrix"
            raise ValueError(f"{name}={value} must be at least 1{limit}; None chooses a value.")
    if measured and coefficient.ndim != 3:
        raise ValueError(f"measured={measured} needs a coefficient [B, L, K], not one of shape {coefficient.shape}.")
    vocab_size = vocab_size or min(shared)
    to_student, *to_frozen = (
        partial(_scores, vocab_size=own or vocab_size, temperature=temperature, soft_cap=cap, normalised=normalised)
        for cap, own in zip(caps, [None, *sizes_of_frozen], strict=True)
    )

    def block_loss(
        logits: Array, frozen_logits: tuple[Array, ...], coefficient: Array, *extras: Array
    ) -> tuple[Array, Array]:
        frozen = tuple(to_frozen[i](array) for i, array in enumerate(frozen_logits))
        value = token_loss(frozen if several else next(iter(frozen), None), to_student(logits), *extras)
        # Extras in float64 must not change the type of the sums.
        value, coefficient = value.astype(logits.dtype), coefficient.astype(logits.dtype)
        if not measured:
            value = jnp.where(coefficient != 0, value, 0)
            return jnp.sum(coefficient * value), value
        summed = jnp.where(coefficient != 0, value[..., :-measured], 0)
        further = jnp.where(is_counted(coefficient)[:, None], value[..., -measured:], 0)
        return jnp.sum(coefficient * summed), jnp.concatenate([summed, further], axis=-1)

    sizes = sizes_for(student_hidden.shape, max(widths), chunk, devices)
    sweep: Callable[..., Sweep] = partial(sweep_chunks, block_loss, all_tied, sizes, measured, store_blocks)
    if mesh is not None and devices > 1:
        sweep = partial(on_mesh, sweep, mesh)

    @jax.custom_vjp
    def run(hidden: Array, head: Array, frozen: Frozen, rest: tuple[Array, ...]) -> tuple[Array, Array]:
        return sweep(False, hidden, head, frozen, rest)[:2]

    def forward(
        hidden: Array, head: Array, frozen: Frozen, rest: tuple[Array, ...]
    ) -> tuple[tuple[Array, Array], list[Array]]:
        if jnp.float16 in (hidden.dtype, head.dtype):
            raise ValueError("token_sum has no gradient in float16, where small gradients become 0; use bfloat16.")
        total, values, *gradients = once(partial(sweep, True), hidden, head, frozen, rest)
        return (total, values), gradients

    def backward(gradients: list[Array], cotangents: tuple[Array, Array]) -> tuple[Array | None, ...]:
        return *((gradient * cotangents[0]).astype(gradient.dtype) for gradient in gradients), None, None

    run.defvjp(forward, backward)
    frozen = tuple((hidden, head) for hidden, head in pairs[1:] if hidden is not None and head is not None)
    return run(student_hidden, student_head, jax.lax.stop_gradient(frozen), (coefficient, *extras))


def _scores(
    logits: Array, *, vocab_size: int, temperature: float, soft_cap: float | None, normalised: bool
) -> Array:  # fmt: skip
    """Returns the log-probabilities or the logits of the ids in use."""
    logits = logits[..., :vocab_size]  # a slice of the head would copy the head
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    if temperature != 1:
        logits = logits / temperature
    return jax.nn.log_softmax(logits, axis=-1) if normalised else logits
