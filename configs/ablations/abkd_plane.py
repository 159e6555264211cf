"""The alpha-beta divergence of ABKD over a plane of its two parameters alpha and beta.

The divergence is forward KL at (1, 0) and reverse KL at (0, 1). The paper's choice is (0.2, 0.7). The grid also has
points beyond these.

python -m kd_jax.ablate --config=configs/ablations/abkd_plane.py --workdir=runs/abkd_plane
"""

from ml_collections import ConfigDict

from configs import abkd
from configs.ablations import base


def get_config(setting: str = "docstrings") -> ConfigDict:
    config = base.short(abkd.get_config(setting), steps=50)
    term = "objective.terms.distil.divergence"
    axes = {"alpha": (f"{term}.alpha", (0.0, 0.2, 1.0)), "beta": (f"{term}.beta", (0.0, 0.7, 1.0))}
    return base.ablation(config, axes, seeds=(0,))
