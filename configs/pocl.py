"""POCL: easy rows first, and a temperature that rises by stage (https://arxiv.org/abs/2506.05695, 2025).

The run has four stages. Stage s of 4 reads the first (s + 1) / 4 of the rows, and the last stage reads all rows. The
rows are ranked once before training, by the student's ROUGE-L on its own greedy answer and by its cross-entropy on the
response (reciprocal rank fusion). The temperature is 1, 1.33, 1.67 and 2. The distillation has the share 0.7, 0.8, 0.9
and 1 of the loss, and hard labels have the rest.

    python -m kd_jax.main --config=configs/pocl.py --workdir=runs/pocl

The paper adds rows after fixed intervals or at convergence. In its code a stage is a run of its own, with 8 epochs over
the rows of the stage and a fresh cosine of the learning rate, so that later stages have more steps. Here the stages are
equal parts of one run, and the learning rate is that of the setting. The ranking, the sizes of the stages, the
temperatures and the shares follow the code. The code samples the answers for the ranking at a low temperature (0.1 in
the script for OPT), and from the pretrained student. The divergence is KL(p || q) with the factor T^2, as in the code.
The code has no T^2 in some other divergences, for which set --config.objective.terms.distil.temperature_squared=False.

The ranking needs a student that can write, such as a pretrained one. All answers of a random student have the ROUGE-L 0,
and equal values keep the order of the file.

The method has been run in the setting smoke.
"""

from ml_collections import ConfigDict

from configs import base, settings

TEMPERATURES = (1.0, 1.33, 1.67, 2.0)
SHARES = (0.7, 0.8, 0.9, 1.0)


def get_config(setting: str = "docstrings") -> ConfigDict:
    config = settings.get(setting)
    config.steps = max(config.steps, len(TEMPERATURES))  # each stage needs a step, also in the setting smoke
    config.data.order = ConfigDict({"name": "curriculum", "stages": len(TEMPERATURES)})
    by_stage = lambda values: {"name": "by_stage", "values": values, "total_steps": config.get_oneway_ref("steps")}
    distil = base.term(
        divergence={"name": "forward_kl"}, temperature=by_stage(TEMPERATURES), temperature_squared=True,
        coefficient=by_stage(SHARES),
    )  # fmt: skip
    hard_labels = base.hard_labels(coefficient=by_stage(tuple(round(1 - share, 2) for share in SHARES)))
    return base.set_terms(config, distil=distil, hard_labels=hard_labels)
