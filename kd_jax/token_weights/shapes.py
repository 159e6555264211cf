"""Checks of rules without data: on the shapes and types of their arrays, and on the numbers of one step."""

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from kd_jax.resolve import Spec
from kd_jax.token_weights.functions import Compute, Score, TokenFunction


class Reads(Protocol):
    """The names of the values that a rule reads, see `TokenFunction`."""

    @property
    def scores(self) -> Mapping[str, Score]: ...

    @property
    def inputs(self) -> tuple[str, ...]: ...

    @property
    def numbers(self) -> Mapping[str, Spec]: ...


def check_shapes(reads: Reads, compute: Compute, local: bool, kind: Any, what: str) -> None:
    """Evaluates the scores and the rule on abstract arrays, and checks that each returns a value for each token.

    Args:
      reads: the scores and the names of the arrays that the rule reads.
      compute: the rule.
      local: True if the tokens may have any shape.
      kind: the type of the rule's values.
      what: the same in words.

    Raises:
      ValueError: an array has another shape or type.
    """
    for shape in ((2, 3), (3,)) if local else ((2, 3),):
        values = _abstract_values(reads, shape)
        for label in reads.scores:
            if values[label].shape != shape:
                raise ValueError(
                    f"the score {label} returns an array of shape {values[label].shape} for tokens of shape {shape}, but "
                    "it must return one number per token."
                )
        result = jax.eval_shape(compute, values)
        if result.shape != shape or not jnp.issubdtype(result.dtype, kind):
            raise ValueError(
                f"the function returns an array of shape {result.shape} and type {result.dtype} for tokens of shape "
                f"{shape}, but it must return {what} for each token."
            )


def check_numbers(function: TokenFunction, numbers: Mapping[str, float]) -> None:
    """Checks the numbers that the schedules of a function's options give in one step.

    Args:
      numbers: a number for each name in `function.numbers`.

    Raises:
      ValueError: a number is out of range for its option.
    """
    jax.eval_shape(lambda values: function.compute(values | numbers), _abstract_values(function, (2, 3)))


def _abstract_values(reads: Reads, shape: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes and types of all values that a function reads, for tokens of a shape."""
    values = {name: _abstract(name, shape) for name in (*reads.inputs, *reads.numbers)}
    for label, score in reads.scores.items():
        values[label] = jax.eval_shape(score.function, *(_abstract(name, shape) for name in score.reads))
    return values


def _abstract(name: str, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """Returns the shape and type of an input, or of an array that a score reads, for tokens of a shape."""
    if name in ("teacher", "student"):
        return jax.ShapeDtypeStruct((*shape, 4), jnp.float32)
    whole, truth = ("row", "position", "position_from_end", "target"), ("counted", "has_view")
    return jax.ShapeDtypeStruct(shape, jnp.int32 if name in whole else jnp.bool_ if name in truth else jnp.float32)
