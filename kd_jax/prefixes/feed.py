"""The rows of each step: what a prefix source decides, done, with everything that a restart needs."""

import base64
import dataclasses
import zlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from kd_jax import data
from kd_jax.objectives import ORIGINS
from kd_jax.prefixes import Source, rollouts
from kd_jax.prefixes.rollouts import Rows, Sampler

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Author:
    """Who writes responses: a model, and what it is mixed with.

    Attributes:
      model: a `models.Model`.
      params: its parameters; None: those that the step is given.
      mixture: as in `models.generate`.
    """

    model: Any
    params: Any = None
    mixture: Any = None


class Feed:
    """Batches, one a step, out of a dataset and of responses drawn to its prompts.

    A resumed feed gives the batches that it would have given: `get_state` has the datasets' positions, the source's state
    and the rows that are kept.
    """

    def __init__(
        self, source: Source, batches: Any, *, text_batches: Any = None, sampler: Sampler | None = None,
        authors: dict[str, Author] | None = None, total_steps: int, batch_size: int, epoch_batches: int, seed: int,
        rollouts_per_prompt: int = 1, progress: Callable[..., Any] = iter,
    ):  # fmt: skip
        """Assembles; reads nothing.

        Args:
          source: of `kd_jax.prefixes`.
          batches: an iterator of this process's rows of each batch, with `get_state` and `set_state`.
          text_batches: of the second stream's, or None.
          sampler: how responses are drawn; None where the source draws none.
          authors: by origin, those that the source names.
          total_steps: of the run.
          batch_size: rows of a global batch.
          epoch_batches: batches of rows that an author writes in an epoch of the data's prompts.
          seed: of decisions and draws.
          rollouts_per_prompt: responses of each author to each prompt; a batch then has fewer prompts.
          progress: wraps a loop that takes long.
        """
        self.source, self._batches, self._text = source, batches, text_batches
        self._sampler, self._authors = sampler, authors or {}
        self._total, self._batch_size, self._seed = total_steps, batch_size, seed
        self._epoch_batches, self._repeats, self._progress = epoch_batches, rollouts_per_prompt, progress
        self._state = source.init()
        self._store: Rows | None = None
        self._pool_start: int | None = None
        self._waiting: list[list[int]] = []
        self.report: dict[str, float] = {}
        self.fresh: Rows | None = None

    def next(self, step: int, params: Any) -> Batch:
        """This process's rows of the batch of update `step`, which is counted from 0.

        Afterwards `fresh` has the student's rows that were drawn in it, or None, and `report` what is to be said of them.

        Args:
          step: updates made before.
          params: the student's, now.
        """
        self.fresh, self.report = None, {}
        uniform = float(self._random(step, 0).random())
        stored = 0 if self._store is None else len(self._store["lengths"])
        choice = self.source.choose(self._state, step=step, total=self._total, uniform=uniform, stored=stored)
        if choice == "data":
            batch = self._mark(next(self._batches))
        elif choice == "pool":
            batch = self._from_pool(step, params)
        else:
            rows = self._draw(1, params, step) if "fresh" in choice else None
            if rows is not None:
                self._keep(rows)
            batch = self._share(self._replay(step) if rows is None or "replay" in choice else rows)
        if self._authors:
            of_student = float((batch["origin"] == ORIGINS.index("student")).mean())
            self.report |= {"student_rows": of_student} | {k: v for k, v in self._state.items() if v is not None}
        if self._text is None:
            return batch
        text = self._mark(next(self._text), "text")
        return {name: np.concatenate([array, text[name]]) for name, array in batch.items()}

    def observe(self, loss: float) -> None:
        """Tells the source of an evaluation: the cross-entropy of held-out rows."""
        self._state = self.source.observe(self._state, loss)

    def get_state(self) -> dict[str, Any]:
        """All that decides what comes next; JSON can hold it."""
        return {
            "data": self._batches.get_state(),
            "text": None if self._text is None else self._text.get_state(),
            "source": self._state,
            "store": None if self._store is None else {name: _encode(array) for name, array in self._store.items()},
            "pool_start": self._pool_start,
            "waiting": self._waiting,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from where `get_state` was called."""
        self._batches.set_state(state["data"])
        if self._text is not None:
            self._text.set_state(state["text"])
        self._state, self._pool_start, self._waiting = state["source"], state["pool_start"], state["waiting"]
        store = state["store"]
        self._store = None if store is None else {name: _decode(array) for name, array in store.items()}

    def _from_pool(self, step: int, params: Any) -> Batch:
        """A batch of rows that were drawn together, a whole phase's worth at its first step."""
        authors = len(self.source.authors)
        if self._store is None or self._pool_start is None:
            every = self.source.every or self._epoch_batches
            left = -(-(self._total - step) // authors)  # batches of prompts that the rest of the run has a use for
            self._store, self._pool_start = self._draw(min(every, max(1, left)), params, step), step
        batches = len(self._store["lengths"]) // self._batch_size
        epoch, place = divmod(step - self._pool_start, batches)
        # Responses to one prompt lie side by side, and stay so.
        order = self._random(self._pool_start, 1 + epoch).permutation(len(self._store["lengths"]) // authors)
        groups = order[place * self._batch_size // authors : (place + 1) * self._batch_size // authors]
        indices = (groups[:, None] * authors + np.arange(authors)).ravel()
        batch = self._share(rollouts.take(self._store, indices))
        if step + 1 == self._pool_start + batches * self.source.epochs:
            self._store = self._pool_start = None  # used up: nothing for a checkpoint to keep
        return batch

    def _draw(self, batches: int, params: Any, step: int) -> Rows:
        """Each author's response to each prompt of some batches, side by side."""
        if self._sampler is None:
            raise ValueError(f"{type(self.source).__name__} has responses drawn, but the feed was given no sampler.")
        parts = []
        for index in self._progress(range(batches)) if batches > 1 else range(batches):
            prompts, drawn = self._take_prompts(), []
            for i, (name, author) in enumerate(self._authors.items()):
                its_params = params if author.params is None else author.params
                key = rollouts.draw_key(self._seed, step, index, i)
                drawn.append(self._sampler.rows(author.model, its_params, prompts, key, name, author.mixture))
            rows = rollouts.concatenate(drawn)
            parts.append(rollouts.take(rows, np.arange(len(rows["lengths"])).reshape(len(drawn), -1).T.ravel()))
        rows = rollouts.concatenate(parts)
        self.fresh = rollouts.take(rows, np.flatnonzero(rows["origin"] == ORIGINS.index("student")))
        self.report = self._sampler.report(self.fresh)
        return rows

    def _take_prompts(self) -> list[list[int]]:
        """Prompts for a batch of rows an author, each as often as it is answered; those that are over wait."""
        count = self._batch_size // self._repeats
        while len(self._waiting) < count:
            self._waiting = self._waiting + _prompts(next(self._batches))
        some, self._waiting = self._waiting[:count], self._waiting[count:]
        return [prompt for prompt in some for _ in range(self._repeats)]

    def _keep(self, rows: Rows) -> None:
        if self.source.capacity:
            both = rows if self._store is None else rollouts.concatenate([self._store, rows])
            self._store = rollouts.take(both, slice(-self.source.capacity, None))

    def _replay(self, step: int) -> Rows:
        if self._store is None:
            raise ValueError(f"{type(self.source).__name__} replays at step {step}, before anything was drawn.")
        stored = len(self._store["lengths"])
        random = self._random(step, 1)
        return rollouts.take(self._store, random.choice(stored, self._batch_size, replace=stored < self._batch_size))

    def _share(self, rows: Rows) -> Batch:
        """This process's part of the rows, as a batch."""
        size = self._batch_size // jax.process_count()
        return rollouts.as_batch(
            rollouts.take(rows, slice(jax.process_index() * size, (jax.process_index() + 1) * size))
        )

    def _mark(self, batch: Batch, origin: str = "") -> Batch:
        """A dataset's batch with its origin; a source without authors has only one."""
        name = origin or (self.source.origins[0] if not self._authors else "data")
        if not self._authors and self._text is None and name == "data":
            return batch  # as it came: what most runs need
        count, length = batch["tokens"].shape
        return batch | {
            "origin": np.full(count, ORIGINS.index(name), np.int32),
            "log_probs": np.zeros((count, length), np.float32),
        }

    def _random(self, step: int, purpose: int) -> np.random.Generator:
        return np.random.default_rng((self._seed, step, purpose))


def _prompts(batch: Batch) -> list[list[int]]:
    """The prompts of a batch, of all processes' rows."""
    tokens, counted = batch["tokens"], batch["loss_mask"]
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        # Of each global batch a process has every process_count-th row.
        tokens, counted = (
            np.asarray(multihost_utils.process_allgather(array)).swapaxes(0, 1).reshape(-1, array.shape[1])
            for array in (tokens, counted)
        )
    return [data.prompt_of(*row) for row in zip(tokens, counted, strict=True)]


def _encode(array: np.ndarray) -> dict[str, Any]:
    content = base64.b64encode(zlib.compress(array.tobytes())).decode()
    return {"dtype": array.dtype.str, "shape": array.shape, "zlib": content}


def _decode(saved: dict[str, Any]) -> np.ndarray:
    content = zlib.decompress(base64.b64decode(saved["zlib"]))
    return np.frombuffer(content, saved["dtype"]).reshape(saved["shape"]).copy()
