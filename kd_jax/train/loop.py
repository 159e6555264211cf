"""The training loop: steps, reads of the metrics, evaluations, checkpoints, and early ends of the run."""

import contextlib
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Self

import jax
import numpy as np
from jax.experimental import multihost_utils

from kd_jax import command, metrics
from kd_jax.prefixes import rollouts
from kd_jax.run import Run, nonfinite, results, speed
from kd_jax.run.rows import show
from kd_jax.storage import checkpoint, remote
from kd_jax.train_step import Metrics, TrainState

STOPPED = 75  # the exit code EX_TEMPFAIL of sysexits.h: a temporary end, after which the call can be repeated
# Steps whose metrics are not read yet: step, metrics on the devices, this process's rows of the batch.
Pending = list[tuple[int, Metrics, dict[str, np.ndarray]]]


Handler = Callable[[int, FrameType | None], object] | int | None  # of a signal


class Stopped(SystemExit):
    """Signals that SIGTERM or a preemption notice arrived. The same call resumes the run.

    If the exception is not caught, Python exits with code 75.

    Attributes:
      step: the step that was saved for this end; None if there was nothing to save.
    """

    def __init__(self, step: int | None = None):
        super().__init__(STOPPED)
        self.step = step


class Interrupted(KeyboardInterrupt):
    """Signals that Ctrl-C was pressed, or a notebook was interrupted. The same call resumes the run.

    Attributes:
      step: the step that was saved for this end; None if there was nothing to save.
    """

    def __init__(self, step: int | None = None):
        super().__init__(
            "there was nothing to save" if step is None else f"step {step} is saved; the same call resumes the run"
        )
        self.step = step


class Notices:
    """Handles SIGTERM and Ctrl-C inside a `with` statement. Each of these signals is a notice that the run should end.

    While steps are made, a notice is only recorded, and the loop stops after the current step. Before and after the
    steps, a notice raises an exception at once. With several processes, JAX's own service handles SIGTERM: the processes
    agree on the step after which they stop. The first Ctrl-C sends SIGTERM to that service. A second Ctrl-C raises at once.
    """

    def __init__(self) -> None:
        self._noticed = self._interrupted = self._raises = False
        self._previous_handlers: dict[int, Handler] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread only
            return self
        if not jax.distributed.is_initialized():
            self._previous_handlers[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._notice)
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # SIGINT is ignored in a background job
            self._previous_handlers[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def raising(self, raises: bool = True) -> Iterator[None]:
        """Decides what a notice does inside a block.

        With `raises=True` a notice raises `Stopped` or `Interrupted` at once, also a notice from before the block. With
        `raises=False` a notice waits until the block ends.
        """
        before, self._raises = self._raises, raises
        self._raise()
        try:
            yield
        except BaseException:
            self._raises = False  # no notice may disturb the closing and the copying that follow
            raise
        self._raises = before
        self._raise()

    def should_stop(self, step: int) -> bool:
        """Returns whether the run should stop after a step."""
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(step)
        return self._noticed

    def exception(self, step: int | None = None) -> Stopped | Interrupted:
        """Returns the exception to raise after the step is saved."""
        return Interrupted(step) if self._interrupted else Stopped(step)

    def _notice(self, *_: object) -> None:
        self._noticed = True
        self._raise()

    def _interrupt(self, *_: object) -> None:
        if self._interrupted and command.watched():
            return  # `command.second_interrupt` ends the process
        if self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True
        if not self._raises:
            # The handler must not call print, because the main thread may be inside print.
            os.write(2, b"\nkd_jax: interrupted; the step is finished and saved. Ctrl-C again stops at once.\n")
            if jax.distributed.is_initialized():
                os.kill(os.getpid(), signal.SIGTERM)
        self._notice()

    def _raise(self) -> None:
        if self._noticed and self._raises:
            self._raises = False  # raised only once: no notice may disturb the cleanup
            raise self.exception()


def run_steps(
    run: Run, state: TrainState, workdir: str, writer: metrics.Writer, manager: checkpoint.Manager, notices: Notices,
    quiet: bool, place: remote.Place,
) -> TrainState:  # fmt: skip
    """Runs all steps after `state`.

    The checkpoint of a step is saved before the evaluation of the step, so that a notice does not have to wait for an
    evaluation. A resumed run first makes the evaluation of its checkpoint's step.

    Args:
      run: a `run.Run`.
      state: the state, with the number of steps made.
      workdir: the work directory of the run.
      writer: the writer of the metrics.
      manager: the manager of the checkpoints.
      notices: the caller's notices; in this function the notices wait for the end of a step.
      quiet: whether to omit the progress bar.
      place: the folder or address that the user gave, to which `workdir` is copied.

    Returns:
      The state after the last step, which is saved.

    Raises:
      OSError: a checkpoint, or a file that belongs to it, could not be written.
      FloatingPointError: a loss or a gradient is not finite, after more than `max_skipped` such steps in a row.
      Stopped: SIGTERM or a preemption notice arrived on any host; the state is saved.
      Interrupted: Ctrl-C was pressed; the state is saved.
    """
    config, start = run.config, int(state.step)
    evaluates = lambda step: step % config.eval_every == 0 or step == config.steps
    if evaluates(start):
        _evaluate(run, writer, start, state)
    if start == 0:
        results.begin(run, state.params, workdir)
    profiled = tuple(config.profile_steps) if start < min(config.profile_steps, default=0) else ()
    pending: Pending = []
    needs_teacher = any(term.needs_teacher for term in run.terms)
    clock = speed.Clock(run.models.student, run.models.teacher if needs_teacher else None, config.data.max_length)
    last_shown, bar = 0, metrics.progress(0, 0, quiet=True)
    with notices.raising(False), contextlib.ExitStack() as stack:
        for step in range(start + 1, config.steps + 1):
            if step in profiled[:1]:
                jax.profiler.start_trace(str(Path(workdir) / "profile"))
            if step == start + 1 and not quiet and jax.process_index() == 0:
                metrics.tqdm.write("compiling the training step …")
            rows = run.feed.next(step - 1, run.models.complete(state.params))
            state, sums = run.train_step(state, run.models.frozen_params, run.put(rows))
            if step == start + 1:  # the clock of the bar starts after the compilation
                jax.block_until_ready(sums)
                bar = stack.enter_context(metrics.progress(config.steps, start, quiet))
            pending.append((step, sums, rows))
            last_shown = _report_samples(run, writer, step, last_shown)
            if step in profiled[1:]:
                jax.block_until_ready(state)
                jax.profiler.stop_trace()
            stopping, evaluating = notices.should_stop(step), evaluates(step)
            saving = step % config.checkpoint_every == 0 or step == config.steps or stopping
            # The metrics of this step are read later, because the step still runs. Before a save or an evaluation all
            # metrics are read.
            unread = 0 if evaluating or saving else 1
            if len(pending) > config.log_every or unread == 0:
                ready, pending = pending[: len(pending) - unread], pending[len(pending) - unread :]
                lap = clock.lap(_read(run, writer, ready, state, workdir, place))
                writer.write(ready[-1][0], "speed", lap)
                loss = {"loss": f"{float(ready[-1][1]['loss'][0]):.4f}"}
                bar.set_postfix(loss | {name: f"{value:,.4g}" for name, value in lap.items()})
            bar.update()
            if saving:
                place.store()  # copied before the checkpoint, so that metrics.jsonl has all steps of the checkpoint
                checkpoint.save(manager, step, state, run.feed)
            if stopping:
                checkpoint.wait(manager)
                raise notices.exception(step)
            if evaluating:
                _evaluate(run, writer, step, state)
            if evaluating or saving:
                clock.restart()
    checkpoint.wait(manager)
    return state


def _evaluate(run: Run, writer: metrics.Writer, step: int, state: TrainState) -> None:
    values = run.evaluate(state.params, run.teacher_params(state))
    run.feed.observe(values["cross_entropy"])
    writer.write(step, "eval", values)


def _report_samples(run: Run, writer: metrics.Writer, step: int, last_shown: int) -> int:
    """Writes the report on a step's rows, and prints new responses `show_every` steps after `last_shown`.

    Returns the last step whose responses were printed.
    """
    if run.feed.report:
        writer.write(step, "samples", run.feed.report)
    every = run.config.sampling.show_every
    if not every or run.feed.fresh is None or (last_shown and step < last_shown + every):
        return last_shown
    sampler = rollouts.make_sampler(run.mesh, run.tokenizer, run.config.data.max_length, run.config.sampling)
    metrics.tqdm.write(show(sampler, step, run.feed.fresh))
    return step


def _read(
    run: Run, writer: metrics.Writer, steps: Pending, state: TrainState, workdir: str, place: remote.Place
) -> float:
    """Writes the metrics of the steps, and returns the number of tokens in these steps."""
    tokens = 0.0
    for step, sums, rows in steps:
        values = metrics.averages(jax.device_get(sums))
        skipped = values.pop("skipped")
        if skipped > run.config.max_skipped:
            # Metrics are read some steps late. The later steps did not change the state, so it is the state before the bad step.
            nonfinite.stop(run, state, step, rows, values, workdir, place)
        tokens += values["tokens"]
        values |= {"learning_rate": float(np.asarray(run.learning_rate(step - 1)))}
        if skipped:
            values = {name: value for name, value in values.items() if math.isfinite(value)} | {"skipped": skipped}
        writer.write(step, "train", values)
    return tokens
