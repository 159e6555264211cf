"""Llama and models with the same structure: TinyLlama, OpenLLaMA, SmolLM2 and Mistral.

A Mistral checkpoint becomes a `llama` model with a `sliding_window`. A `llama` model with a window is saved as Mistral.
Without a window, Llama and Mistral compute the same function.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kd_jax.models.families.fields import (
    Fields,
    Tensor,
    flag,
    layer_types,
    real,
    refuse_unless,
    required,
    whole,
    window_from_hf,
)
from kd_jax.models.families.rotary_fields import rotary_from_hf, rotary_to_hf
from kd_jax.storage.files import Json

if TYPE_CHECKING:
    from kd_jax.models.config import ModelConfig

ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
FIXED = {"learned_positions": False, "layer_norm": False, "gated_mlp": True, "qk_norm": False}
DEFAULTS = {
    "activation": "silu",
    "norm_eps": 1e-6,
    "attention_bias": False,
    "output_bias": False,
    "mlp_bias": False,
}
PREFIX = "model."
# The rotary frequencies, which old checkpoints store as a buffer. Every implementation computes them from the config.
TOLERATED = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"model\.rotary_emb\.inv_freq")
TIED = "lm_head.weight"


def check(config: ModelConfig) -> None:
    """Checks that config.json can express the biases.

    The field `attention_bias` of config.json applies to all four projections. Mistral has neither this field nor
    `mlp_bias`.
    """
    if config.attention_bias != config.output_bias:
        raise ValueError(
            f"family {config.family!r} has a bias on all four attention projections or on none; "
            f"got attention_bias={config.attention_bias}, output_bias={config.output_bias}."
        )
    if config.family == "llama" and config.sliding_window is not None:
        if config.attention_bias or config.mlp_bias or config.sliding_layers is not None:
            raise ValueError(
                f"family 'llama' with sliding_window={config.sliding_window} is saved as Mistral, which has no biases and the "
                f"window in every layer; got attention_bias={config.attention_bias}, mlp_bias={config.mlp_bias}, "
                f"sliding_layers={config.sliding_layers}."
            )


def from_hf(fields: Fields) -> Json:
    """Returns the keywords of `ModelConfig` from config.json."""
    window: Json = {}
    if fields["model_type"] == "mistral":
        window = window_from_hf(fields)
        required(fields, "num_key_value_heads")  # the default of transformers is 8, not the number of heads
        for name in ("attention_bias", "mlp_bias"):  # transformers reads neither field: Mistral has no biases
            refuse_unless(not flag(fields, name, False), fields, name, "false in a mistral config")
    bias = flag(fields, "attention_bias", False)
    layer_types(fields, {"full_attention"})
    return (
        common_from_hf(fields)
        | window
        | {
            "attention_bias": bias,
            "output_bias": bias,
            "mlp_bias": flag(fields, "mlp_bias", False),
        }
    )


def to_hf(config: ModelConfig) -> Json:
    """Returns the fields of config.json from a `ModelConfig`."""
    if config.sliding_window is not None:
        return common_to_hf(config) | {"model_type": "mistral", "sliding_window": config.sliding_window}
    return common_to_hf(config) | {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}


def common_from_hf(fields: Fields) -> Json:
    """Returns the keywords of `ModelConfig` from the fields that Llama, Qwen2 and Qwen3 have in common."""
    return {
        "vocab_size": whole(fields, "vocab_size"),
        "hidden_size": whole(fields, "hidden_size"),
        "intermediate_size": whole(fields, "intermediate_size"),
        "num_layers": whole(fields, "num_hidden_layers"),
        "num_heads": whole(fields, "num_attention_heads"),
        "num_kv_heads": whole(fields, "num_key_value_heads", 0),
        "head_dim": whole(fields, "head_dim", 0),
        "max_positions": whole(fields, "max_position_embeddings"),
        "activation": fields.get("hidden_act", "silu"),
        "norm_eps": real(fields, "rms_norm_eps", 1e-6),
        "tie_embeddings": flag(fields, "tie_word_embeddings", False),
        **rotary_from_hf(fields),
    }


def common_to_hf(config: ModelConfig) -> Json:
    """Returns the fields that Llama, Qwen2 and Qwen3 have in common. This is the inverse of `common_from_hf`."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "hidden_act": config.activation,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        **rotary_to_hf(config.rotary, config.max_positions),
    }


def tensors(config: ModelConfig) -> dict[str, Tensor]:
    """Returns each parameter's tensor on disk. Qwen2 and Qwen3 use the same names."""
    layout = {
        "embed/embedding": Tensor("model.embed_tokens.weight"),
        "norm/scale": Tensor("model.norm.weight"),
    }
    if not config.tie_embeddings:
        layout["head/kernel"] = Tensor("lm_head.weight", transposed=True)
    projections = [
        ("attention/query", "self_attn.q_proj", config.attention_bias),
        ("attention/key", "self_attn.k_proj", config.attention_bias),
        ("attention/value", "self_attn.v_proj", config.attention_bias),
        ("attention/output", "self_attn.o_proj", config.output_bias),
        ("mlp/gate", "mlp.gate_proj", config.mlp_bias),
        ("mlp/up", "mlp.up_proj", config.mlp_bias),
        ("mlp/down", "mlp.down_proj", config.mlp_bias),
    ]
    norms = [("attention_norm", "input_layernorm"), ("mlp_norm", "post_attention_layernorm")]
    if config.qk_norm:
        norms += [("attention/query_norm", "self_attn.q_norm"), ("attention/key_norm", "self_attn.k_norm")]
    for i in range(config.num_layers):
        ours, theirs = f"layers/{i}", f"model.layers.{i}"
        for path, name, bias in projections:
            layout[f"{ours}/{path}/kernel"] = Tensor(f"{theirs}.{name}.weight", transposed=True)
            if bias:
                layout[f"{ours}/{path}/bias"] = Tensor(f"{theirs}.{name}.bias")
        for path, name in norms:
            layout[f"{ours}/{path}/scale"] = Tensor(f"{theirs}.{name}.weight")
    return layout
