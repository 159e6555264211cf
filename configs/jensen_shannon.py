"""Jensen-Shannon divergence with weight 0.5 on the teacher; GKD's paper has 0.1, 0.5 and 0.9 as well (Agarwal et al.,
https://arxiv.org/abs/2306.13649, 2024).

    python -m kd_jax.main --config=configs/jensen_shannon.py --workdir=runs/jensen_shannon
"""

from ml_collections import ConfigDict

from configs import base, settings


def get_config(setting: str = "docstrings") -> ConfigDict:
    config = settings.get(setting)
    return base.set_terms(config, distil=base.term(divergence={"name": "jensen_shannon", "weight": 0.5}))
