"""AdaKD: the hardest half of the tokens, each with a temperature of its own (https://arxiv.org/abs/2510.11615,
2025).

    python -m kd_jax.main --config=configs/adakd.py --workdir=runs/adakd

The difficulty of a token is the Hellinger distance of the models. Harder tokens get a lower temperature, exp(-0.5
tanh(ln(s / median))), and the loss has the factor T^2. The temperature is a constant to the gradient; in the
published code the gradient passes through it. The published ratio of kept tokens follows the loss; here the ratio is
0.5.

The method has been run in the setting smoke.
"""

from ml_collections import ConfigDict

from configs import base, settings


def get_config(setting: str = "docstrings") -> ConfigDict:
    config = settings.get(setting)
    tokens = {"name": "top_fraction", "of": "hellinger", "fraction": 0.5, "divide_by": "kept"}
    distil = base.term(
        divergence={"name": "reverse_kl"}, tokens=tokens, temperature_squared=True,
        temperature={"name": "difficulty", "of": "hellinger", "scale": 0.5, "direction": "harden"},
    )  # fmt: skip
    return base.set_terms(config, distil=distil)
