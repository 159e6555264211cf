"""Total variation distance (Wen et al., "f-Divergence Minimization for Sequence-Level Knowledge Distillation",
https://arxiv.org/abs/2307.15190, 2023).

    python -m kd_jax.main --config=configs/total_variation.py --workdir=runs/total_variation
"""

from ml_collections import ConfigDict

from configs import base, settings


def get_config(setting: str = "docstrings") -> ConfigDict:
    config = settings.get(setting)
    return base.set_terms(config, distil=base.term(divergence={"name": "total_variation"}))
