"""Does a larger teacher make a better student? Three teachers, three methods, a student of 0.2 million parameters.

The two smaller teachers are made first:

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
    # The divergences are from different teachers: the cross-entropy and ROUGE-L alone are of one measure.
    metrics = ("cross_entropy", "rouge_l", "forward_kl", "reverse_kl")
    return base.ablation(bases, {"teacher": ("teacher.path", teachers)}, metrics=metrics)


def _teacher(hidden_size: int, num_layers: int) -> ConfigDict:
    """A run that makes a teacher from hard labels; `teacher` is there for its tokenizer and to compare with."""
    config = sft.get_config("docstrings")
    config.steps = 400
    config.eval_every = config.checkpoint_every = 200
    config.student.config.update(hidden_size=hidden_size, num_layers=num_layers, intermediate_size=5 * hidden_size // 2)
    return config
