"""The sources of the text on which the two models are compared. A source decides step by step where the rows come from.

A source holds no rows. `kd_jax.prefixes.feed` asks the source for a plan, and saves the state of the source with each
checkpoint, so JSON must be able to hold the state. Random decisions depend only on the seed and the step, so all
processes decide alike.
"""

import enum
from typing import Protocol

import jax.numpy as jnp

from kd_jax import schedules
from kd_jax.resolve import Spec, build, check_fraction, check_number
from kd_jax.storage.files import Json

__all__ = ["adaptive", "data", "mixture", "paired", "student", "teacher"]

State = Json


class Plan(enum.StrEnum):
    """The origin of the rows of a step.

    Attributes:
      DATA: a batch of the dataset.
      FRESH: responses that are sampled now.
      REPLAY: rows of the replay buffer.
      FRESH_THEN_REPLAY: rows of the replay buffer, after responses that are sampled now have been added.
      POOL: rows of a pool, which are sampled together for several steps.
    """

    DATA = "data"
    FRESH = "fresh"
    REPLAY = "replay"
    FRESH_THEN_REPLAY = "fresh, then replay"
    POOL = "pool"


class Source(Protocol):
    """The protocol of all sources.

    Attributes:
      origins: the possible origins of the rows, from `objectives.ORIGINS`.
      authors: the models that answer a prompt when rows are sampled; () if no rows are sampled.
      capacity: the number of sampled rows in the replay buffer; 0 for no buffer.
      every: for `Plan.POOL`, the number of batches of prompts that are answered at a time; 0 for one epoch.
      epochs: for `Plan.POOL`, the number of passes over the rows of a pool.
    """

    origins: tuple[str, ...]
    authors: tuple[str, ...]
    capacity: int
    every: int
    epochs: int

    def init(self) -> State:
        """Returns the state before the first step."""
        ...

    def choose(self, state: State, *, step: int, total: int, uniform: float, stored: int) -> Plan:
        """Returns the origin of the rows of update `step`. Steps are counted from 0.

        Args:
          state: the state from `init` or `observe`.
          step: the number of updates so far.
          total: the number of updates of the run.
          uniform: the random number of this step, in [0, 1).
          stored: the number of rows in the replay buffer.

        Raises:
          ValueError: a schedule returns a number that is not a probability.
        """
        ...

    def observe(self, state: State, loss: float) -> State:
        """Returns the state after an evaluation whose held-out cross-entropy is `loss`, in nats per token."""
        ...


class _Plain:
    """A source that always uses the dataset. The sources below override some of the methods."""

    origins: tuple[str, ...] = ()
    authors: tuple[str, ...] = ()
    capacity, every, epochs = 0, 1, 1

    def init(self) -> State:
        return {}

    def choose(self, state: State, *, step: int, total: int, uniform: float, stored: int) -> Plan:
        return Plan.DATA

    def observe(self, state: State, loss: float) -> State:
        return state


class data(_Plain):
    """The responses of the dataset, as in off-policy distillation."""

    origins = ("data",)


class teacher(_Plain):
    """The teacher's responses to the prompts of the dataset, written once before training: sequence-level distillation.

    The responses are stored as a dataset. The name of the dataset identifies the model and the settings of the
    responses, so later runs use the dataset again. Responses that do not end within `sampling.max_new_tokens` are
    omitted.

    Args:
      num_rows: the number of prompts that are answered, from the first on; 0 for all.
      seed: the seed of the responses. It is not the seed of the run, so that runs with several seeds learn from the
        same text.

    References:
      Kim and Rush, "Sequence-Level Knowledge Distillation", https://arxiv.org/abs/1606.07947, 2016.
    """

    origins = ("teacher",)

    def __init__(self, num_rows: int = 0, seed: int = 0):
        self.num_rows = int(check_number("num_rows", num_rows, low=0))
        self.seed = int(check_number("seed", seed, low=0))


class student(_Plain):
    """The student's own responses to the prompts of the dataset, as in on-policy distillation.

    The source samples `every` batches of rows from the same student, and then trains on them for `every` x `epochs`
    steps.

    Args:
      every: the number of batches of rows that are sampled at a time.
      epochs: the number of passes over these rows before new rows are sampled.

    References:
      Agarwal et al., "On-Policy Distillation of Language Models", https://arxiv.org/abs/2306.13649, 2024; Gu et al.,
      "MiniLLM", https://arxiv.org/abs/2306.08543, 2024, whose code samples 256 rows at a time and passes over them 4 times.
    """

    origins = ("student",)
    authors = ("student",)

    def __init__(self, every: int = 1, epochs: int = 1):
        self.every = int(check_number("every", every, low=1))
        self.epochs = int(check_number("epochs", epochs, low=1))

    def choose(self, state: State, *, step: int, total: int, uniform: float, stored: int) -> Plan:
        return Plan.POOL


class paired(_Plain):
    """A response of the teacher and a response of the student to each prompt, next to each other in a batch.

    Args:
      every: the number of batches of prompts that are answered at a time; 0 for one epoch. Each batch of prompts gives
        two batches of rows.
      epochs: the number of passes over these rows before new rows are sampled.

    References:
      Ko et al., "DistiLLM-2", https://arxiv.org/abs/2503.07067, 2025.
    """

    origins = ("teacher", "student")
    authors = ("teacher", "student")

    def __init__(self, every: int = 0, epochs: int = 1):
        self.every = int(check_number("every", every, low=0))
        self.epochs = int(check_number("epochs", epochs, low=1))

    def choose(self, state: State, *, step: int, total: int, uniform: float, stored: int) -> Plan:
        return Plan.POOL


class mixture(_Plain):
    """The student's responses, sampled now, with probability `fraction`, and otherwise the responses of the dataset.

    The decision is made for a whole batch.

    Args:
      fraction: a number in [0, 1], or the spec of a schedule.

    References:
      The fraction is GKD's lambda: Agarwal et al., https://arxiv.org/abs/2306.13649, 2024. Lin et al., "Autoregressive Knowledge
      Distillation through Imitation Learning", https://arxiv.org/abs/2009.07253, 2020, lowers the share of the dataset.
    """

    origins = ("data", "student")
    authors = ("student",)

    def __init__(self, fraction: float | Spec = 0.5):
        if isinstance(fraction, int | float):
            check_fraction("fraction", fraction)
            if fraction == 1:
                self.origins = ("student",)
            if fraction == 0:
                self.origins, self.authors = ("data",), ()
        self.fraction = schedules.as_stateful(
            fraction if isinstance(fraction, int | float) else build(fraction, schedules)
        )
        if self.fraction.init() != ():
            raise ValueError(
                f"fraction={fraction!r} follows the loss, but a fraction needs a schedule of the step alone."
            )

    def choose(self, state: State, *, step: int, total: int, uniform: float, stored: int) -> Plan:
        fraction = check_number("fraction", float(jnp.float32(self.fraction((), step=jnp.asarray(step)))), 0.0, 1.0)
        return Plan.FRESH if uniform < fraction else Plan.DATA


class adaptive(_Plain):
    """Student responses from a replay buffer, used more often when the held-out loss rises.

    With probability `threshold`, a step trains on student responses from the buffer. With probability
    `threshold (1 - k / total)`, step k first samples responses and adds them to the buffer; k counts from 1. While the
    buffer is empty, every step that trains on student responses samples first. If the loss of an evaluation exceeds the
    loss of the evaluation before by `tolerance` or more, `threshold` increases by `increase`.

    Args:
      threshold: the threshold before the first evaluation, in [0, 1].
      increase: the increase of the threshold.
      tolerance: the smallest rise of the held-out cross-entropy, in nats, that raises the threshold.
      capacity: the number of rows in the buffer; the oldest rows are dropped.
      fresh: the share of steps that sample, as a function of k: decreasing (1 - k / total), constant (a half) or
        increasing (k / total).
      as_published: True for three details of the published code. A step that samples trains on the sampled rows
        themselves. Steps sample until the buffer is full. The loss is compared with the loss of the last increase; before
        the first increase, with the loss before training.

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

    def choose(self, state: State, *, step: int, total: int, uniform: float, stored: int) -> Plan:
        done = (step + 1) / total
        share = {"decreasing": 1 - done, "constant": 0.5, "increasing": done}[self.fresh]
        filling = stored < self.capacity if self.as_published else stored == 0
        if uniform < state["threshold"] * share or (uniform < state["threshold"] and filling):
            return Plan.FRESH if self.as_published else Plan.FRESH_THEN_REPLAY
        return Plan.REPLAY if uniform < state["threshold"] else Plan.DATA

    def observe(self, state: State, loss: float) -> State:
        reference = state["reference"]
        if reference is None:
            return state | {"reference": loss}
        rises = loss >= reference + self.tolerance
        threshold = min(state["threshold"] + self.increase, 1.0) if rises else state["threshold"]
        return {"threshold": threshold, "reference": reference if self.as_published and not rises else loss}
