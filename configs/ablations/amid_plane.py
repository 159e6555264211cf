"""AMiD over a plane of two parameters: the alpha of the assistant, and the weight of the teacher in the assistant.

The assistant is the arithmetic mean at alpha = -1 and the geometric mean at alpha = 1.

python -m kd_jax.ablate --config=configs/ablations/amid_plane.py --workdir=runs/amid_plane
"""

from ml_collections import ConfigDict

from configs import amid
from configs.ablations import base


def get_config(setting: str = "docstrings") -> ConfigDict:
    config = base.short(amid.get_config(setting), steps=50)
    axes = {
        "alpha": ("objective.terms.distil.assistant.alpha", (-3.0, -1.0, 1.0)),
        "weight": ("objective.terms.distil.weight", (0.1, 0.5, 0.9)),
    }
    return base.ablation(config, axes, seeds=(0,))
