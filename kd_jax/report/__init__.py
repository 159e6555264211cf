"""report.html: what came of a run, an evaluation or an ablation, on one page that needs nothing else.

python -m kd_jax.report DIR [DIR ...] [--out=FILE] makes it again, or puts several on one page.
"""

from kd_jax.report.environment import write_environment
from kd_jax.report.page import write
from kd_jax.report.sections import AUTHORS

__all__ = ["AUTHORS", "write", "write_environment"]
