"""On-policy distillation: a policy gradient on the student's own responses, with the reward log p - log q for each
token (Lu and Thinking Machines Lab, "On-Policy Distillation", 2025).

The baseline of the policy gradient is the exact mean of the reward, -KL(q || p), as in "KL for a KL"
(https://arxiv.org/abs/2605.07865, 2026; configs/vopd.py). The original method has no baseline:
--config.objective.terms.distil.policy.baseline=none.

    python -m kd_jax.main --config=configs/opd.py --workdir=runs/opd

The expectation of the gradient is the gradient of KL(q || p) over the whole vocabulary. With
--config.objective.terms.distil.kind=divergence that gradient is computed exactly, token by token.

The method has been run in the settings docstrings and smoke, and with the exact gradient in dolly_smollm2
(experiments/smollm2_on_policy). Result (experiments/methods_docstrings) from one fine-tuned student, on 116,000 tokens
of docstrings, mean of three seeds: KL(p || q) 2.26 -> 2.41, KL(q || p) 2.62 -> 2.40, KL(q || p) on the student's own
text 2.35 -> 2.26, ROUGE-L 7.6 -> 7.5.
"""

from ml_collections import ConfigDict

from configs import base, settings


def get_config(setting: str = "docstrings") -> ConfigDict:
    config = settings.get(setting)
    config.prefixes = ConfigDict({"name": "student", "every": 1, "epochs": 1})
    policy = base.policy(discount=0.0, include_current=True, length_normalised=False, baseline="kl", clip=0.0)
    distil = base.term(kind="policy_gradient", policy=policy, divergence={"name": "reverse_kl"}, rows="student")
    return base.set_terms(config, distil=distil)
