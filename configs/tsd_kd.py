"""TSD-KD: a Jensen-Shannon divergence whose weight is larger where the student is less sure than the teacher, and the
student's entropy at its most uncertain tokens (https://arxiv.org/abs/2603.13260, 2026).

    python -m kd_jax.main --config=configs/tsd_kd.py --workdir=runs/tsd_kd

The weight of a token is sigmoid(H(q) - H(p)), and the sum is divided by the number of all counted tokens. The
divergence has the teacher's share 0.9. The entropy is averaged over the tenth of the counted tokens with the largest
entropy, as in the paper. The published code keeps nine tenths, because it takes the quantile of level 0.1, and its
quantile also counts padding. The published code has a third part that this config leaves out: its ranking loss raises
the order that the teacher likes least.

The method has been run in the setting smoke.
"""

from ml_collections import ConfigDict

from configs import base, settings


def get_config(setting: str = "docstrings") -> ConfigDict:
    config = settings.get(setting)
    config.prefixes = ConfigDict({"name": "student", "every": 1, "epochs": 1})
    tokens = {"name": "relative_confidence", "divide_by": "all"}
    distil = base.term(divergence={"name": "jensen_shannon", "weight": 0.9}, rows="student", tokens=tokens)
    uncertain = {"name": "quantile", "of": "student_entropy", "at_least": 0.9, "divide_by": "kept"}
    entropy = base.term(divergence={"name": "entropy"}, pair=("student",), rows="student", tokens=uncertain)
    return base.set_terms(config, distil=distil, entropy=entropy)
