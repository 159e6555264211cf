"""Mixtral: Mistral with a mixture of experts in every layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kd_jax.models.families import expert_fields, llama, mistral
from kd_jax.models.families.expert_fields import ExpertNames
from kd_jax.models.families.fields import Fields, Layout, optional_window, required
from kd_jax.models.families.rotary_fields import RotaryNames
from kd_jax.storage.files import Json

if TYPE_CHECKING:
    from kd_jax.models.config import ModelConfig

ARCHITECTURES = {"mixtral": "MixtralForCausalLM"}
FIXED: Json = {}
DEFAULTS = {"activation": "silu", "norm_eps": 1e-5, "sliding_window": None, "num_experts": 8}
PREFIX, TOLERATED, TIED = llama.PREFIX, llama.TOLERATED, llama.TIED
NAMES = ExpertNames("block_sparse_moe", gate="w1", up="w3", down="w2")
ROTARY = RotaryNames(default_base=1e6)


def check(config: ModelConfig) -> None:
    """Checks that all layers have experts of the usual width, because config.json has no fields for these settings."""
    mistral.check(config)
    expert_fields.check_experts(config)
    expected = {"expert_size": config.intermediate_size, "dense_layers": (), "normalise_experts": True}
    for name, value in expected.items():
        if getattr(config, name) != value:
            raise ValueError(f"family 'mixtral' has {name}={value}; got {getattr(config, name)!r}.")


def from_hf(fields: Fields) -> Json:
    """Returns the keywords of `ModelConfig` from config.json."""
    required(fields, "num_key_value_heads")  # the default of transformers is 8, not the number of heads
    experts = expert_fields.experts_from_hf(fields, default_count=8, default_chosen=2)
    return llama.common_from_hf(fields, rotary=ROTARY) | experts | {"sliding_window": optional_window(fields)}


def to_hf(config: ModelConfig) -> Json:
    """Returns the fields of config.json from a `ModelConfig`."""
    experts = expert_fields.experts_to_hf(config)
    return llama.common_to_hf(config, rotary=ROTARY) | experts | {"sliding_window": config.sliding_window}


def tensors(config: ModelConfig) -> Layout:
    """Returns each parameter's tensor on disk."""
    return expert_fields.tensors(config, NAMES)
