"""FiRe-OPD: on-policy distillation with token weights from both models' confidence, without the rows that the
teacher finds least likely (https://arxiv.org/abs/2606.02684, 2026).

    python -m kd_jax.main --config=configs/fire_opd.py --workdir=runs/fire_opd

The weight is (1 + a (1 - H(p) / max H(p))) (1 + b H(q) / max H(q)), divided by the mean weight of the batch. Rows
whose mean log p is below the 20 % quantile are dropped. As in the published code, the mean includes the dropped rows;
the paper takes the mean over each row.

The method has been run in the setting smoke. There the student is far from the teacher, most rewards are negative, and
the dropped rows make KL(q || p) rise. The gate suits a student that is already near its teacher.
"""

from ml_collections import ConfigDict

from configs import base, settings


def get_config(setting: str = "docstrings") -> ConfigDict:
    config = settings.get(setting)
    config.prefixes = ConfigDict({"name": "student", "every": 1, "epochs": 1})
    policy = base.policy(discount=0.0, include_current=True, length_normalised=False, clip=0.2)
    distil = base.term(
        kind="policy_gradient", policy=policy, rows="student",
        tokens={"name": "confidence_product", "alpha": 1.0, "beta": 1.0, "divide_by": "all"},
        row_gate={"name": "drop_lowest", "of": "log_p", "fraction": 0.2},
    )  # fmt: skip
    return base.set_terms(config, distil=distil)
