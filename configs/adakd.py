"""AdaKD: the hardest tokens, each with a temperature of its own (https://arxiv.org/abs/2510.11615,
2025).

    python -m kd_jax.main --config=configs/adakd.py --workdir=runs/adakd

The difficulty of a token is the Hellinger distance of the models. Harder tokens get a lower temperature, exp(-0.5
tanh(ln(s / median))), and the loss has the factor T^2. The temperature is a constant to the gradient; in the
published code the gradient passes through it.

The share of kept tokens begins at 1, and follows a moving average of the loss. When the average has fallen by 5 %, the
share shrinks by 5 %, to 0.1 at least; when the average has risen by 5 %, the share grows by 5 %. These are the numbers
of the published script; the defaults of its code are 10 %. The code updates the average at every microbatch, and this
config at every step. The published script never reaches the code of the method, because another branch catches its
name first.

The method has been run in the setting smoke.
"""

from ml_collections import ConfigDict

from configs import base, settings


def get_config(setting: str = "docstrings") -> ConfigDict:
    config = settings.get(setting)
    fraction = {
        "name": "adaptive_fraction", "start": 1.0, "smallest": 0.1, "rate": 0.05, "tolerance": 0.05, "decay": 0.99,
        "warmup": 0.05, "total_steps": config.get_oneway_ref("steps"),
    }  # fmt: skip
    tokens = {"name": "top_fraction", "of": "hellinger", "fraction": fraction, "divide_by": "kept"}
    distil = base.term(
        divergence={"name": "reverse_kl"}, tokens=tokens, temperature_squared=True,
        temperature={"name": "difficulty", "of": "hellinger", "scale": 0.5, "direction": "harden"},
    )  # fmt: skip
    return base.set_terms(config, distil=distil)
