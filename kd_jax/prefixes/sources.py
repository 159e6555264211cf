"""Whose text the two models are compared on: a source decides, step by step, where the rows come from.

A source is small and has no rows itself: `kd_jax.prefixes.feed` asks it what to do and keeps its state, which JSON can hold, with the
checkpoint. Whatever is decided by chance is decided from the seed and the step, the same on every process.
"""

from typing import Any, Protocol

import jax.numpy as jnp

from kd_jax import schedules
from kd_jax.resolve import build, check_fraction, check_number

__all__ = ["adaptive", "data", "mixture", "paired", "student", "teacher"]

State = dict[str, Any]


class Source(Protocol):
    """What all sources have.

    Attributes:
      origins: whose rows it may give, out of `objectives.ORIGINS`.
      authors: who answers a prompt when rows are drawn; () where none are.
      capacity: how many drawn rows are kept for later; 0: none.
      every, epochs: where it chooses 'pool': batches of prompts that are answered at a time, 0 for an epoch's, and how often
        the rows are gone over.
    """

    origins: tuple[str, ...]
    authors: tuple[str, ...]
    capacity: int
    every: int
    epochs: int

    def init(self) -> State:
        """The state before the first step."""
        ...

    def choose(self, state: State, *, step: int, total: int, uniform: float, stored: int) -> str:
        """What step `step` (from 0) of `total` trains on.

        Args:
          state: from `init` or `observe`.
          step: updates made.
          total: updates of the run.
          uniform: this step's random number in [0, 1).
          stored: how many rows are kept.

        Returns:
          'data'; 'fresh': rows drawn now; 'replay': rows that are kept; 'fresh, then replay': of those that are kept, after
          some were drawn now and joined them; or 'pool': rows drawn together for several steps.

        Raises:
          ValueError: where a schedule gives what is no probability.
        """
        ...

    def observe(self, state: State, loss: float) -> State:
        """The state after an evaluation, from the held-out rows' cross-entropy."""
        ...


class _Plain:
    origins: tuple[str, ...] = ()
    authors: tuple[str, ...] = ()
    capacity, every, epochs = 0, 1, 1

    def init(self) -> State:
        return {}

    def choose(self, state: State, *, step: int, total: int, uniform: float, stored: int) -> str:
        return "data"

    def observe(self, state: State, loss: float) -> State:
        return state


class data(_Plain):
    """The dataset's responses: off-policy distillation."""

    origins = ("data",)


class teacher(_Plain):
    """Responses that the teacher wrote once, before training, to the dataset's prompts: sequence-level distillation.

    They are kept as a dataset beside the others, with what they were made from in its name, and used again by the next
    run. A response that has not ended within `sampling.max_new_tokens` is left out.

    Args:
      num_rows: of the dataset's prompts, the first so many; 0: all.
      seed: of what it writes, which is not the run's: runs of several seeds learn from one text.

    References:
      Kim and Rush, "Sequence-Level Knowledge Distillation", https://arxiv.org/abs/1606.07947, 2016.
    """

    origins = ("teacher",)

    def __init__(self, num_rows: int = 0, seed: int = 0):
        self.num_rows = int(check_number("num_rows", num_rows, low=0))
        self.seed = int(check_number("seed", seed, low=0))


class student(_Plain):
    """The student's own responses to the dataset's prompts: on-policy.

    Args:
      every: steps' worth of rows that are drawn at a time, from one student.
      epochs: how often those rows are gone over before new ones are drawn.

    References:
      Agarwal et al., "On-Policy Distillation of Language Models", https://arxiv.org/abs/2306.13649, 2024; Gu et al.,
      "MiniLLM", https://arxiv.org/abs/2306.08543, 2024, whose code draws 256 rows at a time and goes over them 4 times.
    """

    origins = ("student",)
    authors = ("student",)

    def __init__(self, every: int = 1, epochs: int = 1):
        self.every = int(check_number("every", every, low=1))
        self.epochs = int(check_number("epochs", epochs, low=1))

    def choose(self, state: State, *, step: int, total: int, uniform: float, stored: int) -> str:
        return "pool"


class paired(_Plain):
    """A teacher's and a student's response to each prompt, side by side in a batch, drawn anew every so often.

    Args:
      every: batches of prompts that are answered at a time; 0: an epoch's. Each gives two batches of rows.
      epochs: how often those rows are gone over before new ones are drawn.

    References:
      Ko et al., "DistiLLM-2", https://arxiv.org/abs/2503.07067, 2025.
    """

    origins = ("teacher", "student")
    authors = ("teacher", "student")

    def __init__(self, every: int = 0, epochs: int = 1):
        self.every = int(check_number("every", every, low=0))
        self.epochs = int(check_number("epochs", epochs, low=1))

    def choose(self, state: State, *, step: int, total: int, uniform: float, stored: int) -> str:
        return "pool"


class mixture(_Plain):
    """With probability `fraction` the student's responses, drawn now, otherwise the data's: decided for a whole batch.

    Args:
      fraction: in [0, 1], or the spec of a schedule.

    References:
      GKD's lambda: Agarwal et al., https://arxiv.org/abs/2306.13649, 2024. Lin et al., "Autoregressive Knowledge
      Distillation through Imitation Learning", https://arxiv.org/abs/2009.07253, 2020, lowers the data's share.
    """

    origins = ("data", "student")
    authors = ("student",)

    def __init__(self, fraction: Any = 0.5):
        if isinstance(fraction, int | float):
            check_fraction("fraction", fraction)
            if fraction == 1:
                self.origins = ("student",)
            if fraction == 0:
                self.origins, self.authors = ("data",), ()
        else:
            fraction = build(fraction, schedules)
        self.fraction: Any = schedules.as_stateful(fraction)
        if self.fraction.init() != ():
            raise ValueError("fraction needs a schedule of the step alone.")

    def choose(self, state: State, *, step: int, total: int, uniform: float, stored: int) -> str:
        fraction = check_number("fraction", float(jnp.float32(self.fraction((), step=jnp.asarray(step)))), 0.0, 1.0)
        return "fresh" if uniform < fraction else "data"


class adaptive(_Plain):
    """The student's responses with a probability that rises whenever the held-out loss does; most out of a buffer.

    With probability `threshold` a step trains on the student's responses. With probability `threshold (1 - k / total)` in
    the k-th step fresh ones are drawn first and put into the buffer, which is what the step's rows are then drawn from.
    After an evaluation whose loss is higher than the last one's by `tolerance` or more, `threshold` rises by `increase`.

    Args:
      threshold: at first, in [0, 1].
      increase: what it rises by.
      tolerance: how much the held-out cross-entropy may grow, in nats.
      capacity: rows of the buffer; the oldest give way.
      fresh: how the share of steps that draw goes with k: decreasing, constant (a half) or increasing (k / total).
      as_published: as the published code has it: a fresh batch is trained on itself, fresh rows are drawn until the buffer is
        full, and the loss compared with is that of the last rise (at first, that before training).

    References:
      Ko et al., "DistiLLM", https://arxiv.org/abs/2402.03898, 2024, algorithm 1.
    """

    origins = ("data", "student")
    authors = ("student",)

    def __init__(
        self, threshold: float = 0.0, increase: float = 0.1, tolerance: float = 0.1, capacity: int = 1000,
        fresh: str = "decreasing", as_published: bool = False,
    ):  # fmt: skip
        self.threshold = check_number("threshold", threshold, 0.0, 1.0)
        self.increase = check_number("increase", increase, 0.0, 1.0)
        self.tolerance = check_number("tolerance", tolerance, 0.0)
        self.capacity = int(check_number("capacity", capacity, low=1))
        if fresh not in ("decreasing", "constant", "increasing"):
            raise ValueError(f"fresh={fresh!r} is not one of decreasing, constant, increasing.")
        self.fresh, self.as_published = fresh, as_published

    def init(self) -> State:
        return {"threshold": self.threshold, "reference": None}

    def choose(self, state: State, *, step: int, total: int, uniform: float, stored: int) -> str:
        done = (step + 1) / total
        share = {"decreasing": 1 - done, "constant": 0.5, "increasing": done}[self.fresh]
        filling = stored < self.capacity if self.as_published else stored == 0
        if uniform < state["threshold"] * share or (uniform < state["threshold"] and filling):
            return "fresh" if self.as_published else "fresh, then replay"
        return "replay" if uniform < state["threshold"] else "data"

    def observe(self, state: State, loss: float) -> State:
        reference = state["reference"]
        if reference is None:
            return state | {"reference": loss}
        rises = loss >= reference + self.tolerance
        threshold = min(state["threshold"] + self.increase, 1.0) if rises else state["threshold"]
        return {"threshold": threshold, "reference": reference if self.as_published and not rises else loss}
