"""The state of a run: parameters, optimiser and schedules."""

from collections.abc import Sequence

import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Int, PyTree

from kd_jax.objectives import Term
from kd_jax.objectives.prepared import States, as_real


@struct.dataclass
class TrainState:
    """The state that a run carries from step to step. A checkpoint holds this state and the position in the data.

    Attributes:
      step: the number of steps made, skipped steps included.
      params: the student's parameters; only the trained arrays if a part of the student is trained.
      opt_state: the optimiser's state.
      schedules: the states of the schedules of each term.
      key: a random key for a step function that you write; use `jax.random.fold_in(key, step)`. The step of
        `make_train_step` returns the key unchanged.
      skipped: the number of consecutive steps, up to the last one, whose loss or gradient was not finite.
    """

    step: Int[Array, ""]
    params: PyTree
    opt_state: PyTree
    schedules: tuple[States, ...]
    key: Array
    skipped: Int[Array, ""]


def init_state(params: PyTree, tx: optax.GradientTransformation, terms: Sequence[Term], key: Array) -> TrainState:
    """Returns the state before the first step. `key` becomes `TrainState.key`."""
    schedules = as_real(tuple(tuple(schedule.init() for schedule in term.schedules) for term in terms), params)
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), schedules, key, jnp.zeros((), jnp.int32))
