"""SelecTKD: tokens at which the teacher accepts the student's choice count fully, and other tokens count 0.01
(https://arxiv.org/abs/2510.24021, 2025).

    python -m kd_jax.main --config=configs/selectkd.py --workdir=runs/selectkd

The teacher accepts if the student's likeliest token is among the teacher's 5 likeliest. The sum is divided by the
number of all counted tokens. There is no published code; the config follows the paper. SpecKD has the weight 0
elsewhere: --config.objective.terms.distil.tokens.otherwise=0.0.

The method has been run in the setting smoke.
"""

from ml_collections import ConfigDict

from configs import base, settings


def get_config(setting: str = "docstrings") -> ConfigDict:
    config = settings.get(setting)
    tokens = {"name": "accept", "k": 5, "otherwise": 0.01, "divide_by": "all"}
    return base.set_terms(config, distil=base.term(divergence={"name": "reverse_kl"}, tokens=tokens))
