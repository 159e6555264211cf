"""KL(p || q): word-level knowledge distillation (Hinton et al., https://arxiv.org/abs/1503.02531, 2015).

    python -m kd_jax.main --config=configs/forward_kl.py --workdir=runs/forward_kl

The method has been run in the settings docstrings, smoke and dolly_smollm2 (experiments/smollm2_dolly). Result
(experiments/methods_docstrings) from one fine-tuned student, on 116,000 tokens of docstrings, mean of three seeds: KL(p
|| q) 2.26 -> 2.09, KL(q || p) 2.62 -> 2.45, KL(q || p) on the student's own text 2.35 -> 2.25, ROUGE-L 7.6 -> 7.8.
"""

from ml_collections import ConfigDict

from configs import base, settings


def get_config(setting: str = "docstrings") -> ConfigDict:
    config = settings.get(setting)
    return base.set_terms(config, distil=base.term(divergence={"name": "forward_kl"}))
