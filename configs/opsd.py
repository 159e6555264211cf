"""OPSD, on-policy self-distillation: the teacher is the student before training, and sees the reference answer
(https://arxiv.org/abs/2601.18734, 2026).

    python -m kd_jax.main --config=configs/opsd.py --workdir=runs/opsd

The student answers each prompt, and the same model with the answer in its prompt judges each token. The loss is the
Jensen-Shannon divergence with equal shares, of logits divided by 1.1. The part of each vocabulary entry is at most 0.05,
as in the later code; the first code has no such bound. The published teacher may also be an average of the students, which
begins as a copy after the first update: --config.teacher.follow=0.001 --config.teacher.follow_copy_first=True. The
published code pads prompts on the right, so that the first token of a shorter prompt's response is predicted from
padding; this config does not follow it.

The student of a setting without a pretrained student is the setting's teacher. The method has been run in the setting
smoke.
"""

from ml_collections import ConfigDict

from configs import base, settings

VIEW = "{prompt}\n\nA reference answer is:\n{response}\n\nWith this answer in mind, answer in your own words."


def get_config(setting: str = "docstrings") -> ConfigDict:
    config = settings.own_teacher(settings.get(setting), view=ConfigDict({"name": "template", "text": VIEW}))
    config.prefixes = ConfigDict({"name": "student", "every": 1, "epochs": 1})
    config.objective.temperature = config.sampling.temperature = 1.1
    distil = base.term(divergence={"name": "jensen_shannon", "weight": 0.5}, rows="student", entry_clip=0.05)
    return base.set_terms(config, distil=distil)
