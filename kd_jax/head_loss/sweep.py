"""Goes through the counted tokens chunk by chunk: logits, losses, and the gradients of the logits, states and head."""

from collections.abc import Callable
from functools import partial
from typing import NoReturn

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree

# The mesh axes over which the rows of a batch are divided, as in `kd_jax.sharding`.
BATCH_AXES = ("data", "fsdp")
BLOCK_BYTES = 2**21  # the size of a block's logits on a CPU, which stay in a core's cache while the loss reads them

# The total, the values, and the gradients of the hidden states and of the head; None without gradients.
Sweep = tuple[Array, Array, Array | None, Array | None]
Frozen = tuple[tuple[Array, Array], ...]  # the hidden states and the head of each frozen model


def sizes_for(shape: tuple[int, ...], width: int, chunk: int | None, devices: int) -> tuple[int, int, int | None]:
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


def sweep_chunks(
    block_loss: Callable[..., tuple[Array, Array]], tied: tuple[bool, ...], sizes: tuple[int, int, int | None],
    measured: int, store_blocks: bool, with_gradient: bool, hidden: Array, head: Array, frozen: Frozen, rest: tuple[Array, ...],
    *, largest: Callable[[Array], Array] = lambda count: count,
) -> Sweep:  # fmt: skip
    """Returns the total, the values, and the gradients of the hidden states and the head, computed chunk by chunk.

    `largest` returns the largest of the devices' numbers of tokens. `store_blocks` is described in `token_sum`.
    """
    chunk, piece, block = sizes
    batch, length = hidden.shape[:2]
    tokens = batch * length
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    rest = tuple(array.reshape(tokens, *array.shape[2:]) for array in rest)
    counted = is_counted(rest[0])
    order = jnp.argsort(~counted, stable=True)
    # At an index beyond the end, `.at[].set` writes nothing.
    order = jnp.pad(order, (0, chunk + piece), constant_values=tokens)

    def body(size: int, first: Array | int, i: Array, carry: Sweep) -> Sweep:
        total, values, d_hidden, d_head = carry
        index = jax.lax.dynamic_slice_in_dim(order, first + i * size, size)

        is_used = jnp.take(counted, index, mode="fill", fill_value=False)
        # A slot without a counted token repeats the first one, with coefficient 0. The loss of other values, such as
        # hidden states or temperatures of 0, might have a gradient that is not finite, and NaN * 0 is NaN.
        take = partial(jnp.take, indices=jnp.where(is_used, index, order[0]), axis=0, mode="clip")
        # A device without a counted token has no token to repeat. Its hidden states are set to 0.
        take_counted = lambda hidden: jnp.where(counted[order[0]], take(hidden.reshape(tokens, -1)), 0)
        rows = take_counted(hidden)
        logits = jnp.matmul(rows, _transpose_if(tied[0], head), preferred_element_type=dtype)
        frozen_logits = tuple(
            jnp.matmul(take_counted(states), _transpose_if(is_tied, matrix), preferred_element_type=dtype)
            for (states, matrix), is_tied in zip(frozen, tied[1:], strict=False)
        )
        coefficient = jnp.where(is_used.reshape(-1, *(1,) * (rest[0].ndim - 1)), take(rest[0]), 0)
        arrays = (frozen_logits, coefficient, *map(take, rest[1:]))
        part, value, d_logits = _chunk(block_loss, block, measured, store_blocks, with_gradient, logits, *arrays)
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
        jnp.zeros(_values_shape(rest[0], measured), dtype),
        jnp.zeros((tokens, hidden.shape[-1]), hidden.dtype) if with_gradient else None,
        jnp.zeros(_transpose_if(tied[0], head).shape, dtype) if with_gradient else None,
    )
    count, done, carry = largest(jnp.sum(counted)), 0, start
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
    block_loss: Callable[..., tuple[Array, Array]], block: int | None, measured: int, store_blocks: bool,
    with_gradient: bool, logits: Array, frozen_logits: tuple[Array, ...], coefficient: Array, *extras: Array,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Returns the total, the values and the gradient of the logits, block by block.

    The gradient of each block overwrites the block's logits.
    """

    def of_block(logits: Array, *arrays: PyTree) -> tuple[Array, Array, Array]:
        if not with_gradient:
            return *block_loss(logits, *arrays), logits
        (part, value), gradient = jax.value_and_grad(block_loss, has_aux=True)(logits, *arrays)
        return part, value, gradient

    if block is None or block == logits.shape[0]:
        return of_block(logits, frozen_logits, coefficient, *extras)

    def body(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        total, values, logits = carry
        arrays = (logits, frozen_logits, coefficient, *extras)
        rows = jax.tree.map(lambda array: jax.lax.dynamic_slice_in_dim(array, i * block, block), arrays)
        own = _stored(rows[0], i) if store_blocks and with_gradient else rows[0]
        part, value, gradient = of_block(own, *rows[1:])
        if with_gradient:
            logits = jax.lax.dynamic_update_slice_in_dim(logits, gradient, i * block, axis=0)
        return total + part, jax.lax.dynamic_update_slice_in_dim(values, value, i * block, axis=0), logits

    start = jnp.zeros((), logits.dtype), jnp.zeros(_values_shape(coefficient, measured), logits.dtype), logits
    return jax.lax.fori_loop(0, logits.shape[0] // block, body, start)


def _stored(block: Array, index: Array) -> Array:
    """Returns a block of logits, which XLA stores in an array of its own.

    Without this array, the operation that overwrites the logits with the gradient would read the logits again, and XLA
    would copy the whole chunk for each block. XLA's CPU backend removes an `optimization_barrier` before it decides this,
    but not a loop. The loop has one step, which XLA cannot derive, because XLA does not know that the index is at least 0.
    """
    steps = jnp.minimum(index, 0) + 1
    store = lambda carry: (carry[0] + 1, jnp.maximum(carry[1], block))
    start = jnp.zeros_like(index), jnp.full_like(block, -jnp.inf)
    return jax.lax.while_loop(lambda carry: carry[0] < steps, store, start)[1]


def on_mesh(sweep: Callable[..., Sweep], mesh: Mesh, with_gradient: bool, *arrays: PyTree) -> Sweep:
    """Runs the sweep on every device, over the device's own rows.

    The head is gathered before the loop, and the head's gradient is reduced after the loop.
    """

    def local(hidden: Array, head: Array, frozen: Frozen, rest: tuple[Array, ...]) -> Sweep:
        # The loop may contain collective operations over `tensor`, which need all devices. So every device runs as many
        # chunks as the device with the most tokens.
        largest = partial(jax.lax.pmax, axis_name=BATCH_AXES)
        total, values, d_hidden, d_head = sweep(with_gradient, hidden, head, frozen, rest, largest=largest)
        total = jax.lax.psum(total, BATCH_AXES)
        return total, values, d_hidden, None if d_head is None else jax.lax.psum(d_head, BATCH_AXES)

    by_row, replicated = P(BATCH_AXES), P()
    models = jax.tree.map(lambda array: by_row if array.ndim == 3 else replicated, arrays[:3])
    return jax.shard_map(
        local, mesh=mesh, axis_names=set(BATCH_AXES), check_vma=False, in_specs=(*models, by_row),
        out_specs=(replicated, by_row, *((by_row, replicated) if with_gradient else (None, None))),
    )(*arrays)  # fmt: skip


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def once(sweep: Callable[..., Sweep], *arrays: PyTree) -> Sweep:
    """Runs the sweep. A derivative of the result raises the error of `_twice`."""
    return sweep(*arrays)


@once.defjvp
def _twice(sweep: Callable[..., Sweep], primals: PyTree, tangents: PyTree) -> NoReturn:
    """Raises an error, because JAX calls this function only for a second derivative."""
    raise TypeError(
        "token_sum is differentiable once, because the forward pass computes the gradient. For a second derivative, "
        "write the loss on full logits: jnp.sum(coefficient * token_loss(log_p, log_q))."
    )


def is_counted(coefficient: Array) -> Array:
    """Returns an array [N], True where a token has a nonzero coefficient. The coefficients are [N] or [N, K]."""
    return coefficient != 0 if coefficient.ndim == 1 else jnp.any(coefficient != 0, axis=-1)


def _values_shape(coefficient: Array, measured: int) -> tuple[int, ...]:
    """Returns the shape of the values: that of the coefficients, with the measured values as further columns."""
    return (*coefficient.shape[:-1], coefficient.shape[-1] + measured) if measured else coefficient.shape


def _transpose_if(is_tied: bool, head: Array) -> Array:
    """Returns a head as [D, V], or a matrix [D, V] in the shape of the head."""
    return head.T if is_tied else head
