"""DKD: decoupled knowledge distillation, which weighs the row's token and the rest of the vocabulary apart
(https://arxiv.org/abs/2203.08679, 2022).

    python -m kd_jax.main --config=configs/dkd.py --workdir=runs/dkd

The loss is the KL of (the row's token, the rest) plus 0.5 times the KL of the renormalised rests, as in TAID's
version for language models. TAID's code divides by the length of the padded batch; this config divides by the number
of counted tokens. BiLD's version standardises the logits first: --config.objective.terms.distil.logits.name=z_score.

The method has been run in the setting smoke.
"""

from ml_collections import ConfigDict

from configs import base, settings


def get_config(setting: str = "docstrings") -> ConfigDict:
    config = settings.get(setting)
    divergence = {"name": "decoupled_kl", "target_weight": 1.0, "rest_weight": 0.5}
    return base.set_terms(config, distil=base.term(divergence=divergence, temperature_squared=True))
