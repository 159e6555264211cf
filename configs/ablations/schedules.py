"""Compares schedules for TAID's t, the weight of the teacher in KL(r || q).

The grid has the adaptive schedule with the published alpha, and with an alpha large enough to matter in so few steps.
It also has a linear schedule between the same ends, a cosine that falls from 1 to 0.4, a constant of 0.7, and a
constant of 1. With a constant of 1 the term is KL(p || q).

python -m kd_jax.ablate --config=configs/ablations/schedules.py --workdir=runs/schedules
"""

from ml_collections import ConfigDict

from configs import taid
from configs.ablations import base


def get_config(setting: str = "docstrings") -> ConfigDict:
    config = base.short(taid.get_config(setting), steps=60)
    steps = config.steps
    names = (
        f"taid(start=0.4, end=1.0, alpha=0.0005, beta=0.99, total_steps={steps})",
        f"taid(start=0.4, end=1.0, alpha=0.05, beta=0.99, total_steps={steps})",
        f"linear_schedule(init_value=0.4, end_value=1.0, transition_steps={steps})",
        f"cosine_decay_schedule(init_value=1.0, decay_steps={steps}, alpha=0.4)",
        "constant_schedule(value=0.7)",
        "constant_schedule(value=1.0)",
    )
    return base.ablation(config, {"weight": ("objective.terms.distil.weight.name", names)})
