"""IW-OPD: on-policy distillation with more weight on tokens before which teacher and student agree
(https://arxiv.org/abs/2606.22600, 2026).

    python -m kd_jax.main --config=configs/iw_opd.py --workdir=runs/iw_opd

The weight of a token is 1 + 0.5 (1 - s), with s the share of the row's sum of |log p - log q| that lies before the
token. The config follows the published code (TRL).

The method has been run in the setting smoke.
"""

from ml_collections import ConfigDict

from configs import base, settings


def get_config(setting: str = "docstrings") -> ConfigDict:
    config = settings.get(setting)
    config.prefixes = ConfigDict({"name": "student", "every": 1, "epochs": 1})
    policy = base.policy(discount=0.0, include_current=True, length_normalised=False, clip=0.0)
    tokens = {"name": "prefix_gap", "gamma": 0.5, "divide_by": "all"}
    return base.set_terms(
        config, distil=base.term(kind="policy_gradient", policy=policy, rows="student", tokens=tokens)
    )
