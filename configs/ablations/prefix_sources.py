"""Compares sources of the training text, with both directions of KL.

The grid has the four objectives that the literature compares, and a mixture of the data's and the student's text.

Forward KL on the teacher's text is sequence-level distillation with the teacher's whole distribution. Reverse KL on the
student's text is on-policy distillation.

python -m kd_jax.ablate --config=configs/ablations/prefix_sources.py --workdir=runs/prefix_sources
"""

from ml_collections import ConfigDict

from configs import forward_kl
from configs.ablations import base


def get_config(setting: str = "docstrings") -> ConfigDict:
    config = base.short(forward_kl.get_config(setting))
    rows = (
        config.steps * config.data.batch_size
    )  # rows that the teacher writes; responses without an end are dropped, and the others are read more than once
    axes = {
        "prefixes": (
            "prefixes.name",
            ("data", f"teacher(num_rows={rows})", "student(every=1)", "mixture(fraction=0.5)"),
        ),
        "divergence": ("objective.terms.distil.divergence.name", ("forward_kl()", "reverse_kl()")),
    }
    return base.ablation(config, axes)
