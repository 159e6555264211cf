"""G-OPD: on-policy distillation with a reward that extrapolates beyond the teacher (https://arxiv.org/abs/2602.12125,
2026).

The reward of a token is lambda (log p - log r) - (log q - log r), where r is a reference model, here the student before
training. With lambda = 1 the reference has no effect. With lambda above 1 the reward amplifies the difference between
the teacher and the reference.

    python -m kd_jax.main --config=configs/gopd.py --workdir=runs/gopd

The paper and its code agree on the reward. The code takes another branch at exactly lambda = 1, without the reference,
which is the same reward. The paper's other choice of r is the model from which the teacher was trained:
--config.members.reference.path=FOLDER. The code clips the ratio of the policy at 0.2, and at 3 for negative advantages;
neither bound is reached in the first epoch over a batch, so this config has no clip.
"""

from ml_collections import ConfigDict

from configs import base, settings

LAMBDA = 1.25


def get_config(setting: str = "docstrings") -> ConfigDict:
    config = settings.get(setting)
    config.prefixes = ConfigDict({"name": "student", "every": 1, "epochs": 1})
    config.members.reference = base.member(path="student")
    policy = base.policy(
        discount=0.0, include_current=True, length_normalised=False, clip=0.0,
        members={"teacher": LAMBDA, "reference": 1 - LAMBDA},
    )  # fmt: skip
    return base.set_terms(config, distil=base.term(kind="policy_gradient", policy=policy, rows="student"))
