"""An assembled run: everything that the training loop, the evaluation and a notebook need.

`build` makes a `Run` from a config. The other modules of this package load the models and the rows, check how the
settings fit together, and write the summary and the results of a run.
"""

from kd_jax.run.build import Run, build

__all__ = ["Run", "build"]
