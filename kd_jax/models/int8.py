"""A model's matrices in int8, with a scale for each output channel.

Each matrix is converted to floating point immediately before the product. Norms, biases, the embedding and the output
matrix keep their type: norms and biases are small, and rounding of the embedding or of the output matrix changes every
logit, while both are a small part of a large model (experiments/int8_teacher).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import qwix
from flax.nnx.nn.dtypes import promote_dtype
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

Placement = tuple[NamedSharding, NamedSharding] | None  # the shardings of a matrix and of its scales
# qwix maps the largest entry to 127.5 steps, beyond the last step of int8. With 127 steps the largest entry is exact,
# and so is a matrix whose columns are int8 numbers times their scale.
METHOD = f"absmax,{127.5 / 127}"


def is_matrix(name: str) -> bool:
    """Returns True if a parameter is converted to int8. The name is a path such as 'layers/0/mlp/up/kernel'.

    The router of a mixture of experts keeps its type, because rounding could change the choice of experts.
    """
    return name.startswith("layers/") and name.endswith("/kernel") and not name.endswith("/router/kernel")


def quantise(matrix: Float[Array, "... in out"]) -> qwix.QArray:
    """Returns the matrix in int8, as the nearest multiples of the scales, and the scales [..., 1, out].

    The scale of a column is max |column| / 127. The scales are sharded like the columns. The matrices of several experts
    have a leading axis, and each expert's columns have their own scales. The memory of `matrix` is
    freed, so `matrix` must not be used afterwards.

    Example:
      >>> import jax.numpy as jnp
      >>> quantised = quantise(jnp.array([[127.0, 0.5], [-64.0, 0.125]]))
      >>> quantised.qvalue.tolist(), quantised.scale.shape
      ([[127, 127], [-64, 32]], (1, 2))
    """
    placement = None
    if isinstance(matrix.sharding, NamedSharding):
        mesh, spec = matrix.sharding.mesh, (*matrix.sharding.spec, *(None,) * matrix.ndim)[: matrix.ndim]
        placement = NamedSharding(mesh, P(*spec)), NamedSharding(mesh, P(*spec[:-2], None, spec[-1]))
    quantised = qwix.QArray(*_quantiser(placement)(matrix))
    matrix.delete()
    return quantised


def quantise_all(params: PyTree) -> PyTree:
    """Returns the parameters with each matrix of the layers in int8, as in `quantise`."""
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    return jax.tree.map_with_path(lambda path, leaf: quantise(leaf) if is_matrix(name(path)) else leaf, params)


@functools.cache
def _quantiser(placement: Placement) -> Callable[[Array], tuple[Array, Array]]:
    def quantise_matrix(matrix: Array) -> tuple[Array, Array]:
        channels = [*range(matrix.ndim - 2), matrix.ndim - 1]
        parts = qwix.quantize(
            matrix.astype(jnp.float32), jnp.int8, channelwise_axes=channels, calibration_method=METHOD
        )
        return parts.qvalue, parts.scale

    return jax.jit(quantise_matrix, out_shardings=placement)


def dequantise(params: PyTree, dtype: DTypeLike) -> PyTree:
    """Returns the tree with each int8 matrix replaced by an array in `dtype`. All other leaves stay the same."""
    as_float = lambda leaf: qwix.dequantize(leaf).astype(dtype) if _is_int8(leaf) else leaf
    return jax.tree.map(as_float, params, is_leaf=_is_int8)


def promote(operands: PyTree, /, *, dtype: DTypeLike | None = None, inexact: bool = True) -> PyTree:
    """Converts the input, matrix and bias of `nnx.Linear` to the type of the product."""
    x, kernel, bias = operands
    if not _is_int8(kernel):
        return promote_dtype(operands, dtype=dtype, inexact=inexact)
    x, bias = promote_dtype((x, bias), dtype=dtype, inexact=inexact)
    # The conversion waits for the input. Otherwise XLA would convert all matrices first, or once before a loop.
    x, values = jax.lax.optimization_barrier((x, kernel.qvalue))
    scale = kernel.scale
    # On a CPU, XLA removes the barrier before the operations are ordered, but not this addition of 0.
    if jax.default_backend() == "cpu":
        scale = scale + 0 * x[(0,) * x.ndim].astype(scale.dtype)
    return x, dequantise(qwix.QArray(values, scale), x.dtype), bias


def _is_int8(leaf: object) -> bool:
    return isinstance(leaf, qwix.QArray)
