"""Reverse KL over the student's 16 likeliest tokens and everything else as one outcome, on the student's own text.

    python -m kd_jax.main --config=configs/topk_opd.py --workdir=runs/topk_opd

The support is that of TRL and of SDPO's code for reverse KL. With the outcome for all other tokens the loss is a
divergence, which is at most the KL over the whole vocabulary. Other codes renormalise over the support (ms-swift,
https://arxiv.org/abs/2603.25562) or drop the rest (verl, https://arxiv.org/abs/2604.13016):
--config.objective.terms.distil.vocabulary.rest=renormalised.

The method has been run in the setting smoke.
"""

from ml_collections import ConfigDict

from configs import base, settings


def get_config(setting: str = "docstrings") -> ConfigDict:
    config = settings.get(setting)
    config.prefixes = ConfigDict({"name": "student", "every": 1, "epochs": 1})
    vocabulary = {"support": "student_top_k", "k": 16, "rest": "tail"}
    distil = base.term(divergence={"name": "reverse_kl"}, rows="student", vocabulary=vocabulary)
    return base.set_terms(config, distil=distil)
