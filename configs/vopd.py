"""vOPD, "KL for a KL": on-policy distillation with the exact KL(q || p) of each token as the baseline of the
policy gradient (https://arxiv.org/abs/2605.07865, 2026).

    python -m kd_jax.main --config=configs/vopd.py --workdir=runs/vopd

The reward of a token is log p - log q, whose mean under the student is -KL(q || p). Subtracting this mean reduces the
variance and leaves the expected gradient, which is that of KL(q || p), unchanged.

The method has been run in the setting smoke.
"""

from ml_collections import ConfigDict

from configs import base, settings


def get_config(setting: str = "docstrings") -> ConfigDict:
    config = settings.get(setting)
    config.prefixes = ConfigDict({"name": "student", "every": 1, "epochs": 1})
    policy = base.policy(discount=0.0, include_current=True, length_normalised=False, baseline="kl", clip=0.0)
    distil = base.term(kind="policy_gradient", policy=policy, divergence={"name": "reverse_kl"}, rows="student")
    return base.set_terms(config, distil=distil)
