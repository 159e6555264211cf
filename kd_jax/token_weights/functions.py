"""Scores, rules and gates as functions of named arrays."""

import dataclasses
from collections.abc import Callable, Mapping

import jax
from jaxtyping import Array

from kd_jax.resolve import Spec

Values = Mapping[str, Array]
Compute = Callable[[Values], Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Score:
    """A score with its options bound.

    Attributes:
      function: the score as a function of the arrays that `reads` names, in that order.
      reads: the names of the arrays, out of 'teacher', 'student' and 'target'.
    """

    function: Callable[..., Array]
    reads: tuple[str, ...]

    def __call__(self, **arrays: Array) -> Array:
        """Returns the score. Arrays that the score does not read are ignored."""
        return self.function(*(arrays[name] for name in self.reads))


@dataclasses.dataclass(frozen=True, eq=False)
class TokenFunction:
    """A function of scores and inputs, which has a value for each token.

    Attributes:
      scores: the scores that the caller evaluates, by label.
      inputs: the names of the further arrays that the caller supplies, in the order of `INPUTS`.
      looks_at_batch: True if the values must be arrays [B, L] of the global batch. Otherwise the function may be called
        on any part of the tokens, with arrays of any shape.
      numbers: the schedules of the options that have one, as specs, by the names under which `compute` looks up the
        schedules' values.
      compute: the function itself.
    """

    scores: dict[str, Score]
    inputs: tuple[str, ...]
    numbers: dict[str, Spec]
    looks_at_batch: bool
    compute: Compute

    def __call__(self, values: Values) -> Array:
        """Returns the function's value for each token, a constant to the gradient.

        Args:
          values: an array for each label in `scores` and for each name in `inputs` and `numbers`, all of the same shape.
        """
        return jax.lax.stop_gradient(self.compute(values))


@dataclasses.dataclass(frozen=True, eq=False)
class Rule(TokenFunction):
    """A rule, which gives each token a weight. If the inputs have `counted`, other tokens have weight 0.

    Attributes:
      divide_by: 'all' if the weighted sum is divided by the number of counted tokens, 'kept' if it is divided by the
        sum of the counted tokens' weights.
    """

    divide_by: str
