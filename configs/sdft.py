"""SDFT, self-distillation from demonstrations: the teacher is the student before training, and sees a demonstration
(https://arxiv.org/abs/2601.19897, 2026).

    python -m kd_jax.main --config=configs/sdft.py --workdir=runs/sdft

The student answers each prompt. The loss is the Jensen-Shannon divergence with equal shares over the student's 100
likeliest tokens, renormalised, times min(q / q when sampled, 2). Each row's mean counts equally. The config follows the
code (TRL), in which a row without counted tokens enters the mean as 0; here the row is left out. The other teacher of the
code is an average: --config.teacher.follow=0.05.

The student of a setting without a pretrained student is the setting's teacher. The method has been run in the setting
smoke.
"""

from ml_collections import ConfigDict

from configs import base, settings

VIEW = "{prompt}\n\nAn example of a response to the question:\n{response}\n\nNow answer with a response of your own."


def get_config(setting: str = "docstrings") -> ConfigDict:
    config = settings.own_teacher(settings.get(setting), view=ConfigDict({"name": "template", "text": VIEW}))
    config.prefixes = ConfigDict({"name": "student", "every": 1, "epochs": 1})
    distil = base.term(
        divergence={"name": "jensen_shannon", "weight": 0.5}, rows="student", average="sequence",
        vocabulary={"support": "student_top_k", "k": 100, "rest": "renormalised"},
        tokens={"name": "importance_now", "at_most": 2.0, "divide_by": "all"},
    )  # fmt: skip
    return base.set_terms(config, distil=distil)
