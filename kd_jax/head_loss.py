"""The loss from hidden states and the two output matrices. Logits exist for only one chunk of tokens at a time."""

import math
from collections.abc import Callable
from functools import partial
from typing import NoReturn

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PyTree

# The mesh axes over which the rows of a batch are divided, as in `kd_jax.sharding`.
BATCH_AXES = ("data", "fsdp")
BLOCK_BYTES = 2**21  # the size of a block's logits on a CPU, which stay in a core's cache while the loss reads them

# The total, the values, and the gradients of the hidden states and of the head; None without gradients.
Sweep = tuple[Array, Array, Array | None, Array | None]


def token_sum(
    token_loss: Callable[..., Array],
    student_hidden: Float[Array, "..."],
    student_head: Float[Array, "..."],
    teacher_hidden: Float[Array, "..."] | None,
    teacher_head: Float[Array, "..."] | None,
    coefficient: Float[Array, "..."],
    *extras: Array,
    chunk: int | None = None,
    tied: tuple[bool, bool] = (False, False),
    vocab_size: int | None = None,
    temperature: float = 1.0,
    soft_caps: tuple[float | None, float | None] = (None, None),
    mesh: Mesh | None = None,
) -> tuple[Float[Array, ""], Float[Array, "..."]]:
    """Returns the sum of coefficient * token_loss(log_p, log_q), without an array of tokens x vocabulary.

    The result is exact for any token loss that is a pure function of two log-distributions. Only positions with a
    nonzero coefficient are computed. These positions are packed into chunks, and the remainder into shorter pieces.
    The coefficients are known, so the forward pass also computes the gradients of `student_hidden` and `student_head`,
    chunk by chunk. The backward pass only scales these gradients.

    Args:
      token_loss: (log_p, log_q, *extras) -> a value per token, or K values per token. log_p is None without a teacher.
        The log-probabilities are float64 if the hidden states are float64, and float32 otherwise.
      student_hidden: the student's hidden states after the final norm, [B, L, Ds].
      student_head: the student's output matrix, [Ds, V].
      teacher_hidden: the teacher's hidden states, [B, L, Dt], without gradient; None without a teacher.
      teacher_head: the teacher's output matrix, [Dt, V]; None without a teacher.
      coefficient: the factor of each token's value, [B, L], or of each token's K values, [B, L, K]. A value with
        coefficient 0 is not counted. A position whose coefficients are all 0 is never read, even if it holds NaN.
      *extras: arrays [B, L, ...], such as targets, of which `token_loss` gets a slice.
      chunk: the number of tokens per device whose logits are held at a time. None chooses a number from the shapes and
        the backend.
      tied: a pair, for the student and the teacher. True if the output matrix is given as the tied embedding [V, D].
        The embedding is then read without a transposed copy.
      vocab_size: the number of token ids in use. Each head may have more columns. `token_loss` never sees these
        columns, and their gradient is 0.
      temperature: the divisor of both models' logits, applied after the soft caps.
      soft_caps: the caps of the student's and the teacher's logits: cap * tanh(logits / cap).
      mesh: the mesh from `kd_jax.sharding.make_mesh` that the arrays are on, or None. Each device packs its own rows.

    Returns:
      total: the sum, which can be differentiated once in `student_hidden` and `student_head`.
      values: the token loss at each position, 0 where the coefficient is 0; without gradient.

    Raises:
      ValueError: shapes do not fit together, or a number is out of range; the message names the arguments. Or a
        gradient in float16 is requested.
      TypeError: the gradient is differentiated again.
    """
    devices = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    named = {"student": (student_hidden, student_head), "teacher": (teacher_hidden, teacher_head)}
    token_arrays = {"coefficient": coefficient} | {f"extras[{i}]": array for i, array in enumerate(extras)}
    _check_shapes(named, tied, token_arrays, devices)
    widths = [
        head.shape[0 if is_tied else 1]
        for head, is_tied in zip((student_head, teacher_head), tied, strict=True)
        if head is not None
    ]
    for name, value, most in (("vocab_size", vocab_size, min(widths)), ("chunk", chunk, math.inf)):
        if value is not None and not 1 <= value <= most:
            limit = "" if most == math.inf else f" and at most {most}, the columns of the narrower output matrix"
            raise ValueError(f"{name}={value} must be at least 1{limit}; None chooses a value.")
    vocab_size = vocab_size or min(widths)
    to_student, to_teacher = (
        partial(_log_probs, vocab_size=vocab_size, temperature=temperature, soft_cap=cap) for cap in soft_caps
    )

    def block_loss(
        logits: Array, teacher_logits: Array | None, coefficient: Array, *extras: Array
    ) -> tuple[Array, Array]:
        log_p = None if teacher_logits is None else to_teacher(teacher_logits)
        value = jnp.where(coefficient != 0, token_loss(log_p, to_student(logits), *extras), 0)
        return jnp.sum(coefficient * value), value

    sizes = _sizes(student_hidden.shape, max(widths), chunk, devices)
    sweep: Callable[..., Sweep] = partial(_sweep, block_loss, tied, sizes)
    if mesh is not None and devices > 1:
        sweep = partial(_on_mesh, sweep, mesh)

    @jax.custom_vjp
    def run(
        hidden: Array, head: Array, teacher: tuple[Array, Array] | None, rest: tuple[Array, ...]
    ) -> tuple[Array, Array]:
        return sweep(False, hidden, head, teacher, rest)[:2]

    def forward(
        hidden: Array, head: Array, teacher: tuple[Array, Array] | None, rest: tuple[Array, ...]
    ) -> tuple[tuple[Array, Array], list[Array]]:
        if jnp.float16 in (hidden.dtype, head.dtype):
            raise ValueError("token_sum has no gradient in float16, where small gradients become 0; use bfloat16.")
        total, values, *gradients = _once(partial(sweep, True), hidden, head, teacher, rest)
        return (total, values), gradients

    def backward(gradients: list[Array], cotangents: tuple[Array, Array]) -> tuple[Array | None, ...]:
        return *((gradient * cotangents[0]).astype(gradient.dtype) for gradient in gradients), None, None

    run.defvjp(forward, backward)
    teacher = None
    if teacher_hidden is not None and teacher_head is not None:
        teacher = jax.lax.stop_gradient((teacher_hidden, teacher_head))
    return run(student_hidden, student_head, teacher, (coefficient, *extras))


def _check_shapes(
    named: dict[str, tuple[Array | None, Array | None]], tied: tuple[bool, bool], token_arrays: dict[str, Array],
    devices: int,
) -> None:  # fmt: skip
    """Checks the shapes of both models' hidden states and heads, and of the arrays with a value per token."""
    arrays = {f"{model}_{part}": pair[i] for model, pair in named.items() for i, part in enumerate(("hidden", "head"))}
    shapes = {name: None if array is None else array.shape for name, array in (arrays | token_arrays).items()}
    shapes_in_words = ", ".join(f"{name} {shape}" for name, shape in shapes.items() if shape is not None)
    student, problem = shapes["student_hidden"] or (), ""
    if len(student) != 3 or 0 in student:
        problem = "student_hidden must be [B, L, D] with no side of 0"
    elif student[0] % devices:
        problem = f"the {student[0]} rows must divide over the {devices} devices of the mesh's axes {BATCH_AXES}"
    elif (shapes["teacher_hidden"] is None) != (shapes["teacher_head"] is None):
        problem = "a teacher needs both teacher_hidden and teacher_head"
    for (model, (hidden, head)), is_tied in zip(named.items(), tied, strict=True):
        if problem or hidden is None or head is None:
            continue
        if hidden.ndim != 3 or hidden.shape[:2] != student[:2]:
            problem = f"{model}_hidden must have student_hidden's B and L"
        elif head.ndim != 2 or 0 in head.shape or head.shape[1 if is_tied else 0] != hidden.shape[-1]:
            axes = "V, D" if is_tied else "D, V"
            problem = f"{model}_head must be [{axes}] with the D of {model}_hidden, because tied={tied}"
    for name, array in token_arrays.items():
        if not problem and (
            array.shape[:2] != student[:2] or 0 in array.shape or (name == "coefficient" and array.ndim > 3)
        ):
            problem = f"{name} must begin with student_hidden's B and L"
    if problem:
        raise ValueError(f"token_sum: {problem}; got {shapes_in_words}.")


def _sizes(shape: tuple[int, ...], width: int, chunk: int | None, devices: int) -> tuple[int, int, int | None]:
    """Returns the numbers of tokens in a chunk, in a piece, and in a block.

    Pieces hold the tokens that do not fill a chunk. Chunks and pieces consist of blocks. On a CPU the logits of a block
    stay in the cache, and a chunk is just long enough for efficient matrix products. Longer chunks need fewer additions
    to the head's gradient, but with few tokens these additions cost little. On an accelerator chunks are long, and each
    chunk is one block.
    """
    tokens = max(1, shape[0] * shape[1] // devices)
    cpu = jax.default_backend() == "cpu"
    chunk = min(tokens, chunk or (min(max(tokens // 8, 256), 512) if cpu else 2048))
    block = max(1, min(chunk, BLOCK_BYTES // (4 * width))) if cpu else None
    round_up = lambda size: -(-size // (block or 1)) * (block or 1)
    return round_up(chunk), round_up(-(-chunk // 4)), block


def _sweep(
    block_loss: Callable[..., tuple[Array, Array]], tied: tuple[bool, bool], sizes: tuple[int, int, int | None],
    with_gradient: bool, hidden: Array, head: Array, teacher: tuple[Array, Array] | None, rest: tuple[Array, ...],
    *, largest: Callable[[Array], Array] = lambda count: count,
) -> Sweep:  # fmt: skip
    """Returns the total, the values, and the gradients of the hidden states and the head, computed chunk by chunk.

    `largest` returns the largest of the devices' numbers of tokens.
    """
    chunk, piece, block = sizes
    batch, length = hidden.shape[:2]
    tokens = batch * length
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    rest = tuple(array.reshape(tokens, *array.shape[2:]) for array in rest)
    is_counted = _is_counted(rest[0])
    order = jnp.argsort(~is_counted, stable=True)
    # `jnp.take` reads 0 at an index beyond the end, and `.at[].set` writes nothing there.
    order = jnp.pad(order, (0, chunk + piece), constant_values=tokens)

    def body(size: int, first: Array | int, i: Array, carry: Sweep) -> Sweep:
        total, values, d_hidden, d_head = carry
        index = jax.lax.dynamic_slice_in_dim(order, first + i * size, size)

        take = partial(jnp.take, indices=index, axis=0, mode="fill", fill_value=0)
        # The hidden states are set to 0, not the losses: NaN * 0 would make the head's gradient NaN.
        take_counted = lambda hidden: jnp.where(take(is_counted)[:, None], take(hidden.reshape(tokens, -1)), 0)
        rows = take_counted(hidden)
        logits = jnp.matmul(rows, _transpose_if(tied[0], head), preferred_element_type=dtype)
        teacher_logits = None
        if teacher is not None:
            teacher_logits = jnp.matmul(
                take_counted(teacher[0]), _transpose_if(tied[1], teacher[1]), preferred_element_type=dtype
            )
        part, value, d_logits = _chunk(block_loss, block, with_gradient, logits, teacher_logits, *map(take, rest))
        values = values.at[index].set(value, mode="drop", unique_indices=True)
        if d_hidden is not None and d_head is not None:
            d_logits = d_logits.astype(head.dtype)
            head_columns = _transpose_if(tied[0], head)
            d_rows = jnp.matmul(d_logits, head_columns.T, preferred_element_type=dtype).astype(hidden.dtype)
            d_hidden = d_hidden.at[index].set(d_rows, mode="drop", unique_indices=True)
            # XLA's CPU backend multiplies a transposed view 25% more slowly than a matrix that is stored transposed.
            columns = jax.lax.optimization_barrier(rows.T)
            d_head = d_head + jnp.matmul(columns, d_logits, preferred_element_type=dtype)
        return total + part, values, d_hidden, d_head

    start = (
        jnp.zeros((), dtype),
        jnp.zeros(rest[0].shape, dtype),
        jnp.zeros((tokens, hidden.shape[-1]), hidden.dtype) if with_gradient else None,
        jnp.zeros(_transpose_if(tied[0], head).shape, dtype) if with_gradient else None,
    )
    count, done, carry = largest(jnp.sum(is_counted)), 0, start
    if piece < chunk:
        # If the pieces for the remainder would be as long as a chunk, the remainder is computed as one chunk.
        done = (count + piece - 1) // chunk * chunk
        carry = jax.lax.fori_loop(0, done // chunk, partial(body, chunk, 0), carry)
    carry = jax.lax.fori_loop(0, -(-(count - done) // piece), partial(body, piece, done), carry)
    total, values, d_hidden, d_head = carry
    values = values.reshape(batch, length, *values.shape[1:])
    if d_hidden is None or d_head is None:
        return total, values, None, None
    return total, values, d_hidden.reshape(hidden.shape), _transpose_if(tied[0], d_head).astype(head.dtype)


def _chunk(
    block_loss: Callable[..., tuple[Array, Array]], block: int | None, with_gradient: bool, logits: Array,
    teacher_logits: Array | None, coefficient: Array, *extras: Array,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Returns the total, the values and the gradient of the logits, block by block.

    The gradient of each block overwrites the block's logits.
    """

    def of_block(logits: Array, *arrays: Array | None) -> tuple[Array, Array, Array]:
        if not with_gradient:
            return *block_loss(logits, *arrays), logits
        (part, value), gradient = jax.value_and_grad(block_loss, has_aux=True)(logits, *arrays)
        return part, value, gradient

    if block is None or block == logits.shape[0]:
        return of_block(logits, teacher_logits, coefficient, *extras)

    def body(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        total, values, logits = carry
        arrays = (logits, teacher_logits, coefficient, *extras)
        rows = jax.tree.map(lambda array: jax.lax.dynamic_slice_in_dim(array, i * block, block), arrays)
        part, value, gradient = of_block(*rows)
        if with_gradient:
            logits = jax.lax.dynamic_update_slice_in_dim(logits, gradient, i * block, axis=0)
        return total + part, jax.lax.dynamic_update_slice_in_dim(values, value, i * block, axis=0), logits

    start = jnp.zeros((), logits.dtype), jnp.zeros(coefficient.shape, logits.dtype), logits
    return jax.lax.fori_loop(0, logits.shape[0] // block, body, start)


def _on_mesh(sweep: Callable[..., Sweep], mesh: Mesh, with_gradient: bool, *arrays: PyTree) -> Sweep:
    """Runs the sweep on every device, over the device's own rows.

    The head is gathered before the loop, and the head's gradient is reduced after the loop.
    """

    def local(hidden: Array, head: Array, teacher: tuple[Array, Array] | None, rest: tuple[Array, ...]) -> Sweep:
        # The loop may contain collective operations over `tensor`, which need all devices. So every device runs as many
        # chunks as the device with the most tokens.
        largest = partial(jax.lax.pmax, axis_name=BATCH_AXES)
        total, values, d_hidden, d_head = sweep(with_gradient, hidden, head, teacher, rest, largest=largest)
        total = jax.lax.psum(total, BATCH_AXES)
        return total, values, d_hidden, None if d_head is None else jax.lax.psum(d_head, BATCH_AXES)

    by_row, replicated = P(BATCH_AXES), P()
    models = jax.tree.map(lambda array: by_row if array.ndim == 3 else replicated, arrays[:3])
    return jax.shard_map(
        local, mesh=mesh, axis_names=set(BATCH_AXES), check_vma=False, in_specs=(*models, by_row),
        out_specs=(replicated, by_row, *((by_row, replicated) if with_gradient else (None, None))),
    )(*arrays)  # fmt: skip


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _once(sweep: Callable[..., Sweep], *arrays: PyTree) -> Sweep:
    """Runs the sweep. A derivative of the result raises the error of `_twice`."""
    return sweep(*arrays)


@_once.defjvp
def _twice(sweep: Callable[..., Sweep], primals: PyTree, tangents: PyTree) -> NoReturn:
    """Raises an error, because JAX calls this function only for a second derivative."""
    raise TypeError(
        "token_sum is differentiable once, because the forward pass computes the gradient. For a second derivative, "
        "write the loss on full logits: jnp.sum(coefficient * token_loss(log_p, log_q))."
    )


def _is_counted(coefficient: Array) -> Array:
    """Returns an array [N], True where a token has a nonzero coefficient. The coefficients are [N] or [N, K]."""
    return coefficient != 0 if coefficient.ndim == 1 else jnp.any(coefficient != 0, axis=-1)


def _transpose_if(is_tied: bool, head: Array) -> Array:
    """Returns a head as [D, V], or a matrix [D, V] in the shape of the head."""
    return head.T if is_tied else head


def _log_probs(logits: Array, *, vocab_size: int, temperature: float, soft_cap: float | None) -> Array:
    logits = logits[..., :vocab_size]  # a slice of the head would copy the head
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    if temperature != 1:
        logits = logits / temperature
    return jax.nn.log_softmax(logits, axis=-1)
