"""Gemma 2: four norms with a scale of 1 + weight, caps of scores and logits, and a window in every other layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kd_jax.models.families import llama
from kd_jax.models.families.fields import (
    MANY_LAYERS,
    Fields,
    Layout,
    flag,
    layer_windows_from_hf,
    layer_windows_to_hf,
    real,
    refuse_unless,
    whole,
)
from kd_jax.models.families.rotary_fields import rotary_from_hf, rotary_to_hf
from kd_jax.storage.files import Json

if TYPE_CHECKING:
    from kd_jax.models.config import ModelConfig

ARCHITECTURES = {"gemma2": "Gemma2ForCausalLM"}
FIXED = {"norms": "around", "unit_offset": True, "sqrt_embedding": True}
DEFAULTS = {
    "activation": "gelu_pytorch_tanh", "norm_eps": 1e-6, "attention_bias": False, "output_bias": False,
    "sliding_window": None, "attention_scale": None, "attention_cap": None, "logit_cap": None,
}  # fmt: skip
PREFIX, TOLERATED, TIED = llama.PREFIX, llama.TOLERATED, llama.TIED
# The defaults of transformers.
SIZES = {"head_dim": 256, "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "sliding_window": 4096}
CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
NORMS = (
    ("attention_norm", "input_layernorm"), ("attention_out_norm", "post_attention_layernorm"),
    ("mlp_norm", "pre_feedforward_layernorm"), ("mlp_out_norm", "post_feedforward_layernorm"),
)  # fmt: skip


def check(config: ModelConfig) -> None:
    """Checks that config.json can express the biases and the scale of attention.

    The field `query_pre_attn_scalar` is a whole number, whose inverse square root is the scale.
    """
    llama.check(config)
    if config.attention_scale != round(config.attention_scale**-2) ** -0.5:
        raise ValueError(
            f"attention_scale={config.attention_scale} must be 1 / sqrt(n) for a whole number n in family {config.family!r}."
        )


def from_hf(fields: Fields) -> Json:
    """Returns the keywords of `ModelConfig` from config.json."""
    fields = {**CAPS, **fields}
    every_other = range(0, min(whole(fields, "num_hidden_layers"), MANY_LAYERS), 2)
    keywords = common_from_hf(fields, every_other) | rotary_from_hf(fields)
    return keywords | {"attention_cap": optional(fields, "attn_logit_softcapping")}


def to_hf(config: ModelConfig) -> Json:
    """Returns the fields of config.json from a `ModelConfig`."""
    rotary = rotary_to_hf(config.rotary, config.max_positions)
    return common_to_hf(config) | rotary | {"attn_logit_softcapping": config.attention_cap}


def common_from_hf(fields: Fields, windowed: Sequence[int]) -> Json:
    """Returns the keywords that Gemma 2 and Gemma 3 have in common, without the rotary embedding.

    Args:
      fields: the fields of config.json.
      windowed: the indices of the layers with a window, if the config has no `layer_types`.
    """
    fields = {**SIZES, **fields}
    causal = not flag(fields, "use_bidirectional_attention", False)
    refuse_unless(causal, fields, "use_bidirectional_attention", "false")
    return (
        llama.sizes_from_hf(fields, activation="hidden_activation", tied=True)
        | llama.biases_from_hf(fields)
        | layer_windows_from_hf(fields, windowed)
        | {
            "attention_scale": real(fields, "query_pre_attn_scalar") ** -0.5,
            "logit_cap": optional(fields, "final_logit_softcapping"),
        }
    )


def common_to_hf(config: ModelConfig) -> Json:
    """Returns the fields that Gemma 2 and Gemma 3 have in common. This is the inverse of `common_from_hf`."""
    # transformers makes the mask of a window even if no layer has a window.
    window = SIZES["sliding_window"] if config.sliding_window is None else config.sliding_window
    return llama.sizes_to_hf(config, activation="hidden_activation") | {
        "attention_bias": config.attention_bias,
        "query_pre_attn_scalar": round(config.attention_scale**-2),
        "final_logit_softcapping": config.logit_cap,
        **layer_windows_to_hf(window, config.layers_with_window, config.num_layers),
    }


def optional(fields: Fields, name: str) -> float | None:
    """Returns a positive number; None if the field is null or absent."""
    return None if fields.get(name) is None else real(fields, name)


def tensors(config: ModelConfig) -> Layout:
    """Returns each parameter's tensor on disk."""
    return llama.outer_tensors(config) | llama.layer_tensors(config, NORMS)
