"""KL(p || q): word-level knowledge distillation (Hinton et al., https://arxiv.org/abs/1503.02531, 2015).

python -m kd_jax.main --config=configs/forward_kl.py --workdir=runs/forward_kl
"""

from ml_collections import ConfigDict

from configs import base, settings


def get_config(setting: str = "docstrings") -> ConfigDict:
    config = settings.get(setting)
    return base.set_terms(config, distil=base.term(divergence={"name": "forward_kl"}))
