"""Qwen3-MoE: Qwen3 with a mixture of experts in most layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kd_jax.models.families import expert_fields, llama, mistral, qwen3
from kd_jax.models.families.expert_fields import ExpertNames
from kd_jax.models.families.fields import (
    MANY_LAYERS,
    QWEN_WINDOW,
    Fields,
    Layout,
    flag,
    optional_window,
    refuse_unless,
    required,
    whole,
)
from kd_jax.storage.files import Json

if TYPE_CHECKING:
    from kd_jax.models.config import ModelConfig

ARCHITECTURES = {"qwen3_moe": "Qwen3MoeForCausalLM"}
FIXED = qwen3.FIXED
DEFAULTS = qwen3.DEFAULTS | {"num_experts": 128}
PREFIX, TOLERATED, TIED = llama.PREFIX, llama.TOLERATED, llama.TIED
NAMES = ExpertNames("mlp", gate="gate_proj", up="up_proj", down="down_proj")


def check(config: ModelConfig) -> None:
    """Checks the biases of attention, that all layers have the window if there is a window, and that there are experts."""
    qwen3.check(config)
    mistral.check(config)
    expert_fields.check_experts(config)


def from_hf(fields: Fields) -> Json:
    """Returns the keywords of `ModelConfig` from config.json."""
    required(fields, "num_key_value_heads")  # the default of transformers is 4, not the number of heads
    used = flag(fields, "use_sliding_window", False)
    return (
        llama.common_from_hf(fields)
        | llama.biases_from_hf(fields)
        | expert_fields.experts_from_hf(fields, default_count=128, default_chosen=8)
        | {
            "sliding_window": optional_window({"sliding_window": QWEN_WINDOW, **fields}) if used else None,
            "expert_size": whole(fields, "moe_intermediate_size", 768),
            "dense_layers": _dense_layers(fields),
            "normalise_experts": flag(fields, "norm_topk_prob", False),
        }
    )


def _dense_layers(fields: Fields) -> tuple[int, ...]:
    """Returns the layers without experts: those in `mlp_only_layers`, and those between multiples of a step."""
    depth, step = whole(fields, "num_hidden_layers"), whole(fields, "decoder_sparse_step", 1)
    refuse_unless(step >= 1, fields, "decoder_sparse_step", "at least 1")
    listed = fields.get("mlp_only_layers") or []
    is_list = isinstance(listed, list) and all(isinstance(layer, int) for layer in listed)
    refuse_unless(is_list, fields, "mlp_only_layers", "a list of the indices of layers")
    layers = range(min(depth, MANY_LAYERS))
    return tuple(layer for layer in layers if layer in set(listed) or (layer + 1) % step)


def to_hf(config: ModelConfig) -> Json:
    """Returns the fields of config.json from a `ModelConfig`."""
    window = config.sliding_window
    return (
        llama.common_to_hf(config)
        | expert_fields.experts_to_hf(config)
        | {
            "attention_bias": config.attention_bias,
            "use_sliding_window": window is not None,
            "sliding_window": window,
            "moe_intermediate_size": config.expert_size,
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(config.dense_layers),
            "norm_topk_prob": config.normalise_experts,
        }
    )


def tensors(config: ModelConfig) -> Layout:
    """Returns each parameter's tensor on disk."""
    return expert_fields.tensors(config, NAMES)
