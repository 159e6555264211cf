"""python -m kd_jax.main --config=configs/METHOD.py[:SETTING] --workdir=DIR [--config.KEY=VALUE ...]"""

import os
import re
import sys
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from kd_jax import loop, train
from kd_jax.resolve import nearest

# Configs lock the keys that they declare, so that a typo is an error; only specs ({"name": ..., ...}) take new ones.
CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The config file, and after a colon its setting.", lock_config=False, accept_new_attributes=True
)
WORKDIR = flags.DEFINE_string("workdir", None, "Where metrics, checkpoints, plots and the student go.")
PROCESSES = flags.DEFINE_string(
    "processes", "", "The same command runs on several hosts: auto (a TPU pod, or SLURM), or ADDRESS:PORT,COUNT,INDEX."
)
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.ERROR)  # what orbax and tfds log at every step of theirs would bury the progress bar
    if len(argv) > 1:
        sys.exit(f"kd_jax: {argv[1]!r} is no flag; options look like --config.steps=100.")
    use_cache()
    try:
        join(PROCESSES.value)
        train.train(CONFIG.value, str(WORKDIR.value))
    except (ValueError, FloatingPointError, OSError) as error:
        sys.exit(f"kd_jax: {error}")
    except loop.Stopped as stopped:
        print(f"kd_jax: told to stop; step {stopped.step} is saved, and the same command goes on.", file=sys.stderr)
        raise


def use_cache() -> None:
    """Compiled programs are kept for the next run, unless JAX is told where already."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/kd_jax/xla"))


def join(processes: str) -> None:
    """Meets the other processes of the run, before anything touches a device.

    Args:
      processes: empty: there are none; auto: a TPU pod's and SLURM's find each other; or ADDRESS:PORT,COUNT,INDEX, the address
        that of the process 0.

    Raises:
      ValueError: something else.
    """
    if not processes:
        return
    parts = re.fullmatch(r"([^,]+:\d+),(\d+),(\d+)", processes)
    if processes == "auto":
        jax.distributed.initialize()
    elif parts and int(parts[3]) < int(parts[2]):
        jax.distributed.initialize(parts[1], int(parts[2]), int(parts[3]))
    else:
        raise ValueError(f"--processes={processes!r} must be auto, or ADDRESS:PORT,COUNT,INDEX with INDEX below COUNT.")


def parse(argv: list[str]) -> list[str]:
    """The flags; whatever is wrong with them is one paragraph, without a traceback."""
    try:
        rest = flags.FLAGS(argv)
        CONFIG.value.keys()  # a config file that is not there is found out by the first reading
        return rest
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        while cause := error.__cause__ or error.__context__:  # what the config file said, under what absl made of it
            error = cause
        if missing := re.search(r"No such file or directory: '(.*\.py)", str(error)):
            path = Path(missing[1])
            hint = nearest(path.stem, [file.stem for file in path.parent.glob("*.py")])
            sys.exit(f"kd_jax: there is no config file {path}{hint}.")
        # A locked ConfigDict shows all its fields before it says which one was meant.
        sys.exit(
            "kd_jax: "
            + re.sub(
                r"Other fields present:.*(?=Did you mean)|Other fields present:.*", "", str(error), flags=re.DOTALL
            ).strip("'\"")
        )


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
