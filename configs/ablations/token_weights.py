"""Compares rules of token weights, with both directions of KL on the text of the data.

python -m kd_jax.ablate --config=configs/ablations/token_weights.py --workdir=runs/token_weights
"""

from ml_collections import ConfigDict

from configs import forward_kl
from configs.ablations import base


def get_config(setting: str = "docstrings") -> ConfigDict:
    config = base.short(forward_kl.get_config(setting))
    rules = (
        "none",
        "threshold(of='teacher_entropy', at_least=0.8, divide_by='kept')",
        "top_fraction(of='student_entropy', fraction=0.5, divide_by='kept')",
        "top_fraction(of='divergence', fraction=0.5, divide_by='kept')",
        "accept(k=5, otherwise=0.01, divide_by='all')",
        "relative_confidence(divide_by='all')",
    )
    axes = {
        "tokens": ("objective.terms.distil.tokens.name", rules),
        "divergence": ("objective.terms.distil.divergence.name", ("forward_kl()", "reverse_kl()")),
    }
    return base.ablation(config, axes)
