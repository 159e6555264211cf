"""Mixed KL: 0.5 KL(p || q) + 0.5 KL(q || p), the equal-weight baseline of the AKL and ABKD papers.

python -m kd_jax.main --config=configs/mixed_kl.py --workdir=runs/mixed_kl
"""

from ml_collections import ConfigDict

from configs import base, settings


def get_config(setting: str = "docstrings") -> ConfigDict:
    config = settings.get(setting)
    return base.set_terms(config, distil=base.term(divergence={"name": "mixed_kl", "forward_weight": 0.5}))
