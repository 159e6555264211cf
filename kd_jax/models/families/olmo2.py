"""OLMo 2: Llama with the norms after attention and after the MLP, and one norm over all heads of query and key."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kd_jax.models.families import llama
from kd_jax.models.families.fields import Fields, Layout
from kd_jax.storage.files import Json

if TYPE_CHECKING:
    from kd_jax.models.config import ModelConfig

ARCHITECTURES = {"olmo2": "Olmo2ForCausalLM"}
FIXED = {"norms": "after", "qk_norm": "width"}
DEFAULTS = {"activation": "silu", "norm_eps": 1e-5, "attention_bias": False, "output_bias": False}
PREFIX, TOLERATED, TIED = llama.PREFIX, llama.TOLERATED, llama.TIED
NORMS = (("attention_out_norm", "post_attention_layernorm"), ("mlp_out_norm", "post_feedforward_layernorm"))
check = llama.check


def from_hf(fields: Fields) -> Json:
    """Returns the keywords of `ModelConfig` from config.json."""
    return llama.common_from_hf(fields) | llama.biases_from_hf(fields)


def to_hf(config: ModelConfig) -> Json:
    """Returns the fields of config.json from a `ModelConfig`."""
    return llama.common_to_hf(config) | {"attention_bias": config.attention_bias}


def tensors(config: ModelConfig) -> Layout:
    """Returns each parameter's tensor on disk."""
    return llama.outer_tensors(config) | llama.layer_tensors(config, NORMS)
