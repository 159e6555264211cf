"""Compares targets beyond and between two models: the teacher, and the student before training as the reference.

The weight of the teacher is 0.5 for a mixture of both models, 1 for the teacher, and above 1 for a target that
amplifies the difference between the teacher and the reference.

python -m kd_jax.ablate --config=configs/ablations/members.py --workdir=runs/members
"""

from ml_collections import ConfigDict

from configs import base as configs_base
from configs import forward_kl
from configs.ablations import base


def get_config(setting: str = "docstrings") -> ConfigDict:
    config = base.short(forward_kl.get_config(setting))
    config.members.reference = configs_base.member(path="student")
    term = config.objective.terms.distil
    term.pair, term.between = ("assistant", "student"), ("reference", "teacher")
    term.assistant = ConfigDict({"name": "extrapolation"})
    axes = {
        "weight": ("objective.terms.distil.weight", (0.5, 1.0, 1.25, 1.5)),
        "divergence": ("objective.terms.distil.divergence.name", ("forward_kl()", "reverse_kl()")),
    }
    return base.ablation(config, axes)
