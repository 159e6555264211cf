"""SmolLM2-135M-Instruct, on policy: the exact KL(q || p) on the student's own text.

The student was first trained with forward KL.
"""

from ml_collections import ConfigDict

from configs import opd


def get_config() -> ConfigDict:
    config = opd.get_config("dolly_smollm2")
    config.objective.terms.distil.kind = "divergence"  # over all tokens: the policy gradient's expectation
    config.steps = 60
    config.learning_rate.init_value = 3e-4
    config.student.init = "pretrained"
    config.student.path = "runs/smollm2_start/student"
    config.data.max_length = 160
    config.data.max_prompt_length = 96
    config.data.eval_rows = 48
    config.data.options.path = "databricks-dolly-15k.jsonl.gz"
    config.sampling.max_new_tokens = 64
    config.sampling.show_every = 20
    config.eval_every = 20
    config.checkpoint_every = 20
    config.log_every = 1
    return config
