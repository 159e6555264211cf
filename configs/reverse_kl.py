"""KL(q || p): the student says only what the teacher may say (Gu et al., https://arxiv.org/abs/2306.08543, 2024).

python -m kd_jax.main --config=configs/reverse_kl.py --workdir=runs/reverse_kl
"""

from ml_collections import ConfigDict

from configs import base, settings


def get_config(setting: str = "docstrings") -> ConfigDict:
    config = settings.get(setting)
    return base.set_terms(config, distil=base.term(divergence={"name": "reverse_kl"}))
