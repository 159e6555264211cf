"""The replay buffer: the newest sampled rows, which later steps use again. The rows are part of a checkpoint.

`ReplayBuffer.get_state` makes the saved form of the buffer, and `ReplayBuffer.set_state` restores it. `Feed.get_state`
puts the saved form into the entry "store" of its own state, which `storage.checkpoint` writes with each checkpoint.
"""

import numpy as np

from kd_jax.prefixes import rollouts
from kd_jax.prefixes.rollouts import Rows
from kd_jax.storage.files import Json


class ReplayBuffer:
    """The newest sampled rows, from which a step may choose rows at random.

    Attributes:
      rows: the rows, oldest first; None before the first row.
    """

    def __init__(self, capacity: int):
        """Makes an empty buffer.

        Args:
          capacity: the maximum number of rows; with 0 the buffer stays empty.
        """
        self._capacity = capacity
        self.rows: Rows | None = None

    def __len__(self) -> int:
        return 0 if self.rows is None else len(self.rows["lengths"])

    def add(self, rows: Rows) -> None:
        """Adds rows, and drops the oldest rows beyond the capacity."""
        if self._capacity:
            all_rows = rows if self.rows is None else rollouts.concatenate([self.rows, rows])
            self.rows = rollouts.take(all_rows, slice(-self._capacity, None))

    def draw(self, count: int, random: np.random.Generator) -> Rows:
        """Returns `count` random rows, with repetitions only if the buffer has fewer rows.

        Raises:
          ValueError: the buffer is empty.
        """
        if self.rows is None:
            raise ValueError("the replay buffer is empty: a step replays rows before any row was sampled.")
        return rollouts.take(self.rows, random.choice(len(self), count, replace=len(self) < count))

    def get_state(self) -> Json | None:
        """Returns the rows in a form that JSON can hold; None for an empty buffer."""
        return None if self.rows is None else rollouts.encode(self.rows)

    def set_state(self, state: Json | None) -> None:
        """Continues from a state of `get_state`."""
        self.rows = None if state is None else rollouts.decode(state)
