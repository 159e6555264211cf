"""TAID: KL(r || q), with r proportional to p^t q^(1 - t) (Shing et al., https://arxiv.org/abs/2501.16937, 2025).

The q inside r is a constant to the gradient. The schedule of t is adaptive, from 0.4 to 1. In the scripts of the paper
t starts at 0.4 for Phi-3 and at 0.2 for Llama-2.

    python -m kd_jax.main --config=configs/taid.py --workdir=runs/taid

The method has been run in the settings docstrings and smoke. Result (experiments/methods_docstrings) from one
fine-tuned student, on 116,000 tokens of docstrings, mean of three seeds: KL(p || q) 2.26 -> 2.08, KL(q || p) 2.62 ->
2.30, KL(q || p) on the student's own text 2.35 -> 2.13, ROUGE-L 7.6 -> 7.4.
"""

from ml_collections import ConfigDict

from configs import base, settings


def get_config(setting: str = "docstrings") -> ConfigDict:
    config = settings.get(setting)
    t = {
        "name": "taid",
        "start": 0.4,
        "end": 1.0,
        "alpha": 5e-4,
        "beta": 0.99,
        "total_steps": config.get_oneway_ref("steps"),
    }
    distil = base.term(
        assistant={"name": "geometric_mixture"}, pair=("assistant", "student"), stop_gradient=True, weight=t
    )
    return base.set_terms(config, distil=distil)
