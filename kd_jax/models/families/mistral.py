"""Mistral: Llama with a sliding window in every layer, and without biases."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kd_jax.models.families import llama
from kd_jax.models.families.fields import Fields, flag, refuse_unless, required, window_from_hf
from kd_jax.storage.files import Json

if TYPE_CHECKING:
    from kd_jax.models.config import ModelConfig

ARCHITECTURES = {"mistral": "MistralForCausalLM"}
FIXED: Json = {}
DEFAULTS = {"activation": "silu", "norm_eps": 1e-6, "sliding_window": None}
PREFIX, TOLERATED, TIED = llama.PREFIX, llama.TOLERATED, llama.TIED
tensors = llama.tensors


def check(config: ModelConfig) -> None:
    """Checks that all layers have the window, because config.json has no field for some of the layers."""
    if config.sliding_layers is not None:
        raise ValueError(
            f"family {config.family!r} has the sliding window in every layer; got sliding_layers={config.sliding_layers}."
        )


def from_hf(fields: Fields) -> Json:
    """Returns the keywords of `ModelConfig` from config.json."""
    required(fields, "num_key_value_heads")  # the default of transformers is 8, not the number of heads
    for name in ("attention_bias", "mlp_bias"):  # transformers reads neither field: Mistral has no biases
        refuse_unless(not flag(fields, name, False), fields, name, "false in a mistral config")
    return llama.common_from_hf(fields) | window_from_hf(fields)


def to_hf(config: ModelConfig) -> Json:
    """Returns the fields of config.json from a `ModelConfig`."""
    return llama.common_to_hf(config) | {"sliding_window": config.sliding_window}
