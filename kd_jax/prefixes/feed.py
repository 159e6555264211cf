"""The batch of each step, as the source of the run decides, with a state from which a resumed run continues exactly."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import jax
import numpy as np
from jaxtyping import Int, PyTree

from kd_jax import data, models
from kd_jax.objectives import ORIGINS
from kd_jax.prefixes import Plan, Source, rollouts
from kd_jax.prefixes.pool import Pool
from kd_jax.prefixes.replay_buffer import ReplayBuffer
from kd_jax.prefixes.rollouts import Mixture, Progress, Rows, Sampler
from kd_jax.storage.files import Json

Batch = dict[str, np.ndarray]
REPLAY = 1  # the purpose of the random numbers that choose rows of the replay buffer


@dataclasses.dataclass(frozen=True)
class Author:
    """A model that writes responses.

    Attributes:
      model: the model.
      params: the parameters of the model; None for the `params` of `Feed.next`.
      mixture: the mixture with another model, as in `models.generate`.
    """

    model: models.Model
    params: PyTree = None
    mixture: Mixture | None = None


class Batches(Protocol):
    """An iterator over this process's rows of each batch, with a position that JSON can hold."""

    def __next__(self) -> Batch: ...

    def get_state(self) -> Json: ...

    def set_state(self, state: Json) -> None: ...


class RolloutArrays(Protocol):
    """Makes further arrays of sampled rows from the rows of the dataset whose prompts they have."""

    def with_arrays(
        self, rows: Rows, indices: Int[np.ndarray, " M"], responses: Sequence[str], group_size: int
    ) -> Rows:
        """Returns sampled rows with further arrays.

        Args:
          rows: the sampled rows.
          indices: the index of the row of the dataset whose prompt each sampled row has.
          responses: the texts of the responses.
          group_size: the number of neighbouring sampled rows with the same prompt.
        """
        ...

    def of_rollouts(self, rows: Rows) -> Batch:
        """Returns the further arrays of a batch of rows from `with_arrays`."""
        ...


class Feed:
    """Makes one batch per step from a dataset and from responses that are sampled for its prompts.

    `get_state` returns the positions in the datasets, the state of the source, and the stored rows. Another feed with
    this state makes the same batches.

    Attributes:
      source: the source of the rows.
      fresh: the student's rows that the last step sampled, or None.
      report: the statistics of the last step's rows, by name.
    """

    def __init__(
        self, source: Source, batches: Batches, *, text_batches: Batches | None = None, sampler: Sampler | None = None,
        authors: dict[str, Author] | None = None, total_steps: int, batch_size: int, epoch_batches: int, seed: int,
        rollouts_per_prompt: int = 1, progress: Progress = iter, rollout_arrays: RolloutArrays | None = None,
    ):  # fmt: skip
        """Assembles the feed without reading any row.

        Args:
          source: a source of `kd_jax.prefixes`.
          batches: the batches of the dataset.
          text_batches: the batches of the second stream of text, or None.
          sampler: the sampler of responses; None if the source samples none.
          authors: the authors that the source names, by origin.
          total_steps: the number of steps of the run.
          batch_size: the number of rows of a global batch.
          epoch_batches: the number of batches of rows that an author writes in one epoch of the dataset's prompts.
          seed: the seed of decisions and samples.
          rollouts_per_prompt: the number of responses of each author to each prompt. A batch then has fewer prompts.
          progress: wraps a long loop in a progress bar.
          rollout_arrays: makes further arrays of sampled rows; None for none. `batches` then have the array `row`.
        """
        self.source, self._batches, self._text = source, batches, text_batches
        self._sampler, self._authors = sampler, authors or {}
        self._total, self._batch_size, self._seed = total_steps, batch_size, seed
        self._epoch_batches, self._repeats, self._progress = epoch_batches, rollouts_per_prompt, progress
        self._state = source.init()
        self._buffer = ReplayBuffer(source.capacity)
        self._pool = Pool(seed, batch_size, max(1, len(source.authors)), source.epochs)
        self._rollout_arrays = rollout_arrays
        self._waiting: list[tuple[list[int], int]] = []  # prompts, and the index of each prompt's row
        self.report: dict[str, float] = {}
        self.fresh: Rows | None = None

    def next(self, step: int, params: PyTree) -> Batch:
        """Returns this process's rows of the batch of update `step`. Steps are counted from 0.

        Args:
          step: the number of updates so far.
          params: the student's current parameters.
        """
        self.fresh, self.report = None, {}
        uniform = float(self._random(step, 0).random())
        plan = self.source.choose(self._state, step=step, total=self._total, uniform=uniform, stored=len(self._buffer))
        if plan == Plan.DATA:
            batch = self._with_origin(next(self._batches))
        else:
            batch = self._own_part(self._rows(plan, step, params))
        batch.pop("row", None)
        if "has_view" in batch:
            counted = batch["loss_mask"]
            self.report["tokens_with_view"] = float((batch["has_view"] & counted).sum() / max(counted.sum(), 1))
        if self._authors:
            student_rows = float((batch["origin"] == ORIGINS.index("student")).mean())
            self.report |= {"student_rows": student_rows} | {k: v for k, v in self._state.items() if v is not None}
        if self._text is None:
            return batch
        text = self._with_origin(next(self._text), "text")
        text.pop("row", None)
        return {name: np.concatenate([array, text[name]]) for name, array in batch.items()}

    def observe(self, loss: float) -> None:
        """Gives the source the held-out cross-entropy of an evaluation."""
        self._state = self.source.observe(self._state, loss)

    def get_state(self) -> Json:
        """Returns the state that decides all later batches, in a form that JSON can hold.

        The entry "store" has the rows of the pool or of the replay buffer. A source uses only one of both.
        """
        return {
            "data": self._batches.get_state(),
            "text": None if self._text is None else self._text.get_state(),
            "source": self._state,
            "store": self._buffer.get_state() if self._pool.rows is None else self._pool.get_state(),
            "pool_start": self._pool.start,
            "waiting": [prompt for prompt, _ in self._waiting],
            "waiting_rows": [row for _, row in self._waiting],
        }

    def set_state(self, state: Json) -> None:
        """Continues from a state of `get_state`."""
        self._batches.set_state(state["data"])
        if self._text is not None:
            self._text.set_state(state["text"])
        self._state, waiting = state["source"], state["waiting"]
        self._waiting = list(zip(waiting, state.get("waiting_rows", [-1] * len(waiting)), strict=True))
        store, start = state["store"], state["pool_start"]  # if `start` is not None, `store` has the rows of a pool
        self._pool.set_state(None if start is None else store, start)
        self._buffer.set_state(store if start is None else None)

    def _rows(self, plan: Plan, step: int, params: PyTree) -> Rows:
        """Returns the rows of the global batch for a plan with sampled rows."""
        if plan == Plan.POOL:
            if self._pool.rows is None:
                self._pool.fill(self._sample(self._batches_of_a_pool(step), params, step), step)
            return self._pool.take(step)
        if plan in (Plan.FRESH, Plan.FRESH_THEN_REPLAY):
            rows = self._sample(1, params, step)
            self._buffer.add(rows)
            if plan == Plan.FRESH:
                return rows
        return self._buffer.draw(self._batch_size, self._random(step, REPLAY))

    def _batches_of_a_pool(self, step: int) -> int:
        """Returns the number of batches of prompts for a pool, at most those that the rest of the run uses."""
        every = self.source.every or self._epoch_batches
        remaining = -(-(self._total - step) // len(self.source.authors))
        return min(every, max(1, remaining))

    def _sample(self, batches: int, params: PyTree, step: int) -> Rows:
        """Returns the response of each author to each prompt of some batches. Responses to one prompt are neighbours."""
        if self._sampler is None:
            raise ValueError(f"{type(self.source).__name__} samples responses, but the feed has no sampler.")
        parts = []
        for index in self._progress(range(batches)) if batches > 1 else range(batches):
            (prompts, indices), by_author = self._take_prompts(), []
            for i, (name, author) in enumerate(self._authors.items()):
                author_params = params if author.params is None else author.params
                key = rollouts.draw_key(self._seed, step, index, i)
                by_author.append(self._sampler.rows(author.model, author_params, prompts, key, name, author.mixture))
            rows = rollouts.concatenate(by_author)
            rows = rollouts.take(rows, np.arange(len(rows["lengths"])).reshape(len(by_author), -1).T.ravel())
            if self._rollout_arrays is not None:
                texts = [response for _, response in self._sampler.text(rows)]
                group_size = self._repeats * len(by_author)
                rows = self._rollout_arrays.with_arrays(rows, np.repeat(indices, len(by_author)), texts, group_size)
            parts.append(rows)
        rows = rollouts.concatenate(parts)
        self.fresh = rollouts.take(rows, np.flatnonzero(rows["origin"] == ORIGINS.index("student")))
        self.report = self._sampler.report(self.fresh)
        return rows

    def _take_prompts(self) -> tuple[list[list[int]], Int[np.ndarray, " M"]]:
        """Returns the prompts for a batch of rows of an author, and the indices of the rows of the prompts.

        Each prompt is repeated `rollouts_per_prompt` times.

        Prompts beyond the batch are stored for the next call.
        """
        count = self._batch_size // self._repeats
        while len(self._waiting) < count:
            self._waiting = self._waiting + _prompts(next(self._batches))
        taken, self._waiting = self._waiting[:count], self._waiting[count:]
        repeated = [entry for entry in taken for _ in range(self._repeats)]
        return [prompt for prompt, _ in repeated], np.array([row for _, row in repeated], np.int32)

    def _own_part(self, rows: Rows) -> Batch:
        """Returns this process's part of the rows as a batch."""
        size = self._batch_size // jax.process_count()
        rows = rollouts.take(rows, slice(jax.process_index() * size, (jax.process_index() + 1) * size))
        further = {} if self._rollout_arrays is None else self._rollout_arrays.of_rollouts(rows)
        return rollouts.as_batch(rows) | further

    def _with_origin(self, batch: Batch, origin: str = "") -> Batch:
        """Returns a batch of the dataset with the origin of its rows."""
        name = origin or (self.source.origins[0] if not self._authors else "data")
        if not self._authors and self._text is None and name == "data":
            return batch  # most runs do not need the origin
        count, length = batch["tokens"].shape
        return batch | {
            "origin": np.full(count, ORIGINS.index(name), np.int32),
            "log_probs": np.zeros((count, length), np.float32),
        }

    def _random(self, step: int, purpose: int) -> np.random.Generator:
        return np.random.default_rng((self._seed, step, purpose))


def _prompts(batch: Batch) -> list[tuple[list[int], int]]:
    """Returns the prompts of the rows of all processes, and the array `row` of the batch, which is -1 if it is missing."""
    tokens, counted = batch["tokens"], batch["loss_mask"]
    arrays = tokens, counted, batch.get("row", np.full(len(tokens), -1, np.int32))
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        # A process has every process_count-th row of each global batch.
        arrays = [
            np.asarray(multihost_utils.process_allgather(array)).swapaxes(0, 1).reshape(-1, *array.shape[1:])
            for array in arrays
        ]
    return [(data.prompt_of(ids, of_row), int(row)) for ids, of_row, row in zip(*arrays, strict=True)]
