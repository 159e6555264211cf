"""A model's matrices in int8, with a scale for each output channel.

The matrices are converted to floating point where they are used. Norms, biases, the embedding and the output matrix
keep their type. Norms and biases are small. Rounding of the embedding and of the output matrix shows in every logit,
and in a large model these two are a small part (experiments/int8_teacher).
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

# qwix maps the largest entry to 127.5 steps, beyond the last step of int8. With 127 steps the largest entry is exact,
# and so is a matrix whose columns are int8 numbers times their scale.
METHOD = f"absmax,{127.5 / 127}"


def is_matrix(name: str) -> bool:
    """Returns True if a parameter is kept in int8. The name is a path such as 'layers/0/mlp/up/kernel'."""
    return name.startswith("layers/") and name.endswith("/kernel")


def quantise(matrix: Float[Array, "in out"]) -> qwix.QArray:
    """Returns the matrix in int8, as the nearest multiples of the scales, and the scales [1, out].

    The scale of a column is max |column| / 127. The scales are sharded like the columns. The memory of `matrix` is
    freed, so `matrix` must not be used afterwards.

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
    """Returns the tree with each int8 matrix replaced by an array in `dtype`. All other leaves stay the same."""
    whole = lambda leaf: qwix.dequantize(leaf).astype(dtype) if _is_int8(leaf) else leaf
    return jax.tree.map(whole, params, is_leaf=_is_int8)


def promote(operands: Any, /, *, dtype: Any = None, inexact: bool = True) -> Any:
    """Converts the input, matrix and bias of `nnx.Linear` to the type in which they are multiplied."""
    x, kernel, bias = operands
    if not _is_int8(kernel):
        return promote_dtype(operands, dtype=dtype, inexact=inexact)
    x, bias = promote_dtype((x, bias), dtype=dtype, inexact=inexact)
    # Wait for the input. Otherwise XLA would dequantise all matrices first, or once before a loop over tokens.
    x, values = jax.lax.optimization_barrier((x, kernel.qvalue))
    scale = kernel.scale
    # On a CPU the barrier is removed before the operations are ordered. This addition of 0 remains.
    if jax.default_backend() == "cpu":
        scale = scale + 0 * x[(0,) * x.ndim].astype(scale.dtype)
    return x, dequantise(qwix.QArray(values, scale), x.dtype), bias


def _is_int8(leaf: Any) -> bool:
    return isinstance(leaf, qwix.QArray)
