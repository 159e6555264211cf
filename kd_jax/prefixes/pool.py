"""A pool: rows that are sampled together for several steps. The rows are part of a checkpoint.

`Pool.get_state` makes the saved form of the rows. `Feed.get_state` saves this form in the entry "store" of its own
state, and the step at which the rows were sampled in the entry "pool_start".
"""

import numpy as np

from kd_jax.prefixes import rollouts
from kd_jax.prefixes.rollouts import Rows
from kd_jax.storage.files import Json


class Pool:
    """Rows that were sampled together, and are used in a random order over several steps and epochs.

    Attributes:
      rows: the rows; None before the rows are sampled, and after their last use.
      start: the step at which the rows were sampled; None without rows.
    """

    def __init__(self, seed: int, batch_size: int, group: int, epochs: int):
        """Makes an empty pool.

        Args:
          seed: the seed of the order.
          batch_size: the number of rows of a step.
          group: the number of authors. One row of each author, for the same prompt, forms a group that stays together.
          epochs: the number of passes over the rows.
        """
        self._seed, self._batch_size, self._group, self._epochs = seed, batch_size, group, epochs
        self.rows: Rows | None = None
        self.start: int | None = None

    def fill(self, rows: Rows, step: int) -> None:
        """Puts the rows that were sampled at a step into the pool."""
        self.rows, self.start = rows, step

    def take(self, step: int) -> Rows:
        """Returns the rows of a step, and empties the pool after the last step of its last epoch."""
        if self.rows is None or self.start is None:
            raise ValueError("the pool is empty: a step takes rows before any row was sampled.")
        count = len(self.rows["lengths"])
        batches = count // self._batch_size
        epoch, batch = divmod(step - self.start, batches)
        order = np.random.default_rng((self._seed, self.start, 1 + epoch)).permutation(count // self._group)
        group_count = self._batch_size // self._group
        groups = order[batch * group_count : (batch + 1) * group_count]
        rows = rollouts.take(self.rows, (groups[:, None] * self._group + np.arange(self._group)).ravel())
        if step + 1 == self.start + batches * self._epochs:
            self.rows = self.start = None  # a checkpoint does not save rows that no step will use
        return rows

    def get_state(self) -> Json | None:
        """Returns the rows in a form that JSON can hold; None for an empty pool."""
        return None if self.rows is None else rollouts.encode(self.rows)

    def set_state(self, state: Json | None, start: int | None) -> None:
        """Continues from the rows of `get_state`, which were sampled at the step `start`. None empties the pool."""
        self.rows, self.start = None if state is None else rollouts.decode(state), start
