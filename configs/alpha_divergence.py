"""The alpha-divergence at 0.5, half-way from KL(q || p) at 0 to KL(p || q) at 1.

python -m kd_jax.main --config=configs/alpha_divergence.py --workdir=runs/alpha_divergence
"""

from ml_collections import ConfigDict

from configs import base, settings


def get_config(setting: str = "docstrings") -> ConfigDict:
    config = settings.get(setting)
    return base.set_terms(config, distil=base.term(divergence={"name": "alpha_divergence", "alpha": 0.5}))
