"""python -m kd_jax.ablate --config=configs/ablations/NAME.py --workdir=DIR [--shard=I/N | --table] [--config.KEY=VALUE ...]

Runs every point of a grid with every seed, except for runs that are already done. DIR receives a folder for each run,
results.jsonl, table.md and plots. The error of a run that fails is written to the folder of the run, and the other runs
continue; the next call tries the run again. With --table nothing is run, and the table and the plots show the runs
that are done so far.
"""

import copy
import itertools
import json
import re
import sys
import traceback
from pathlib import Path

from kd_jax import command_help

if __name__ == "__main__":  # the help is printed before the imports below, which take seconds
    command_help.answer("ablate", sys.argv)

from absl import app, flags, logging
from ml_collections import ConfigDict

from kd_jax import command, main, metrics, report, storage, train
from kd_jax.report import comparison, plots
from kd_jax.run import identity
from kd_jax.settings import Settings
from kd_jax.storage import directory, remote
from kd_jax.storage.files import Json

Point = Json  # the label of an axis -> a value of the axis
_SHARD = flags.DEFINE_string(
    "shard", "0/1", "I/N: every N-th run, from the I-th on, for N processes that share the runs."
)
_TABLE = flags.DEFINE_bool("table", False, "Runs nothing, and makes the table and the plots of the runs that are done.")


def run(config: ConfigDict, workdir: str, shard: tuple[int, int] | None = (0, 1)) -> str:
    """Runs the remaining points of an ablation, and returns the table of the runs that are done.

    Args:
      config: the config from `configs.ablations.base.ablation`.
      workdir: the work directory of the ablation, with a folder for each run.
      shard: (i, n): every n-th of all runs in order, beginning with the i-th. None: no run.

    Raises:
      ValueError: an axis has a key that the base does not have; the shard is out of range; the directory belongs to
        another ablation, or to runs with other contents of the files that their config names; or `shard` is None and
        the directory has no ablation.
    """
    part, parts = shard or (0, 1)
    axes = comparison.axes_of(config)
    if not 0 <= part < parts:
        raise ValueError(f"--shard={part}/{parts} must be I/N with 0 <= I < N.")
    for label, values in axes.items():
        if not values:
            raise ValueError(f"the axis {label!r} has no values; give it at least one.")
    if odd := [seed for seed in config.seeds if not isinstance(seed, int) or isinstance(seed, bool)]:
        raise ValueError(
            f"seeds={tuple(config.seeds)} must be a tuple of whole numbers such as (0, 1, 2); {odd[0]!r} is none."
        )
    # All points are run with the first seed before any point is run with the second seed.
    jobs = [(point, seed) for seed in config.seeds for point in points(config)]
    configs = [configured(config, point, seed) for point, seed in jobs]  # errors in any key are reported before any run
    folders = [Path(workdir) / name_of(point, seed) for point, seed in jobs]
    if twice := [folder.name for folder in folders if folders.count(folder) > 1]:
        raise ValueError(
            f"two runs would have the folder {twice[0]!r}, because two values or seeds are equal or similar; remove one of them."
        )
    pushed = [run_config.push for run_config in configs if run_config.push]
    if len(set(pushed)) < len(pushed):
        raise ValueError(
            f"base.push={pushed[0]!r}: the runs of an ablation would replace each other's student in this repository. Leave "
            f"base.push empty, and upload the student of one run by a run of its own."
        )
    resolved = config.to_dict()
    if shard is None and directory.config_difference(workdir, resolved) is None:
        raise ValueError(f"the work directory {workdir} has no ablation, so --table has no runs to show.")
    directory.check(workdir, resolved)
    for folder, run_config in zip(folders, configs, strict=True):
        if shard:  # otherwise the table would compare runs of different contents
            identity.check(str(folder / "run"), Settings.read(run_config))
    directory.write_config(workdir, resolved)
    own_runs = list(zip(folders, configs, strict=True))[part::parts] if shard else []
    for position, (folder, run_config) in enumerate(own_runs, start=1):
        run_one(run_config, folder, f"{position} of {len(own_runs)}")
    done = [
        {"point": point, "seed": seed, "folder": folder.name}
        | json.loads((folder / "result.json").read_text(encoding="utf-8"))
        for (point, seed), folder in zip(jobs, folders, strict=True)
        if (folder / "result.json").exists()
    ]
    failed = [folder.name for folder in folders if (folder / "error.txt").exists()]
    return write(config, done, failed, Path(workdir))


def points(config: ConfigDict) -> list[Point]:
    """Returns the points of the grid, which are the product of the axes."""
    axes = comparison.axes_of(config)
    return [dict(zip(axes, chosen, strict=True)) for chosen in itertools.product(*axes.values())]


def configured(config: ConfigDict, point: Point, seed: int) -> ConfigDict:
    """Returns the base config with the overrides of a point and a seed.

    Raises:
      ValueError: a key or a value of the point does not fit the base.
    """
    bases = [point[label] for label, key, _ in config.axes if not key]
    run_config = copy.deepcopy(config.base[bases[0]] if bases else config.base)
    for label, key, _ in config.axes:
        if not key:
            continue
        value = point[label]
        if not isinstance(key, str) and len(key) != len(value):
            raise ValueError(f"the axis {label!r}: {value!r} must have a value for each of {', '.join(key)}.")
        changes = {key: value} if isinstance(key, str) else dict(zip(key, value, strict=True))
        try:
            run_config.update_from_flattened_dict(changes)
        except (KeyError, AttributeError, TypeError) as error:
            text = ", ".join(f"{name}={changed!r}" for name, changed in changes.items())
            raise ValueError(f"the axis {label!r}: {text} does not fit the base ({error}).") from error
    run_config.seed = seed
    Settings.read(run_config)
    return run_config


def name_of(point: Point, seed: int) -> str:
    """Returns the name of a run's folder, such as alpha=0.2,beta=0.7,seed=0."""
    pairs = [*point.items(), ("seed", seed)]
    return re.sub(r"[^\w=.,()-]+", "", ",".join(f"{label}={value}" for label, value in pairs))


def run_one(config: ConfigDict, folder: Path, position: str) -> None:
    """Runs one point, unless the result of the run exists. An error is written to the folder."""
    if (folder / "result.json").exists():
        return
    metrics.tqdm.write(f"=== {position}: {folder.name}")
    error = folder / "error.txt"
    try:
        result = train.train(config, str(folder / "run"), quiet=True)
    except Exception:  # after any error, the other runs continue
        storage.write_whole(error, traceback.format_exc())
        metrics.tqdm.write(f"failed: {traceback.format_exc(limit=0).strip()}")
        return
    error.unlink(missing_ok=True)
    storage.write_whole(folder / "result.json", json.dumps(result))


def write(config: ConfigDict, done: list[Json], failed: list[str], folder: Path) -> str:
    """Writes results.jsonl, table.md and the charts of the runs that are done, and returns the table."""
    storage.write_json_lines(folder / "results.jsonl", done)
    text = comparison.table(done, config.metrics)
    if failed:
        text += "\n\nFailed runs, each with the reason in error.txt of the run's folder: " + "; ".join(failed)
    storage.write_whole(folder / "table.md", text + "\n")
    workdirs = [folder / line["folder"] / "run" for line in done]
    for chart in comparison.charts(comparison.axes_of(config), config.metrics, done, workdirs):
        plots.save(chart, folder)
    report.write_environment(folder)
    report.write([folder])
    return text


def remaining_results() -> str:
    """Returns a clause that names what remains of an ablation after Ctrl-C."""
    done = len(list(Path(str(main.WORKDIR.value)).glob("*/result.json")))
    return (
        f"{done} runs are done in {main.WORKDIR.value}, the checkpoints of the interrupted run remain, and the same command "
        f"resumes the ablation"
    )


def _main(argv: list[str]) -> None:
    command.start()
    logging.set_verbosity(logging.ERROR)
    main.use_cache()
    with command.ends_well("kd_jax.ablate", remaining_results):
        if main.PROCESSES.value:
            raise ValueError(
                f"--processes={main.PROCESSES.value!r} is for one run on several hosts; use --shard to divide an ablation."
            )
        if len(argv) > 1:
            raise ValueError(f"{argv[1]!r} is no flag; flags look like --config.base.steps=100.")
        part, _, parts = _SHARD.value.partition("/")
        if not (part.isdigit() and parts.isdigit()):
            raise ValueError(f"--shard={_SHARD.value!r} must be I/N, such as 0/2.")
        workdir = str(main.WORKDIR.value)
        if remote.is_remote(workdir) and int(parts) > 1:
            raise ValueError(
                f"--shard={_SHARD.value}: the processes need one local folder that they share, and not the address {workdir}."
            )
        with storage.room(workdir), remote.work_directory(workdir) as (folder, _):
            print(run(main.CONFIG.value, folder, None if _TABLE.value else (int(part), int(parts))))
        print(f"\nwrote {workdir}/report.html")


if __name__ == "__main__":
    app.run(_main, flags_parser=main.parse)
