"""StableLM: Llama with LayerNorm, a rotary embedding of a part of each head, and an optional norm for each head."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kd_jax.models.families import llama
from kd_jax.models.families.fields import Fields, Layout, Stack, Tensor, flag, required
from kd_jax.models.families.rotary_fields import RotaryNames
from kd_jax.storage.files import Json

if TYPE_CHECKING:
    from kd_jax.models.config import ModelConfig

ARCHITECTURES = {"stablelm": "StableLmForCausalLM"}
FIXED = {"layer_norm": True}
DEFAULTS = {
    "activation": "silu", "norm_eps": 1e-5, "attention_bias": False, "qk_norm": "none", "parallel_norms": 0,
    "rotary_share": 0.25,
}  # fmt: skip
PREFIX, TOLERATED, TIED = llama.PREFIX, llama.TOLERATED, llama.TIED
ROTARY = RotaryNames(share="partial_rotary_factor", default_share=0.25)


def check(config: ModelConfig) -> None:
    """Checks that config.json can express the head size, the norms of query and key, and the parallel residual."""
    if config.head_dim * config.num_heads != config.hidden_size:
        raise ValueError(
            f"family 'stablelm' needs head_dim = hidden_size / num_heads; got hidden_size={config.hidden_size}, "
            f"num_heads={config.num_heads}, head_dim={config.head_dim}."
        )
    if config.qk_norm not in ("none", "each_head") or config.parallel_norms == 2:
        raise ValueError(
            f"family 'stablelm' has qk_norm 'none' or 'each_head', and parallel_norms 0 or 1; got {config.qk_norm!r} and "
            f"{config.parallel_norms}."
        )


def from_hf(fields: Fields) -> Json:
    """Returns the keywords of `ModelConfig` from config.json."""
    required(fields, "num_key_value_heads")  # the default of transformers is 32, not the number of heads
    keywords = llama.common_from_hf({**fields, "head_dim": None}, eps="layer_norm_eps", rotary=ROTARY)
    return keywords | {
        "attention_bias": flag(fields, "use_qkv_bias", False),
        "qk_norm": "each_head" if flag(fields, "qk_layernorm", False) else "none",
        "parallel_norms": int(flag(fields, "use_parallel_residual", False)),
    }


def to_hf(config: ModelConfig) -> Json:
    """Returns the fields of config.json from a `ModelConfig`."""
    fields = llama.common_to_hf(config, eps="layer_norm_eps", rotary=ROTARY) | {
        "use_qkv_bias": config.attention_bias,
        "qk_layernorm": config.qk_norm == "each_head",
        "use_parallel_residual": config.parallel_norms == 1,
    }
    return {name: value for name, value in fields.items() if name != "head_dim"}


def tensors(config: ModelConfig) -> Layout:
    """Returns each parameter's tensor on disk. The norm of each head is a tensor of its own."""
    norms = llama.NORMS[:1] if config.parallel_norms else llama.NORMS
    layout = llama.outer_tensors(config) | llama.layer_tensors(config, norms)
    if config.qk_norm == "each_head":
        for i in range(config.num_layers):
            for path, name, heads in (("query", "q", config.num_heads), ("key", "k", config.num_kv_heads)):
                stored = f"model.layers.{i}.self_attn.{name}_layernorm.norms"
                of_heads = Stack(tuple(Tensor(f"{stored}.{head}.weight") for head in range(heads)))
                layout[f"layers/{i}/attention/{path}_norm/scale"] = of_heads
    return layout
