"""TIP: reverse KL at the half of the tokens at which the student is unsure or far from the teacher
(https://arxiv.org/abs/2604.14084, 2026).

    python -m kd_jax.main --config=configs/tip.py --workdir=runs/tip

The score of a token is h + d - h d, with h the student's entropy and d the divergence over the teacher's 16 likeliest
tokens, both scaled to [0, 1] over the batch. This is the paper's rule. The released code samples the tokens instead,
with probabilities that grow with both scores.

The method has been run in the setting smoke.
"""

from ml_collections import ConfigDict

from configs import base, settings


def get_config(setting: str = "docstrings") -> ConfigDict:
    config = settings.get(setting)
    config.prefixes = ConfigDict({"name": "student", "every": 1, "epochs": 1})
    tokens = {
        "name": "quantile", "at_least": 0.5, "of": ("student_entropy", {"name": "top_k_divergence", "k": 16}),
        "combine": "soft_or", "scale": "min_max", "divide_by": "kept",
    }  # fmt: skip
    distil = base.term(divergence={"name": "reverse_kl"}, rows="student", tokens=tokens)
    return base.set_terms(config, distil=distil)
