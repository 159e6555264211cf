"""Compares assistants r between teacher and student in KL(p || r), and weights of the teacher in the assistant.

python -m kd_jax.ablate --config=configs/ablations/assistants.py --workdir=runs/assistants
"""

from ml_collections import ConfigDict

from configs import forward_kl
from configs.ablations import base


def get_config(setting: str = "docstrings") -> ConfigDict:
    config = base.short(forward_kl.get_config(setting), steps=60)
    config.objective.terms.distil.pair = ("teacher", "assistant")
    config.objective.terms.distil.assistant.name = "arithmetic_mixture"
    names = ("alpha_mixture(alpha=-3)", "arithmetic_mixture()", "geometric_mixture()", "alpha_mixture(alpha=3)")
    axes = {
        "assistant": ("objective.terms.distil.assistant.name", names),
        "weight": ("objective.terms.distil.weight", (0.1, 0.5)),
    }
    return base.ablation(config, axes)
