"""The families of models: each file is names and settings of the one transformer.

A family gives `ARCHITECTURES` (model_type in config.json -> the class that must be named beside it), `FIXED`
(what a `ModelConfig` of this family cannot choose), `DEFAULTS` (what it can), `check`, `from_hf` and `to_hf`
(config.json), `tensors` (our parameter -> its tensor on disk), `PREFIX` (which checkpoints of the bare trunk
leave out), `TOLERATED` (tensors that are passed over) and `TIED` (the head's tensor, which is passed over
when it equals the embedding).
"""

from kd_jax.models.families import gpt2, llama, qwen2, qwen3

FAMILIES = {"gpt2": gpt2, "llama": llama, "qwen2": qwen2, "qwen3": qwen3}
