"""Trains a student from a config: `build` assembles a run without training, and `train` runs the training loop."""

import contextlib
import dataclasses
import json

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from kd_jax import metrics, sharding, storage
from kd_jax.run import Run, build, hub_names, identity, push, quantisation, results, summary
from kd_jax.settings import Settings
from kd_jax.storage import checkpoint, directory, remote
from kd_jax.storage.files import Json
from kd_jax.train import loop
from kd_jax.train_step import TrainState

__all__ = ["Run", "build", "train"]


def train(config: ConfigDict | Settings, workdir: str, quiet: bool = False) -> Json:
    """Trains and evaluates a student, and writes all results to `workdir`.

    The results are metrics, checkpoints, a report page, plots, samples and the student's folder. A second call on the
    same directory resumes the run, with the numbers of an uninterrupted run. On another mesh or another number of hosts
    the numbers are equal up to rounding.

    Args:
      config: a config with the keys of `kd_jax.settings`.
      workdir: the run's folder, a path or an address such as gs://bucket/run; created if the folder does not exist.
      quiet: whether to print only warnings and errors.

    Returns:
      The dict of `results.finish`: {"teacher": ..., "before": ..., "after": ...}, each a result of `Run.evaluate`.

    Raises:
      ValueError: the config is wrong; the directory is in use, or belongs to another config or to other contents of the
        files that the config names (see `run.identity`); nothing is written then. Or all checkpoints are damaged.
      ConnectionError: a model or a dataset of the hub cannot be downloaded; nothing is written then. Or the upload of the
        finished student failed; all results are written then, and a second call uploads again.
      FloatingPointError: a loss or a gradient is not finite.
      loop.Stopped: SIGTERM or a preemption notice arrived, and the state is saved, or there was nothing to save.
      loop.Interrupted: a KeyboardInterrupt; Ctrl-C was pressed, and the state is saved, or there was nothing to save.
    """
    resolved, first = config.to_dict(), jax.process_index() == 0
    with storage.room(workdir), loop.Notices() as notices, contextlib.ExitStack() as stack:
        copied = remote.work_directory(workdir, jax.process_count(), writes=first)
        workdir, place = stack.enter_context(copied)  # for an address, `workdir` is now a local folder
        # No process reads the folder before the first process has the copy.
        sharding.barrier("the work directory is copied")
        stack.enter_context(notices.raising())  # this block ends before the last copy to the address
        exists = epath.Path(workdir).is_dir()
        directory.check(workdir, resolved)  # checked first, so that no lock file is left in a folder of another program
        if first and exists:
            stack.enter_context(directory.alone(workdir))  # the lock is taken before any slow work
            directory.check(workdir, resolved)
        settings = Settings.parse(config)
        metrics.check_wandb(settings.log.wandb)
        push.check(settings)
        identity.check(workdir, settings)  # checked before anything is built from changed contents
        run = build(config)
        # This check includes the teacher's responses, which `build` has read or sampled.
        identity.check(workdir, settings, run.written)
        if first and not exists:
            stack.enter_context(directory.alone(workdir))
            directory.check(workdir, resolved)  # another process may have made the folder since the first check
        rounding = quantisation.error(run)
        # A new run reads its student before it writes anything. A resumed run needs no initial state.
        state = None if checkpoint.has_steps(place.shared) else run.init_state()
        if first:
            directory.write_config(workdir, resolved)
            identity.write(workdir, settings, run.written)
            if rounding:
                storage.write_whole(epath.Path(workdir) / quantisation.FILE, json.dumps(rounding) + "\n")
        place.store()  # the config must be stored before the checkpoints that belong to it
        manager = stack.enter_context(checkpoint.open_manager(place.shared, settings.keep_checkpoints))
        if state is None:
            state, damaged = checkpoint.restore(manager, run.abstract_state, run.feed)
            state = _allowed(state, settings.max_skipped)
            for line in damaged:
                metrics.tqdm.write(
                    f"{line}; the checkpoint is renamed, and the run resumes from step {int(state.step)}."
                )
        if first and not quiet:
            metrics.tqdm.write("\n".join([summary.of(run, state), *hub_names.lines(settings), *summary.too_long(run)]))
            if rounding:
                metrics.tqdm.write(quantisation.sentence(rounding))
        wandb_run = metrics.open_wandb(settings.log.wandb, workdir, resolved) if first else None
        with metrics.Writer(workdir, int(state.step), silent=not first, wandb_run=wandb_run) as writer:
            state = loop.run_steps(run, state, workdir, writer, manager, notices, quiet, place)
        result = results.finish(run, state.params, workdir, quiet)
        if settings.push:
            place.store()  # an upload that fails must lose nothing
            url = push.push(settings, workdir)
            if first and not quiet:
                metrics.tqdm.write(f"uploaded the student to {url}")
        return result


def _allowed(state: TrainState, max_skipped: int) -> TrainState:
    """Returns a restored state whose count of skipped steps is at most `max_skipped`, which may be lower than before.

    Then only a new non-finite step can exceed the limit.
    """
    skipped = np.int32(min(int(state.skipped), max_skipped))
    return dataclasses.replace(state, skipped=jax.device_put(skipped, state.skipped.sharding))
