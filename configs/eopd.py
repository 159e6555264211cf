"""EOPD: on-policy distillation with forward KL at the tokens where the teacher is unsure
(https://arxiv.org/abs/2603.07079, 2026).

    python -m kd_jax.main --config=configs/eopd.py --workdir=runs/eopd

A policy gradient with the reward log p - log q acts on every token. At tokens where the teacher's entropy is at least
0.8 nats, the forward KL over the teacher's 16 likeliest tokens is added. The teacher is renormalised over these
tokens and the student is not, as in the published README. Both sums are divided by the number of all counted tokens.
The published code shifts the top-k tensors by one position; this config does not.

The method has been run in the setting smoke.
"""

from ml_collections import ConfigDict

from configs import base, settings


def get_config(setting: str = "docstrings") -> ConfigDict:
    config = settings.get(setting)
    config.prefixes = ConfigDict({"name": "student", "every": 1, "epochs": 1})
    policy = base.policy(discount=0.0, include_current=True, length_normalised=False, clip=0.2)
    forward = base.term(
        divergence={"name": "forward_kl"}, rows="student",
        vocabulary={"support": "teacher_top_k", "k": 16, "teacher": "renormalised", "student": "whole"},
        tokens={"name": "threshold", "of": "teacher_entropy", "at_least": 0.8, "divide_by": "all"},
    )  # fmt: skip
    reverse = base.term(kind="policy_gradient", policy=policy, rows="student")
    return base.set_terms(config, reverse=reverse, forward=forward)
