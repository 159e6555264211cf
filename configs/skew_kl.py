"""The loss of DistiLLM, KL(p || 0.1 p + 0.9 q), on a fixed dataset (Ko et al., https://arxiv.org/abs/2402.03898, 2024).

The flag of the reverse direction is --config.objective.terms.distil.divergence.name=skew_reverse_kl.

    python -m kd_jax.main --config=configs/skew_kl.py --workdir=runs/skew_kl

The method has been run in the settings docstrings and smoke. Result (experiments/methods_docstrings) from one
fine-tuned student, on 116,000 tokens of docstrings, mean of three seeds: KL(p || q) 2.26 -> 2.19, KL(q || p) 2.62 ->
2.15, KL(q || p) on the student's own text 2.35 -> 2.01, ROUGE-L 7.6 -> 8.1.
"""

from ml_collections import ConfigDict

from configs import base, settings


def get_config(setting: str = "docstrings") -> ConfigDict:
    config = settings.get(setting)
    return base.set_terms(config, distil=base.term(divergence={"name": "skew_forward_kl", "skew": 0.1}))
