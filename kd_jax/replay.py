"""python -m kd_jax.replay --workdir=DIR [--step=N]

Repeats a step whose loss or gradient was not finite, from the saved state and on the saved batch. With
JAX_DEBUG_NANS=1 JAX_DISABLE_JIT=1 in the environment, JAX stops at the line that made the first NaN.
"""

import json
import math
import sys
from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict

from kd_jax import command, data, metrics, train
from kd_jax.run import hub_names, nonfinite
from kd_jax.settings import Settings
from kd_jax.settings.value_types import WholeNumberParser
from kd_jax.storage import directory, remote

FLAGS = flags.FlagValues()  # the flags of this command only, because other commands have flags of the same names
flags.DEFINE_string("workdir", None, "The work directory of the run that stopped. Required.", flag_values=FLAGS)
flags.DEFINE(
    WholeNumberParser(), "step", None, "The saved step to repeat. Without this flag the last saved step is repeated.",
    flag_values=FLAGS,
)  # fmt: skip


def replay(workdir: str, step: int | None = None) -> nonfinite.BadRows:
    """Prints the values of a saved step for each term and each bad row, and returns the result of `nonfinite.diagnose`.

    Args:
      workdir: the work directory of the run.
      step: a saved step; None for the last saved step.

    Raises:
      ValueError: the directory has no run, or the step is not saved.
    """
    if not (Path(workdir) / directory.CONFIG).is_file():
        raise ValueError(f"the work directory {workdir} has no run: there is no {directory.CONFIG}.")
    steps = nonfinite.saved_steps(workdir)
    if not steps or (step is not None and step not in steps):
        raise ValueError(
            f"there is no step {'' if step is None else f'{step} '}to replay in {Path(workdir) / nonfinite.FOLDER}; "
            f"{f'the saved steps are {steps}' if steps else 'a run saves a step whose loss or gradient is not finite'}."
        )
    step = steps[-1] if step is None else step
    config = ConfigDict(json.loads((Path(workdir) / directory.CONFIG).read_text(encoding="utf-8")))
    config.max_skipped = 0  # no step may change the saved state
    if config.mesh.to_dict() != {"data": -1, "fsdp": 1, "tensor": 1} and jax.device_count() == 1:
        # A step of a large machine can be repeated on one device.
        config.mesh = {"data": 1, "fsdp": 1, "tensor": 1}
    hub_names.settle(Settings.parse(config), workdir)
    run = train.build(config)
    state, batch = nonfinite.load(workdir, step, run.abstract_state)
    state, sums = run.train_step(state, run.models.frozen_params, run.put(batch))
    print(f"step {step} of {workdir}")
    values = metrics.averages(jax.device_get(sums))
    print(metrics.table([["", "value"], *([k, f"{v:g}"] for k, v in values.items() if k != "skipped")]))
    if math.isfinite(values["loss"] + values["gradient_norm"]):
        print("Now the loss and the gradient are finite, so the code, the models or the machine have changed.")
        return []
    bad_rows = nonfinite.diagnose(run, state, batch)
    print(nonfinite.sentence(bad_rows, len(batch["tokens"])))
    for line in bad_rows[:8]:
        row = line["row"]
        prompt = data.prompt_of(batch["tokens"][row], batch["loss_mask"][row])
        answer = batch["targets"][row][batch["loss_mask"][row]]
        numbers = ", ".join(f"{name}={value}" for name, value in line.items() if name != "row")
        print(f"--- row {row}: {numbers}\n{run.tokenizer.decode(prompt)}\n>>> {run.tokenizer.decode(answer.tolist())}")
    return bad_rows


def main() -> None:
    command.start()
    values, _ = command.parse("replay", FLAGS, sys.argv[1:], about=f"usage: {__doc__.strip()}", required=("workdir",))
    with command.ends_well("kd_jax.replay", lambda: "the run is unchanged"):
        unread = tuple(name for name in remote.HEAVY if name != nonfinite.FOLDER)
        with remote.work_directory(values["workdir"], writes=False, unread=unread) as (workdir, _):
            replay(workdir, values["step"])


if __name__ == "__main__":
    main()
