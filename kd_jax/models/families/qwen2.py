"""Qwen2 and Qwen2.5: Llama with a bias on query, key and value."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kd_jax.models.families import llama
from kd_jax.models.families.fields import Fields, required, windows_from_hf, windows_to_hf
from kd_jax.storage.files import Json

if TYPE_CHECKING:
    from kd_jax.models.config import ModelConfig

ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM"}
FIXED = {"attention_bias": True}
DEFAULTS = {"activation": "silu", "norm_eps": 1e-6, "sliding_window": None}
PREFIX, TOLERATED, TIED = llama.PREFIX, llama.TOLERATED, llama.TIED
tensors = llama.tensors


def check(config: ModelConfig) -> None:
    """Checks nothing, because FIXED already covers all limits of this family."""


def from_hf(fields: Fields) -> Json:
    """Returns the keywords of `ModelConfig` from config.json."""
    required(fields, "num_key_value_heads")  # the default of transformers is 32, not the number of heads
    return llama.common_from_hf(fields) | windows_from_hf(fields)


def to_hf(config: ModelConfig) -> Json:
    """Returns the fields of config.json from a `ModelConfig`."""
    windows = windows_to_hf(config.sliding_window, config.layers_with_window, config.num_layers)
    return llama.common_to_hf(config) | windows
