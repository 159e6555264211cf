"""ABKD's plane: the alpha-beta divergence where its two numbers go, from the limits to beyond the paper's (0.2, 0.7).

python -m kd_jax.ablate --config=configs/ablations/abkd_plane.py --workdir=runs/abkd_plane
"""

from ml_collections import ConfigDict

from configs import abkd
from configs.ablations import base


def get_config(setting: str = "docstrings") -> ConfigDict:
    config = base.short(abkd.get_config(setting), steps=50)
    term = "objective.terms.distil.divergence"
    values = (0.0, 0.2, 0.7, 1.0)
    return base.ablation(config, {"alpha": (f"{term}.alpha", values), "beta": (f"{term}.beta", values)}, seeds=(0,))
