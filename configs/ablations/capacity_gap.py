"""Compares three teachers of different sizes with three methods, to see if a larger teacher makes a better student.

The student has 0.2 million parameters.

The first two commands train the two smaller teachers. The third command runs the ablation:

python -m kd_jax.main --config=configs/ablations/capacity_gap.py:small --workdir=runs/teacher_small
python -m kd_jax.main --config=configs/ablations/capacity_gap.py:medium --workdir=runs/teacher_medium
python -m kd_jax.ablate --config=configs/ablations/capacity_gap.py --workdir=runs/capacity_gap
"""

from ml_collections import ConfigDict

from configs import forward_kl, reverse_kl, sft, taid
from configs.ablations import base

SIZES = {"small": (128, 2), "medium": (192, 4)}  # hidden size and layers


def get_config(setting: str = "docstrings") -> ConfigDict:
    if setting in SIZES:
        return _teacher(*SIZES[setting])
    methods = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "taid": taid}
    bases = {name: base.short(method.get_config(setting), steps=60) for name, method in methods.items()}
    for config in bases.values():
        config.student.config.update(hidden_size=min(48, config.student.config.hidden_size))
        config.student.config.update(intermediate_size=2 * config.student.config.hidden_size)
    teachers = ("runs/teacher_small/student", "runs/teacher_medium/student", "package:docstrings_teacher")
    # The divergences are measured against different teachers. Only the cross-entropy and ROUGE-L are comparable across
    # teachers.
    metrics = ("cross_entropy", "rouge_l", "forward_kl", "reverse_kl")
    return base.ablation(bases, {"teacher": ("teacher.path", teachers)}, metrics=metrics)


def _teacher(hidden_size: int, num_layers: int) -> ConfigDict:
    """Returns the config of a run that trains a teacher from hard labels.

    The config's own `teacher` gives the tokenizer and a model to compare with.
    """
    config = sft.get_config("docstrings")
    config.steps = 400
    config.eval_every = config.checkpoint_every = 200
    config.student.config.update(hidden_size=hidden_size, num_layers=num_layers, intermediate_size=5 * hidden_size // 2)
    return config
