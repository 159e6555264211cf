"""ToDi: forward KL where the student is too low, reverse KL where it is too high, decided for each entry of the
vocabulary (https://arxiv.org/abs/2505.16297, 2025).

    python -m kd_jax.main --config=configs/todi.py --workdir=runs/todi

The gate of an entry is sigmoid(log p - log q), a constant to the gradient. As in the published scripts, the
temperature is 2 without the factor T^2, and the cross-entropy of the labels has half of the weight.

The method has been run in the setting smoke.
"""

from ml_collections import ConfigDict

from configs import base, settings


def get_config(setting: str = "docstrings") -> ConfigDict:
    config = settings.get(setting)
    distil = base.term(divergence={"name": "todi"}, temperature=2.0, coefficient=0.5)
    return base.set_terms(config, distil=distil, labels=base.hard_labels(coefficient=0.5))
