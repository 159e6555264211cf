"""DistiLLM-2: skew KL on the teacher's responses and skew reverse KL on the student's, to the same prompts and drawn anew every
epoch; the skew by its curriculum, the student's share beta growing from 0.5 to 1 (Ko et al.,
https://arxiv.org/abs/2503.07067, 2025).

    python -m kd_jax.main --config=configs/distillm2.py --workdir=runs/distillm2

Of the paper: base skew 0.1 and at least 0.01, temperature 0.8 and top-p 0.95, means over each response. Its code has both skews
constant and weights 1 and 1: give the terms weight=0.1 and weight=0.9, coefficient=1, and reverse.stop_gradient=True.
Here a phase is 8 batches of prompts, 16 steps; prefixes.every=0 makes it an epoch.
"""

from ml_collections import ConfigDict, FieldReference

from configs import base, settings


def get_config(setting: str = "docstrings") -> ConfigDict:
    config = settings.get(setting)
    phase = FieldReference(8)
    config.prefixes = ConfigDict({"name": "paired", "every": phase, "epochs": 1})
    config.sampling.temperature = 0.8
    config.sampling.top_p = 0.95
    mixture = {"name": "arithmetic_mixture"}
    skew = {"name": "distillm2_skew", "base": 0.1, "low": 0.01, "reference_steps": 2 * phase, "per_row": False}
    half = config.get_ref("steps") // 2  # beta is at its least until then
    share = {"name": "linear_schedule", "transition_begin": half, "transition_steps": half}
    return base.set_terms(
        config,
        forward=base.term(
            assistant=mixture,
            pair=("teacher", "assistant"),
            rows="teacher",
            weight=skew | {"rows": "teacher"},
            coefficient=share | {"init_value": 0.25, "end_value": 0.0},
            average="sequence",
        ),
        reverse=base.term(
            divergence={"name": "forward_kl"},
            assistant=mixture,
            pair=("student", "assistant"),
            rows="student",
            weight=skew | {"rows": "student"},
            coefficient=share | {"init_value": 0.25, "end_value": 0.5},
            average="sequence",
        ),
    )
