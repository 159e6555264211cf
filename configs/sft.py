"""Hard labels only, -log q(token): fine-tunes a student, or trains a teacher.

The setting's teacher is then only what the student is measured against; --config.teacher.path= leaves it out.

python -m kd_jax.main --config=configs/sft.py --workdir=runs/sft
"""

from ml_collections import ConfigDict

from configs import base, settings


def get_config(setting: str = "docstrings") -> ConfigDict:
    config = settings.get(setting)
    return base.set_terms(config, hard_labels=base.hard_labels())
