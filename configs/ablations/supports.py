"""Compares the outcomes over which two distributions are compared, with both directions of KL on the text of the data.

python -m kd_jax.ablate --config=configs/ablations/supports.py --workdir=runs/supports
"""

from ml_collections import ConfigDict

from configs import forward_kl
from configs.ablations import base


def get_config(setting: str = "docstrings") -> ConfigDict:
    config = base.short(forward_kl.get_config(setting))
    config.objective.terms.distil.vocabulary = ConfigDict({"support": "teacher_top_k", "k": 16, "rest": "tail"})
    axes = {
        "support": (
            "objective.terms.distil.vocabulary.support",
            ("teacher_top_k", "student_top_k", "union", "intersection"),
        ),
        "rest": ("objective.terms.distil.vocabulary.rest", ("tail", "renormalised")),
        "divergence": ("objective.terms.distil.divergence.name", ("forward_kl()", "reverse_kl()")),
    }
    return base.ablation(config, axes)
