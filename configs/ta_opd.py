"""TA-OPD: reverse KL at the 5 % of the tokens that are most teachable (https://arxiv.org/abs/2605.26844, 2026).

    python -m kd_jax.main --config=configs/ta_opd.py --workdir=runs/ta_opd

A token is teachable if the models differ, and if the teacher still has mass on the student's likeliest tokens. The
score is the product of the divergence over both models' 16 likeliest tokens and of the teacher's mass on the
student's, each scaled by its 5 % and 95 % quantiles. At least one token of each row counts. Of two published versions
the config follows the later one, which scales over counted tokens only.

The method has been run in the setting smoke.
"""

from ml_collections import ConfigDict

from configs import base, settings


def get_config(setting: str = "docstrings") -> ConfigDict:
    config = settings.get(setting)
    config.prefixes = ConfigDict({"name": "student", "every": 1, "epochs": 1})
    of = ({"name": "union_divergence", "k": 16}, {"name": "teacher_mass_on_student_top", "k": 16, "shared_only": True})
    tokens = {
        "name": "top_fraction", "of": of, "combine": "product", "scale": "quantiles", "fraction": 0.05, "round": "ceil",
        "at_least_per_row": 1, "divide_by": "kept",
    }  # fmt: skip
    distil = base.term(divergence={"name": "reverse_kl"}, rows="student", tokens=tokens)
    return base.set_terms(config, distil=distil)
