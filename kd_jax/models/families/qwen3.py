"""Qwen3 (dense): Llama with an RMS norm on each head's query and key, and a separate setting for the head size."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kd_jax.models.families import llama
from kd_jax.models.families.fields import Fields, required, windows_from_hf, windows_to_hf
from kd_jax.storage.files import Json

if TYPE_CHECKING:
    from kd_jax.models.config import ModelConfig

ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM"}
FIXED = {"qk_norm": "head"}
DEFAULTS = {
    "activation": "silu", "norm_eps": 1e-6, "attention_bias": False, "output_bias": False, "sliding_window": None,
}  # fmt: skip
PREFIX, TOLERATED, TIED = llama.PREFIX, llama.TOLERATED, llama.TIED
check, tensors = llama.check, llama.tensors


def from_hf(fields: Fields) -> Json:
    """Returns the keywords of `ModelConfig` from config.json."""
    # The defaults of transformers are 32 and 128, independent of the other sizes.
    required(fields, "num_key_value_heads")
    required(fields, "head_dim")
    return llama.common_from_hf(fields) | windows_from_hf(fields) | llama.biases_from_hf(fields)


def to_hf(config: ModelConfig) -> Json:
    """Returns the fields of config.json from a `ModelConfig`."""
    windows = windows_to_hf(config.sliding_window, config.layers_with_window, config.num_layers)
    return llama.common_to_hf(config) | windows | {"attention_bias": config.attention_bias}
