"""SmolLM2-135M-Instruct into every third of its layers on Dolly, sized for an hour on two CPU cores."""

from ml_collections import ConfigDict

from configs import forward_kl


def get_config() -> ConfigDict:
    config = forward_kl.get_config("dolly_smollm2")
    config.steps = 320
    config.learning_rate.init_value = 1e-3
    config.data.max_length = 160
    config.data.max_prompt_length = 96
    config.data.eval_rows = 48
    config.data.options.path = "databricks-dolly-15k.jsonl.gz"
    config.eval_every = 80
    config.checkpoint_every = 40
    config.log_every = 1
    return config
