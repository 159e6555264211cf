"""KL(r || q) with r the average of two teachers' distributions.

    python -m kd_jax.main --config=configs/ensemble.py --config.members.second.path=FOLDER --workdir=runs/ensemble

The second teacher must have the vocabulary of the first. By default its folder is that of the first teacher, so that the
config runs in every setting. Published codes differ in the average. AReaL averages the probabilities
(arithmetic_mixture, as here). NeMo-RL averages the logits, which is the normalised geometric mean:
--config.objective.terms.distil.assistant.name=geometric_mixture. A weighted sum of KL(p_i || q), NeMo-RL's "sum", is a
term for each teacher, with pair=("teacher", "student") and pair=("second", "student").
"""

from ml_collections import ConfigDict

from configs import base, settings


def get_config(setting: str = "docstrings") -> ConfigDict:
    config = settings.get(setting)
    config.members.second = base.member(path=config.teacher.get_oneway_ref("path"))
    distil = base.term(
        divergence={"name": "forward_kl"}, pair=("assistant", "student"), assistant={"name": "arithmetic_mixture"},
        weights={"teacher": 0.5, "second": 0.5},
    )  # fmt: skip
    return base.set_terms(config, distil=distil)
