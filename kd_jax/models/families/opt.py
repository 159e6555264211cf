"""OPT: learned positions from row 2 on, LayerNorm and ReLU. OPT 350M has its norms after the sums, and projections."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kd_jax.models.families import llama
from kd_jax.models.families.fields import Fields, Layout, Tensor, check_equal_heads, flag, whole
from kd_jax.storage.files import Json

if TYPE_CHECKING:
    from kd_jax.models.config import ModelConfig

ARCHITECTURES = {"opt": "OPTForCausalLM"}
FIXED = {"learned_positions": True, "position_offset": 2, "layer_norm": True, "gated_mlp": False, "norm_eps": 1e-5}
DEFAULTS = {
    "activation": "relu", "attention_bias": True, "output_bias": True, "mlp_bias": True, "norms": "before",
    "final_norm": True, "norm_scale": True, "norm_bias": True, "embedding_size": None,
}  # fmt: skip
PREFIX, TOLERATED, TIED = "model.", (), "lm_head.weight"


def check(config: ModelConfig) -> None:
    """Checks that config.json can express the settings: it has one field for all biases, and one for all norms."""
    check_equal_heads(config)
    biases = {"attention_bias": config.attention_bias, "output_bias": config.output_bias, "mlp_bias": config.mlp_bias}
    if len(set(biases.values())) > 1:
        raise ValueError(f"family 'opt' has all biases or none; got {biases}.")
    if config.norm_scale != config.norm_bias:
        raise ValueError(
            f"family 'opt' has norms with scale and bias, or without both; got norm_scale={config.norm_scale}, "
            f"norm_bias={config.norm_bias}."
        )
    if config.norms not in ("before", "residual") or (config.norms == "residual" and config.final_norm):
        raise ValueError(
            f"family 'opt' has norms='before', or norms='residual' with final_norm=False; got norms={config.norms!r}, "
            f"final_norm={config.final_norm}."
        )


def from_hf(fields: Fields) -> Json:
    """Returns the keywords of `ModelConfig` from config.json."""
    bias, affine = flag(fields, "enable_bias", True), flag(fields, "layer_norm_elementwise_affine", True)
    before = flag(fields, "do_layer_norm_before", True)
    keywords = {
        "vocab_size": whole(fields, "vocab_size"),
        "hidden_size": whole(fields, "hidden_size"),
        "intermediate_size": whole(fields, "ffn_dim"),
        "embedding_size": whole(fields, "word_embed_proj_dim", 0),
        "num_layers": whole(fields, "num_hidden_layers"),
        "num_heads": whole(fields, "num_attention_heads"),
        "max_positions": whole(fields, "max_position_embeddings"),
        "tie_embeddings": flag(fields, "tie_word_embeddings", True),
        "norms": "before" if before else "residual",
        "final_norm": before and not flag(fields, "_remove_final_layer_norm", False),
        **dict.fromkeys(("attention_bias", "output_bias", "mlp_bias"), bias),
        **dict.fromkeys(("norm_scale", "norm_bias"), affine),
    }
    name = "activation_function"
    return keywords if fields.get(name) is None else keywords | {"activation": fields[name]}


def to_hf(config: ModelConfig) -> Json:
    """Returns the fields of config.json from a `ModelConfig`."""
    before = config.norms == "before"
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "ffn_dim": config.intermediate_size,
        "word_embed_proj_dim": config.embedding_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.max_positions,
        "activation_function": config.activation,
        "do_layer_norm_before": before,
        "_remove_final_layer_norm": before and not config.final_norm,
        "enable_bias": config.attention_bias,
        "layer_norm_elementwise_affine": config.norm_scale,
        "tie_word_embeddings": config.tie_embeddings,
    }


def tensors(config: ModelConfig) -> Layout:
    """Returns each parameter's tensor on disk."""
    outer, bias = "model.decoder", bool(config.attention_bias)
    layout: Layout = {
        "embed/embedding": Tensor(f"{outer}.embed_tokens.weight"),
        "positions/embedding": Tensor(f"{outer}.embed_positions.weight"),
    }
    if config.final_norm:
        layout |= llama.norm_tensors(config, "norm", f"{outer}.final_layer_norm")
    if config.embedding_size != config.hidden_size:
        for name in ("project_in", "project_out"):
            layout |= llama.linear_tensors(name, f"{outer}.{name}", False)
    if not config.tie_embeddings:
        layout["head/kernel"] = Tensor("lm_head.weight", transposed=True)
    projections = {
        "attention/query": "self_attn.q_proj", "attention/key": "self_attn.k_proj",
        "attention/value": "self_attn.v_proj", "attention/output": "self_attn.out_proj",
        "mlp/up": "fc1", "mlp/down": "fc2",
    }  # fmt: skip
    for i in range(config.num_layers):
        ours, theirs = f"layers/{i}", f"{outer}.layers.{i}"
        for path, name in projections.items():
            layout |= llama.linear_tensors(f"{ours}/{path}", f"{theirs}.{name}", bias)
        for path, name in (("attention_norm", "self_attn_layer_norm"), ("mlp_norm", "final_layer_norm")):
            layout |= llama.norm_tensors(config, f"{ours}/{path}", f"{theirs}.{name}")
    return layout
