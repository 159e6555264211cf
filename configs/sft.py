"""Hard labels only, -log q(token): fine-tunes a student, or trains a teacher.

The teacher of the setting is only a reference for the measurements. With --config.teacher.path= there is no teacher.

    python -m kd_jax.main --config=configs/sft.py --workdir=runs/sft

The method has been run in the settings docstrings and smoke. Result (experiments/methods_docstrings) from one
fine-tuned student, on 116,000 tokens of docstrings, mean of three seeds: KL(p || q) 2.26 -> 2.26, KL(q || p) 2.62 ->
2.63, KL(q || p) on the student's own text 2.35 -> 2.40, ROUGE-L 7.6 -> 7.5.
"""

from ml_collections import ConfigDict

from configs import base, settings


def get_config(setting: str = "docstrings") -> ConfigDict:
    config = settings.get(setting)
    return base.set_terms(config, hard_labels=base.hard_labels())
