"""Distils the packaged docstrings teacher with KL(p || q) into a student of less than a quarter of the teacher's size.

    python -m kd_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

The command takes a few minutes on a laptop. Result (experiments/quickstart): KL(p || q) 5.13 -> 1.69.
"""

from ml_collections import ConfigDict

from configs import forward_kl


def get_config(setting: str = "docstrings") -> ConfigDict:
    config = forward_kl.get_config(setting)
    config.steps = 300
    config.data.eval_rows = 256
    return config
