"""The families of models. Each file has the names and settings of one family of the transformer.

A family module defines:

- `ARCHITECTURES`: a dict from model_type in config.json to the class that the field architectures must name.
- `FIXED`: the settings in which the family differs from `config.PLAIN`, and that a `ModelConfig` cannot choose.
- `DEFAULTS`: the settings that a `ModelConfig` of this family can choose, with their defaults.
- `check`: a function that checks a `ModelConfig` of this family.
- `from_hf` and `to_hf`: functions that read and write the fields of config.json.
- `tensors`: a function that returns the tensor on disk of each parameter.
- `PREFIX`: the first part of the tensor names, which checkpoints without an output matrix omit.
- `TOLERATED`: patterns of the names of tensors that are ignored.
- `TIED`: the name of the output matrix, which is ignored if the matrix equals the embedding.
"""

from kd_jax.models.families import (
    gemma2,
    gemma3_text,
    gpt2,
    gpt_neox,
    granite,
    llama,
    mistral,
    mixtral,
    olmo2,
    opt,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    smollm3,
    stablelm,
)

FAMILIES = {
    "gemma2": gemma2,
    "gemma3_text": gemma3_text,
    "gpt2": gpt2,
    "gpt_neox": gpt_neox,
    "granite": granite,
    "llama": llama,
    "mistral": mistral,
    "mixtral": mixtral,
    "olmo2": olmo2,
    "opt": opt,
    "phi3": phi3,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
    "smollm3": smollm3,
    "stablelm": stablelm,
}
