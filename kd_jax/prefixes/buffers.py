"""Sampled rows that are kept for later steps, in a replay buffer or in a pool. Both are part of a checkpoint."""

import base64
import zlib
from typing import Any

import numpy as np

from kd_jax.prefixes import rollouts
from kd_jax.prefixes.rollouts import Rows


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
            both = rows if self.rows is None else rollouts.concatenate([self.rows, rows])
            self.rows = rollouts.take(both, slice(-self._capacity, None))

    def draw(self, count: int, random: np.random.Generator) -> Rows:
        """Returns `count` random rows, with repetitions only if the buffer has fewer rows.

        Raises:
          ValueError: the buffer is empty.
        """
        if self.rows is None:
            raise ValueError("the replay buffer is empty: a step replays rows before any row was sampled.")
        return rollouts.take(self.rows, random.choice(len(self), count, replace=len(self) < count))


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
          group: the number of rows for each prompt. They stay beside each other.
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
            raise ValueError("the pool is empty.")
        count = len(self.rows["lengths"])
        batches = count // self._batch_size
        epoch, place = divmod(step - self.start, batches)
        order = np.random.default_rng((self._seed, self.start, 1 + epoch)).permutation(count // self._group)
        prompts = self._batch_size // self._group
        groups = order[place * prompts : (place + 1) * prompts]
        rows = rollouts.take(self.rows, (groups[:, None] * self._group + np.arange(self._group)).ravel())
        if step + 1 == self.start + batches * self._epochs:
            self.rows = self.start = None  # a checkpoint does not save rows that no step will use
        return rows


def encode(rows: Rows | None) -> dict[str, Any] | None:
    """Returns rows in a form that JSON can hold, for a checkpoint."""
    return None if rows is None else {name: _encode(array) for name, array in rows.items()}


def decode(saved: dict[str, Any] | None) -> Rows | None:
    """Returns the rows of `encode`."""
    return None if saved is None else {name: _decode(array) for name, array in saved.items()}


def _encode(array: np.ndarray) -> dict[str, Any]:
    content = base64.b64encode(zlib.compress(array.tobytes())).decode()
    return {"dtype": array.dtype.str, "shape": array.shape, "zlib": content}


def _decode(saved: dict[str, Any]) -> np.ndarray:
    content = zlib.decompress(base64.b64decode(saved["zlib"]))
    return np.frombuffer(content, saved["dtype"]).reshape(saved["shape"]).copy()
