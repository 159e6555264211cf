"""ATKD: tokens of which the teacher is sure learn only from the rest of the vocabulary, and other tokens learn
from both parts (https://arxiv.org/abs/2402.11890, 2024).

    python -m kd_jax.main --config=configs/atkd.py --workdir=runs/atkd

A token is easy if the teacher's mass off the row's token is below the lower median of the batch. Each group has a
mean of its own, and the means have the weights 0.2 and 0.8. The median is over the global batch; in the published
code it is over the batch of one device.

The method has been run in the setting smoke.
"""

from ml_collections import ConfigDict

from configs import base, settings


def get_config(setting: str = "docstrings") -> ConfigDict:
    config = settings.get(setting)
    rule = {"name": "quantile", "of": "mass_off_target", "interpolation": "lower", "divide_by": "kept"}
    rest = {"name": "decoupled_kl", "target_weight": 0.0, "rest_weight": 1.0}
    easy = base.term(divergence=rest, tokens=rule | {"below": 0.5}, coefficient=0.2)
    hard = base.term(divergence=rest | {"target_weight": 1.0}, tokens=rule | {"at_least": 0.5}, coefficient=0.8)
    return base.set_terms(config, easy=easy, hard=hard)
