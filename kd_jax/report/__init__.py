"""report.html: the results of a run, an evaluation or an ablation, on one self-contained page.

python -m kd_jax.report DIR [DIR ...] [--out=FILE] makes the page again, or puts several results on one page.
"""

from kd_jax.report.environment import write_environment
from kd_jax.report.page import write
from kd_jax.report.sections import AUTHORS

__all__ = ["AUTHORS", "write", "write_environment"]
