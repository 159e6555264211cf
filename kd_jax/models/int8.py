"""A model's matrices in int8 with a scale for each output channel; they become numbers of another type where they are used.

Kept as they are: norms and biases, which are small, and the embedding and the output matrix, whose rounding every logit shows
and of which a large model has little (experiments/int8_teacher).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import qwix
from flax.nnx.nn.dtypes import promote_dtype
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

# qwix spreads the largest entry over 127.5 steps, beyond the last; with 127 the largest is exact, and so is what int8 can hold.
METHOD = f"absmax,{127.5 / 127}"


def is_matrix(name: str) -> bool:
    """Whether the parameter 'layers/0/mlp/up/kernel', or of another name, is one that is kept in int8."""
    return name.startswith("layers/") and name.endswith("/kernel")


def quantise(matrix: Float[Array, "in out"]) -> qwix.QArray:
    """The nearest multiples of scale = max |column| / 127, and the scales [1, out], placed as the columns are.

    Its memory is given up: `matrix` must not be used again.

    Example:
      >>> import jax.numpy as jnp
      >>> found = quantise(jnp.array([[127.0, 0.5], [-64.0, 0.125]]))
      >>> found.qvalue.tolist(), found.scale.shape
      ([[127, 127], [-64, 32]], (1, 2))
    """
    placed = None
    if isinstance(matrix.sharding, NamedSharding):
        mesh, (row, column) = matrix.sharding.mesh, (*matrix.sharding.spec, None, None)[:2]
        placed = NamedSharding(mesh, P(row, column)), NamedSharding(mesh, P(None, column))
    found = qwix.QArray(*_quantiser(placed)(matrix))
    matrix.delete()
    return found


@functools.cache
def _quantiser(placed: Any) -> Any:
    def split(matrix: Array) -> tuple[Array, Array]:
        found = qwix.quantize(matrix.astype(jnp.float32), jnp.int8, channelwise_axes=[1], calibration_method=METHOD)
        return found.qvalue, found.scale

    return jax.jit(split, out_shardings=placed)


def dequantise(params: Any, dtype: Any) -> Any:
    """A tree with arrays in `dtype` in place of those in int8, and all else as it is."""
    whole = lambda leaf: qwix.dequantize(leaf).astype(dtype) if _is_int8(leaf) else leaf
    return jax.tree.map(whole, params, is_leaf=_is_int8)


def promote(operands: Any, /, *, dtype: Any = None, inexact: bool = True) -> Any:
    """`nnx.Linear`'s input, matrix and bias, in the type that they are multiplied in."""
    x, kernel, bias = operands
    if not _is_int8(kernel):
        return promote_dtype(operands, dtype=dtype, inexact=inexact)
    x, bias = promote_dtype((x, bias), dtype=dtype, inexact=inexact)
    # Not before the input is there: else XLA dequantises all matrices first, and once and for all before a loop over tokens.
    x, values = jax.lax.optimization_barrier((x, kernel.qvalue))
    scale = kernel.scale
    if jax.default_backend() == "cpu":  # where the barrier is gone when the order of the work is chosen, but not this 0
        scale = scale + 0 * x[(0,) * x.ndim].astype(scale.dtype)
    return x, dequantise(qwix.QArray(values, scale), x.dtype), bias


def _is_int8(leaf: Any) -> bool:
    return isinstance(leaf, qwix.QArray)
