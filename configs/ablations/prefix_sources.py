"""Whose text, and which direction of KL: the four objectives that the field compares, and a mixture of the two texts.

Forward KL on the teacher's text is sequence-level distillation with its whole distribution; reverse KL on the student's is
on-policy distillation.

python -m kd_jax.ablate --config=configs/ablations/prefix_sources.py --workdir=runs/prefix_sources
"""

from ml_collections import ConfigDict

from configs import forward_kl
from configs.ablations import base


def get_config(setting: str = "docstrings") -> ConfigDict:
    config = base.short(forward_kl.get_config(setting))
    rows = (
        config.steps * config.data.batch_size
    )  # written by the teacher; what has not ended is left out, and the rest read more than once
    axes = {
        "prefixes": (
            "prefixes.name",
            ("data", f"teacher(num_rows={rows})", "student(every=1)", "mixture(fraction=0.5)"),
        ),
        "divergence": ("objective.terms.distil.divergence.name", ("forward_kl()", "reverse_kl()")),
    }
    return base.ablation(config, axes)
