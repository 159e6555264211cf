"""Compares ten divergences on the text of the dataset.

python -m kd_jax.ablate --config=configs/ablations/divergences.py --workdir=runs/divergences
"""

from ml_collections import ConfigDict

from configs import forward_kl
from configs.ablations import base


def get_config(setting: str = "docstrings") -> ConfigDict:
    names = (
        "forward_kl()", "reverse_kl()", "mixed_kl()", "adaptive_kl()", "jensen_shannon()", "skew_forward_kl(skew=0.1)",
        "skew_reverse_kl(skew=0.1)", "total_variation()", "alpha_divergence(alpha=0.5)", "alpha_beta(alpha=0.2, beta=0.7)",
    )  # fmt: skip
    config = base.short(forward_kl.get_config(setting))
    return base.ablation(config, {"divergence": ("objective.terms.distil.divergence.name", names)})
