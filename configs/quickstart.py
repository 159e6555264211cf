"""Distils the packaged docstrings teacher into a student of less than a quarter of its size, in a few minutes on a
laptop.

python -m kd_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
"""

from ml_collections import ConfigDict

from configs import forward_kl


def get_config(setting: str = "docstrings") -> ConfigDict:
    config = forward_kl.get_config(setting)
    config.steps = 300
    config.data.eval_rows = 256
    return config
