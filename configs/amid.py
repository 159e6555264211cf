"""AMiD: a divergence D(p || r) with an assistant r, the alpha-mixture of p and q (Shin et al.,
https://arxiv.org/abs/2510.15982, 2025).

The weight of the teacher in the assistant is 0.1, and alpha is -3. The paper uses alpha from -5 to 1. D is the
alpha-beta divergence at (0.2, 0.7). The gradient also flows through r.

    python -m kd_jax.main --config=configs/amid.py --workdir=runs/amid

The key pair accepts any two of teacher, student and assistant. The keys assistant.alpha and weight accept schedules,
such as --config.objective.terms.distil.assistant.alpha="linear_schedule(init_value=-5.0, end_value=1.0,
transition_steps=1000)".

The method has been run in the settings docstrings and smoke. Result (experiments/methods_docstrings) from one
fine-tuned student, on 116,000 tokens of docstrings, mean of three seeds: KL(p || q) 2.26 -> 3.30, KL(q || p) 2.62 ->
2.74, KL(q || p) on the student's own text 2.35 -> 2.67, ROUGE-L 7.6 -> 10.4.
"""

from ml_collections import ConfigDict

from configs import base, settings


def get_config(setting: str = "docstrings") -> ConfigDict:
    config = settings.get(setting)
    distil = base.term(
        divergence={"name": "alpha_beta", "alpha": 0.2, "beta": 0.7},
        assistant={"name": "alpha_mixture", "alpha": -3.0},
        pair=("teacher", "assistant"),
        weight=0.1,
    )
    return base.set_terms(config, distil=distil)
