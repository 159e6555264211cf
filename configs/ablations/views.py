"""Compares views of a teacher that is the student itself: before training, or an average of the students.

python -m kd_jax.ablate --config=configs/ablations/views.py --workdir=runs/views
"""

from ml_collections import ConfigDict

from configs import opsd
from configs.ablations import base


def get_config(setting: str = "docstrings") -> ConfigDict:
    config = base.short(opsd.get_config(setting))
    config.sampling.rollouts_per_prompt = 4
    views = (
        "template(text='{prompt}\\n\\nA hint: {hint}')",
        "template(text='{prompt}\\n\\nA reference answer is:\\n{response}')",
        "successful_rollout(reward='rouge_l', at_least=30.0)",
    )
    axes = {"view": ("teacher.view.name", views), "follow": ("teacher.follow", (0.0, 0.05))}
    return base.ablation(config, axes)
