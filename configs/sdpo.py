"""SDPO, self-distillation from the student's own successes: the teacher sees another response that succeeded
(Hübotter et al., "Reinforcement Learning via Self-Distillation", https://arxiv.org/abs/2601.20802, 2026).

    python -m kd_jax.main --config=configs/sdpo.py --workdir=runs/sdpo

The student answers each prompt several times. The teacher is an average of the students, and its prompt has the first
other response whose reward is large enough. Rows without such a response do not count. The loss is the Jensen-Shannon
divergence with equal shares over the student's 100 likeliest tokens and one outcome for all others, as in the authors'
code. The code in TRL has reverse KL of the sampled token:

    --config.objective.terms.distil.kind=policy_gradient

The reward here is ROUGE-L with the dataset's response, of at least 30. The papers' reward is an answer that a verifier
accepts: --config.teacher.view.reward=number_match --config.teacher.view.at_least=100 for the numbers of gsm8k. The
teacher of "trust region" is a member "live" (path="student", follow=1.0) and a member "start" (path="student"), both with
the view, and an assistant geometric_mixture between the two.

The student of a setting without a pretrained student is the setting's teacher. The method has been run in the setting
smoke.
"""

from ml_collections import ConfigDict

from configs import base, settings


def get_config(setting: str = "docstrings") -> ConfigDict:
    view = {"name": "successful_rollout", "reward": "rouge_l", "at_least": 30.0, "without_thinking": True}
    config = settings.own_teacher(settings.get(setting), view=ConfigDict(view), follow=0.05)
    config.prefixes = ConfigDict({"name": "student", "every": 1, "epochs": 1})
    config.sampling.rollouts_per_prompt = 4
    distil = base.term(
        divergence={"name": "jensen_shannon", "weight": 0.5}, rows="student", row_gate={"name": "has_view"},
        vocabulary={"support": "student_top_k", "k": 100, "rest": "tail"},
    )  # fmt: skip
    return base.set_terms(config, distil=distil)
