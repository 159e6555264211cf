"""Saves a step with a non-finite loss or gradient, and names the rows and terms that cause it."""

import json
import math
import shutil
from pathlib import Path
from typing import NoReturn

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from kd_jax import metrics, sharding, storage
from kd_jax.run.build import Run
from kd_jax.storage import checkpoint, remote
from kd_jax.storage.files import Json
from kd_jax.train_step import TrainState

FOLDER, STATE, BATCH, REPORT = "nonfinite", "state", "batch.npz", "report.json"
BadRows = list[Json]  # the result of `diagnose`


def stop(
    run: Run, state: TrainState, step: int, rows: dict[str, np.ndarray], values: dict[str, float], workdir: str,
    place: remote.Place,
) -> NoReturn:  # fmt: skip
    """Saves the state and the batch for `kd_jax.replay`, and raises an error.

    Args:
      run: a `Run`.
      state: the state before the step, which the step did not change: see `train_step.make_train_step`.
      step: the number of the update, counted from 1.
      rows: this process's rows of the step's batch.
      values: the metrics of the step.
      workdir: the work directory; if it stands for an address, each process has a directory of its own.
      place: the place that the work directory stands for, in which all processes save the state together.

    Raises:
      FloatingPointError: always; the message has the step, the losses of the terms, and the non-finite rows.
    """
    batch, first, name = _all_rows(rows), jax.process_index() == 0, f"{FOLDER}/step_{step}"
    folder = Path(workdir) / name
    if first:
        shutil.rmtree(folder, ignore_errors=True)  # an earlier call may have stopped at the same step
        folder.mkdir(parents=True)
        np.savez(folder / BATCH, allow_pickle=False, **batch)
    sharding.barrier("the folder of the non-finite step exists")
    checkpoint.save_state(epath.Path(place.shared) / name / STATE, state)
    bad_rows = diagnose(run, state, batch)
    if first:
        report = {"step": step, "values": {k: str(v) for k, v in values.items()}, "rows": bad_rows}
        # The report is written last: a folder with a report is complete.
        storage.write_whole(folder / REPORT, json.dumps(report, indent=2) + "\n")
    terms = ", ".join(f"{name}={value:g}" for name, value in values.items() if "/loss" in name)
    raise FloatingPointError(
        f"at step {step} the loss is {values['loss']} and the gradient's norm is {values['gradient_norm']}. The losses of the "
        f"terms are {terms}. {wrong_weights(run, values)}{sentence(bad_rows, len(batch['tokens']))} "
        f"The batch of the step and the state before the step are in "
        f"{place.url}/{name}, and python -m kd_jax.replay --workdir={place.url} repeats the step. To skip non-finite steps, at "
        f"most N in a row, call again with --config.max_skipped=N: the run resumes from the last checkpoint."
    )


def diagnose(run: Run, state: TrainState, batch: dict[str, np.ndarray]) -> BadRows:
    """Returns the rows of a batch that, counted alone, give a non-finite loss or gradient.

    The compiled step of the run is called once for each row, with all other rows masked.

    Args:
      run: a `Run`.
      state: a state that no step changes any more, as in `stop`; the state is donated.
      batch: the global batch.

    Returns:
      A dict for each of these rows: the index `row`, gradient_norm, and the loss of each term. Numbers that are not
      finite are texts.
    """
    bad_rows: BadRows = []
    size, index = len(batch["tokens"]) // jax.process_count(), jax.process_index()
    for row in range(len(batch["tokens"])):
        counted = batch["loss_mask"] & (np.arange(len(batch["tokens"])) == row)[:, None]
        if not counted.any():
            continue
        one_row = batch | {"loss_mask": counted}
        local_rows = {name: array[index * size : (index + 1) * size] for name, array in one_row.items()}
        state, sums = run.train_step(state, run.models.frozen_params, run.put(local_rows))
        values = metrics.averages(jax.device_get(sums))
        row_values = {
            "gradient_norm": values["gradient_norm"],
            **{k: v for k, v in values.items() if k.endswith("/loss")},
        }
        if not all(map(math.isfinite, row_values.values())):
            bad_rows.append({"row": row} | {k: v if math.isfinite(v) else str(v) for k, v in row_values.items()})
    return bad_rows


def sentence(bad_rows: BadRows, count: int) -> str:
    """Returns the result of `diagnose` as a sentence."""
    if not bad_rows:
        return "No row has a non-finite loss or gradient on its own: only the sum over the rows overflows."
    if len(bad_rows) == count:
        return (
            f"Every one of the {count} rows gives a non-finite loss or gradient on its own, so the cause is in a model's "
            f"parameters or in the loss, not in the data."
        )
    indices = ", ".join(str(line["row"]) for line in bad_rows[:8]) + (", ..." if len(bad_rows) > 8 else "")
    return f"{len(bad_rows)} of the {count} rows give a non-finite loss or gradient on their own: {indices}."


def wrong_weights(run: Run, values: dict[str, float]) -> str:
    """Returns a sentence for each term whose rule gave weights that are negative or not finite, or ''."""
    specs = {
        term.name: run.config.objective.terms[term.name]["tokens"]
        for term in run.terms
        if not math.isfinite(values.get(f"{term.name}/token_weight", 0.0))
    }
    return "".join(
        f"objective.terms.{name}.tokens={spec if isinstance(spec, str) else dict(spec)} gave a weight that is negative or "
        f"not finite. "
        for name, spec in specs.items()
    )


def saved_steps(workdir: str) -> list[int]:
    """Returns the steps that `stop` has saved in a work directory, in order."""
    names = (path.parent.name.removeprefix("step_") for path in (Path(workdir) / FOLDER).glob(f"step_*/{REPORT}"))
    return sorted(int(name) for name in names if name.isdigit())


def load(workdir: str, step: int, state: TrainState) -> tuple[TrainState, dict[str, np.ndarray]]:
    """Loads the state and the global batch of a step that `stop` has saved.

    The state has the shapes and shardings of `state`, a tree of ShapeDtypeStructs.
    """
    folder = Path(workdir) / FOLDER / f"step_{step}"
    with storage.storing(folder / BATCH), np.load(folder / BATCH, allow_pickle=False) as arrays:
        batch = {name: arrays[name] for name in arrays.files}
    return checkpoint.restore_state(folder / STATE, state), batch


def _all_rows(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the global batch, gathered from the rows of each process."""
    if jax.process_count() == 1:
        return rows
    return {k: np.asarray(multihost_utils.process_allgather(array, tiled=True)) for k, array in rows.items()}
