"""MiniLLM: the policy gradient of KL(q || p) on responses sampled from the mixture 0.8 q + 0.2 p (Gu et al.,
https://arxiv.org/abs/2306.08543, 2024).

Importance weights correct for the mixture, and the returns are normalised by length. Further terms are the exact KL of
each single step, and language modelling on a second stream.

    python -m kd_jax.main --config=configs/minillm.py --workdir=runs/minillm

The value 0.2 of sampling.teacher_share and policy.clip is that of the paper. The paper samples 256 rows at a time, and
trains on these rows 4 times. This config samples 4 batches at a time. The published code has other values:
policy.discount=0.95, policy.include_current=True, policy.whiten=all, policy.reward_scale=0.5, policy.reward_limit=100,
and single_step.importance=False, as the author intends. On the second stream, hard labels and KL(p || q) have the
coefficient 0.5 each, as in the published code. The second stream of the paper is OpenWebText. The second stream of this
config is the training text of the task, with the prompts. The flags for plain text of your own are
--config.text.name=text --config.text.options.path=FILE.

The method has been run in the settings docstrings and smoke. Result (experiments/methods_docstrings) from one
fine-tuned student, on 116,000 tokens of docstrings, mean of three seeds: KL(p || q) 2.26 -> 2.32, KL(q || p) 2.62 ->
2.45, KL(q || p) on the student's own text 2.35 -> 2.36, ROUGE-L 7.6 -> 5.9.
"""

from ml_collections import ConfigDict

from configs import base, settings


def get_config(setting: str = "docstrings") -> ConfigDict:
    config = settings.get(setting)
    config.prefixes = ConfigDict({"name": "student", "every": 4, "epochs": 4})
    config.sampling.teacher_share = 0.2
    config.text.name = config.data.get_oneway_ref("name")
    return base.set_terms(
        config,
        policy=base.term(kind="policy_gradient", rows="student"),
        single_step=base.term(divergence={"name": "reverse_kl"}, rows="student", importance=True),
        text_labels=base.hard_labels(rows="text", coefficient=0.5),
        text=base.term(rows="text", coefficient=0.5),
    )
