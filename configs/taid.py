"""TAID: KL(r || q), r proportional to p^t q^(1 - t) with its q a constant, t adaptive from 0.4 to 1 (Shing et al.,
https://arxiv.org/abs/2501.16937, 2025; its scripts' start is 0.4 for Phi-3 and 0.2 for Llama-2).

    python -m kd_jax.main --config=configs/taid.py --workdir=runs/taid

Ran in docstrings and smoke. From one fine-tuned student, 116,000 tokens of docstrings, three seeds: KL(p || q) 2.26 -> 2.08,
KL(q || p) 2.62 -> 2.30, the latter on its own text 2.35 -> 2.13, ROUGE-L 7.6 -> 7.4 (experiments/methods_docstrings).
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
