"""KL(q || p): the student says only what the teacher may say (Gu et al., https://arxiv.org/abs/2306.08543, 2024).

python -m kd_jax.main --config=configs/reverse_kl.py --workdir=runs/reverse_kl

Ran in docstrings and smoke. From one fine-tuned student, 116,000 tokens of docstrings, three seeds: KL(p || q) 2.26 -> 2.36,
KL(q || p) 2.62 -> 2.07, the latter on its own text 2.35 -> 2.08, ROUGE-L 7.6 -> 7.9 (experiments/methods_docstrings).
"""

from ml_collections import ConfigDict

from configs import base, settings


def get_config(setting: str = "docstrings") -> ConfigDict:
    config = settings.get(setting)
    return base.set_terms(config, distil=base.term(divergence={"name": "reverse_kl"}))
