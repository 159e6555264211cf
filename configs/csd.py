"""CSD: concrete score distillation, which compares the differences of log-probabilities between all pairs of
entries (https://arxiv.org/abs/2509.25837, 2025).

    python -m kd_jax.main --config=configs/csd.py --workdir=runs/csd

With the student's probabilities as both weights, the loss is half the variance of log q - log p under q. The weights
are constants to the gradient. The published function returns a surrogate with the same gradient, whose value has no
meaning. The weights may be other words, for example --config.objective.terms.distil.divergence.weights="('teacher',
'student')".

The method has been run in the setting smoke.
"""

from ml_collections import ConfigDict

from configs import base, settings


def get_config(setting: str = "docstrings") -> ConfigDict:
    config = settings.get(setting)
    divergence = {"name": "concrete_score", "weights": ("student", "student")}
    return base.set_terms(config, distil=base.term(divergence=divergence))
