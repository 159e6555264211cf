"""Frozen matrices with a low-rank addition (LoRA), and the product of `nnx.Linear` with such a matrix.

The product is ``x W + scale (x A) B``, so no matrix of the size of W is made in a step. W may be in another type than
the computation, or in int8. W is then converted immediately before each product, also in the backward pass, so that a
step never keeps converted copies of all matrices.

qwix has a LoRA of its own, which rewrites the modules of a model. This project needs factors as a tree beside the
parameters, factors that several matrices share, and dropout that does not depend on the division of a batch.

References:
  Hu et al., `LoRA: low-rank adaptation of large language models <https://arxiv.org/abs/2106.09685>`_, 2021.
"""

import dataclasses
from types import EllipsisType
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from flax.nnx.nn.dtypes import promote_dtype
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key, PyTree

from kd_jax.models import int8


@struct.dataclass
class FrozenMatrix:
    """A matrix without a gradient, to which the product of two trained factors may be added.

    Attributes:
      base: the matrix [in, out], an array of any type or a `qwix.QArray`.
      lora_a: the first factor [in, rank], or None.
      lora_b: the second factor [rank, out], or None.
      row_keys: a random key for each row of the batch, for dropout of the input of the first factor; None for no dropout.
      scale: the number by which the low-rank product is multiplied.
      dropout: the probability with which an entry of the input is set to 0.
      index: a number that gives the matrix a dropout mask of its own.
    """

    base: PyTree
    lora_a: Float[Array, "in rank"] | None = None
    lora_b: Float[Array, "rank out"] | None = None
    row_keys: Key[Array, " B"] | None = None
    scale: float = struct.field(pytree_node=False, default=1.0)
    dropout: float = struct.field(pytree_node=False, default=0.0)
    index: int = struct.field(pytree_node=False, default=0)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape [in, out] of the matrix."""
        return self.base.shape

    def __getitem__(self, index: EllipsisType) -> "FrozenMatrix":
        """Returns the matrix itself, because nnx reads the value of a variable by an index of `...`."""
        return self


def promote(operands: PyTree, /, *, dtype: DTypeLike | None = None, inexact: bool = True) -> PyTree:
    """Converts the input, matrix and bias of `nnx.Linear` to the type of the product, except a frozen matrix itself."""
    x, kernel, bias = operands
    if not isinstance(kernel, FrozenMatrix):
        return int8.promote(operands, dtype=dtype, inexact=inexact)
    factors = (kernel.lora_a, kernel.lora_b)
    x, lora_a, lora_b, bias = promote_dtype((x, *factors, bias), dtype=dtype, inexact=inexact)
    return x, dataclasses.replace(kernel, lora_a=lora_a, lora_b=lora_b), bias


def product(x: Array, kernel: PyTree, dimension_numbers: Any, **options: Any) -> Array:
    """Returns the product of `nnx.Linear`. The arguments are those of `jax.lax.dot_general`."""
    if not isinstance(kernel, FrozenMatrix):
        return jax.lax.dot_general(x, kernel, dimension_numbers, **options)
    is_converted = any(leaf.dtype != x.dtype for leaf in jax.tree.leaves(kernel.base))
    if is_converted:
        y = _converted_product(x, kernel.base)
    else:
        y = jax.lax.dot_general(x, kernel.base, dimension_numbers, **options)
    if kernel.lora_a is None or kernel.lora_b is None:
        return y
    low = jax.lax.dot_general(_dropped(x, kernel), kernel.lora_a, dimension_numbers, **options)
    return y + kernel.scale * jax.lax.dot_general(low, kernel.lora_b, dimension_numbers, **options)


@jax.custom_vjp
def _converted_product(x: Float[Array, "*batch in"], base: PyTree) -> Float[Array, "*batch out"]:
    """Returns the product with a matrix of another type. The backward pass converts the matrix again, and keeps no copy."""
    return jnp.matmul(x, _converted(base, x))


def _forward(x: Array, base: PyTree) -> tuple[Array, PyTree]:
    return _converted_product(x, base), base


def _backward(base: PyTree, gradient: Array) -> tuple[Array, None]:
    return jnp.matmul(gradient, _converted(base, gradient).T), None


_converted_product.defvjp(_forward, _backward)


def _converted(base: PyTree, operand: Array) -> Array:
    """Returns the matrix in the type of an operand of its product, converted when the operand is known, as in `int8`."""
    if not isinstance(base, jax.Array):
        return int8.promote((operand, base, None), dtype=operand.dtype)[1]
    operand, base = jax.lax.optimization_barrier((operand, base))
    zero = 0 * operand[(0,) * operand.ndim] if jax.default_backend() == "cpu" else 0
    return base.astype(operand.dtype) + zero


def merged(leaf: PyTree) -> Array:
    """Returns a parameter as one array: ``W + scale A B`` in float32 for a frozen matrix, and an array unchanged.

    Example:
      >>> leaf = FrozenMatrix(jnp.zeros((2, 2)), jnp.ones((2, 1)), jnp.array([[1.0, 2.0]]), scale=0.5)
      >>> merged(leaf).tolist()
      [[0.5, 1.0], [0.5, 1.0]]
    """
    if not isinstance(leaf, FrozenMatrix):
        return int8.dequantise(leaf, jnp.float32)
    return add_product(int8.dequantise(leaf.base, jnp.float32), leaf.lora_a, leaf.lora_b, leaf.scale)


def add_product(base: Array, lora_a: Array | None, lora_b: Array | None, scale: float) -> Array:
    """Returns ``base + scale lora_a lora_b`` in float32, and `base` alone without factors."""
    base = base.astype(jnp.float32)
    if lora_a is None or lora_b is None:
        return base
    return base + scale * jnp.matmul(lora_a, lora_b, precision="highest").astype(jnp.float32)


def _dropped(x: Float[Array, "B L in"], kernel: FrozenMatrix) -> Array:
    """Returns the input with some entries set to 0, and the others divided by the probability to stay.

    The mask of a row depends on the key of the row alone, so the division of a batch over devices or microbatches
    changes no mask.
    """
    if kernel.row_keys is None:
        return x
    stay = 1 - kernel.dropout

    def of_row(key: Array, row: Array) -> Array:
        kept = jax.random.bernoulli(jax.random.fold_in(key, kernel.index), stay, row.shape)
        return jnp.where(kept, row / jnp.asarray(stay, row.dtype), 0)

    return jax.vmap(of_row)(kernel.row_keys, x)
