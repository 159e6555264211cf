"""Llama and models with the same structure: TinyLlama, OpenLLaMA and SmolLM2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kd_jax.models.families.fields import (
    Fields,
    Layout,
    Tensor,
    flag,
    layer_types,
    real,
    whole,
)
from kd_jax.models.families.rotary_fields import RotaryNames, rotary_from_hf, rotary_to_hf
from kd_jax.storage.files import Json

if TYPE_CHECKING:
    from kd_jax.models.config import ModelConfig

ARCHITECTURES = {"llama": "LlamaForCausalLM"}
FIXED: Json = {}
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
ROTARY = RotaryNames()
NORMS = (("attention_norm", "input_layernorm"), ("mlp_norm", "post_attention_layernorm"))


def check(config: ModelConfig) -> None:
    """Checks that the four projections of attention have biases, or none has a bias.

    The field `attention_bias` of config.json applies to all four.
    """
    if config.attention_bias != config.output_bias:
        raise ValueError(
            f"family {config.family!r} has a bias on all four attention projections or on none; "
            f"got attention_bias={config.attention_bias}, output_bias={config.output_bias}."
        )


def from_hf(fields: Fields) -> Json:
    """Returns the keywords of `ModelConfig` from config.json."""
    layer_types(fields, {"full_attention"})
    return common_from_hf(fields) | biases_from_hf(fields) | {"mlp_bias": flag(fields, "mlp_bias", False)}


def to_hf(config: ModelConfig) -> Json:
    """Returns the fields of config.json from a `ModelConfig`."""
    return common_to_hf(config) | {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}


def biases_from_hf(fields: Fields) -> Json:
    """Returns the biases of attention, which `attention_bias` decides for all four projections."""
    bias = flag(fields, "attention_bias", False)
    return {"attention_bias": bias, "output_bias": bias}


def common_from_hf(
    fields: Fields, *, eps: str = "rms_norm_eps", tied: bool = False, rotary: RotaryNames = ROTARY
) -> Json:
    """Returns the keywords of `ModelConfig` from the fields that most families have in common.

    Args:
      fields: the fields of config.json.
      eps, tied: the arguments of `sizes_from_hf`.
      rotary: the names of the fields of the rotary embedding.
    """
    return sizes_from_hf(fields, eps=eps, tied=tied) | rotary_from_hf(fields, rotary)


def common_to_hf(config: ModelConfig, *, eps: str = "rms_norm_eps", rotary: RotaryNames = ROTARY) -> Json:
    """Returns the fields that most families have in common. This is the inverse of `common_from_hf`."""
    return sizes_to_hf(config, eps=eps) | rotary_to_hf(config.rotary, config.max_positions, rotary)


def sizes_from_hf(
    fields: Fields, *, activation: str = "hidden_act", eps: str = "rms_norm_eps", tied: bool = False
) -> Json:
    """Returns the keywords of `ModelConfig` for the sizes, the activation and the norms.

    Args:
      fields: the fields of config.json.
      activation: the field of the activation function.
      eps: the field of the number that is added to the variance.
      tied: the default of `tie_word_embeddings`.

    Returns:
      The keywords. Without the fields of the activation and of `norm_eps`, these are absent, and the defaults of the
      family apply.
    """
    keywords = {
        "vocab_size": whole(fields, "vocab_size"),
        "hidden_size": whole(fields, "hidden_size"),
        "intermediate_size": whole(fields, "intermediate_size"),
        "num_layers": whole(fields, "num_hidden_layers"),
        "num_heads": whole(fields, "num_attention_heads"),
        "num_kv_heads": whole(fields, "num_key_value_heads", 0),
        "head_dim": whole(fields, "head_dim", 0),
        "max_positions": whole(fields, "max_position_embeddings"),
        "tie_embeddings": flag(fields, "tie_word_embeddings", tied),
    }
    if fields.get(activation) is not None:
        keywords["activation"] = fields[activation]
    return keywords if fields.get(eps) is None else keywords | {"norm_eps": real(fields, eps)}


def sizes_to_hf(config: ModelConfig, *, activation: str = "hidden_act", eps: str = "rms_norm_eps") -> Json:
    """Returns the fields of the sizes, the activation and the norms. This is the inverse of `sizes_from_hf`."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        activation: config.activation,
        eps: config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
    }


def tensors(config: ModelConfig) -> Layout:
    """Returns each parameter's tensor on disk. Most families use the same names."""
    return outer_tensors(config) | layer_tensors(config)


def outer_tensors(config: ModelConfig) -> Layout:
    """Returns the tensors of the embedding, of the final norm and of the output matrix."""
    layout: Layout = {"embed/embedding": Tensor("model.embed_tokens.weight")}
    layout |= norm_tensors(config, "norm", "model.norm")
    if not config.tie_embeddings:
        layout["head/kernel"] = Tensor("lm_head.weight", transposed=True)
    return layout


def layer_tensors(config: ModelConfig, norms: Sequence[tuple[str, str]] = NORMS) -> Layout:
    """Returns the tensors of the layers.

    Args:
      config: the config.
      norms: the names of a layer's norms, here and on disk.
    """
    projections = [
        ("attention/query", "self_attn.q_proj", config.attention_bias),
        ("attention/key", "self_attn.k_proj", config.attention_bias),
        ("attention/value", "self_attn.v_proj", config.attention_bias),
        ("attention/output", "self_attn.o_proj", config.output_bias),
        ("mlp/gate", "mlp.gate_proj", config.mlp_bias),
        ("mlp/up", "mlp.up_proj", config.mlp_bias),
        ("mlp/down", "mlp.down_proj", config.mlp_bias),
    ]
    layout: Layout = {}
    for i in range(config.num_layers):
        ours, theirs = f"layers/{i}", f"model.layers.{i}"
        for path, name, bias in projections:
            layout |= linear_tensors(f"{ours}/{path}", f"{theirs}.{name}", bool(bias))
        for path, name in norms:
            layout |= norm_tensors(config, f"{ours}/{path}", f"{theirs}.{name}")
        if config.qk_norm in ("head", "width"):
            for path, name in (("query_norm", "q_norm"), ("key_norm", "k_norm")):
                layout[f"{ours}/attention/{path}/scale"] = Tensor(f"{theirs}.self_attn.{name}.weight")
    return layout


def linear_tensors(path: str, name: str, bias: bool) -> Layout:
    """Returns the tensors of a projection, which is `torch.nn.Linear` on disk."""
    layout: Layout = {f"{path}/kernel": Tensor(f"{name}.weight", transposed=True)}
    return layout | ({f"{path}/bias": Tensor(f"{name}.bias")} if bias else {})


def norm_tensors(config: ModelConfig, path: str, name: str) -> Layout:
    """Returns the tensors of a norm: a scale, and for LayerNorm also a bias."""
    leaves = {"scale": "weight"} if config.norm_scale else {}
    leaves |= {"bias": "bias"} if config.layer_norm and config.norm_bias else {}
    return {f"{path}/{leaf}": Tensor(f"{name}.{stored}") for leaf, stored in leaves.items()}
