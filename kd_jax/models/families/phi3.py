"""Phi-3, Phi-3.5 and Phi-4: Llama with fused projections, a rotary embedding of a part of each head, and `longrope`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kd_jax.models.families import llama, mistral
from kd_jax.models.families.fields import Fields, Layout, Tensor, flag, refuse_unless, window_from_hf
from kd_jax.models.families.rotary_fields import LENGTH, RotaryNames
from kd_jax.storage.files import Json

if TYPE_CHECKING:
    from kd_jax.models.config import ModelConfig

ARCHITECTURES = {"phi3": "Phi3ForCausalLM"}
FIXED: Json = {}
DEFAULTS = {"activation": "silu", "norm_eps": 1e-5, "sliding_window": None, "rotary_share": 1.0}
PREFIX, TOLERATED, TIED = llama.PREFIX, llama.TOLERATED, llama.TIED
# transformers reads the names of the scaling in the first Phi-3 folders, 'su' and 'yarn', as 'longrope'.
ROTARY = RotaryNames(
    share="partial_rotary_factor", types=("default", "longrope"), aliases={"su": "longrope", "yarn": "longrope"}
)
check = mistral.check


def from_hf(fields: Fields) -> Json:
    """Returns the keywords of `ModelConfig` from config.json."""
    for name in ("attention_bias", "mlp_bias"):  # transformers reads neither field: Phi-3 has no biases
        refuse_unless(not flag(fields, name, False), fields, name, "false in a phi3 config")
    fields = {"sliding_window": None, **fields, LENGTH: fields.get(LENGTH) or 4096}  # the defaults of transformers
    return llama.common_from_hf(fields, rotary=ROTARY) | window_from_hf(fields)


def to_hf(config: ModelConfig) -> Json:
    """Returns the fields of config.json from a `ModelConfig`."""
    return llama.common_to_hf(config, rotary=ROTARY) | {"sliding_window": config.sliding_window}


def tensors(config: ModelConfig) -> Layout:
    """Returns each parameter's tensor on disk. One tensor has query, key and value, and another has gate and up."""
    queries, shared = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    inner, layout = config.intermediate_size, llama.tensors(config)
    fused = {
        "attention/query": ("self_attn.qkv_proj", 0, queries + 2 * shared),
        "attention/key": ("self_attn.qkv_proj", queries, queries + 2 * shared),
        "attention/value": ("self_attn.qkv_proj", queries + shared, queries + 2 * shared),
        "mlp/gate": ("mlp.gate_up_proj", 0, 2 * inner),
        "mlp/up": ("mlp.gate_up_proj", inner, 2 * inner),
    }
    for i in range(config.num_layers):
        for path, (name, first, columns) in fused.items():
            tensor = Tensor(f"model.layers.{i}.{name}.weight", transposed=True, first=first, columns=columns)
            layout[f"layers/{i}/{path}/kernel"] = tensor
    return layout
