"""python -m kd_jax.main --config=configs/METHOD.py[:SETTING] --workdir=DIR [--config.KEY=VALUE ...]"""

import sys

from absl import app, flags
from ml_collections import config_flags

from kd_jax import train

# Keys that configs declare are locked, so that a typo is an error; only specs ({"name": ..., ...}) take new ones.
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The config file, and after a colon its setting.", lock_config=False, accept_new_attributes=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where metrics, checkpoints, plots and the student go.")
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"{argv[1]!r} is no flag; options look like --config.steps=100")
    try:
        train.train(_CONFIG.value, _WORKDIR.value)
    except (ValueError, FloatingPointError) as error:
        sys.exit(f"kd_jax: {error}")


def run() -> None:
    """Parses the flags and runs; what is wrong with them is one paragraph, without a traceback."""
    try:
        app.run(main)
    except (AttributeError, KeyError, TypeError) as error:
        if "config" in str(error).lower() or "key" in str(error).lower():
            sys.exit(f"kd_jax: {error}")
        raise


if __name__ == "__main__":
    run()
