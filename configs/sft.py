"""Hard labels only, -log q(token): fine-tunes a student, or trains a teacher.

The setting's teacher is then only what the student is measured against; --config.teacher.path= leaves it out.

python -m kd_jax.main --config=configs/sft.py --workdir=runs/sft

Ran in docstrings and smoke. From one fine-tuned student, 116,000 tokens of docstrings, three seeds: KL(p || q) 2.26 -> 2.26,
KL(q || p) 2.62 -> 2.63, the latter on its own text 2.35 -> 2.40, ROUGE-L 7.6 -> 7.5 (experiments/methods_docstrings).
"""

from ml_collections import ConfigDict

from configs import base, settings


def get_config(setting: str = "docstrings") -> ConfigDict:
    config = settings.get(setting)
    return base.set_terms(config, hard_labels=base.hard_labels())
