"""GPT-2: learned positions, layer norms with a bias, an MLP without a gate, one matrix for query, key and value."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kd_jax.models.families.fields import Fields, Layout, Tensor, check_equal_heads, flag, real, refuse_unless, whole
from kd_jax.storage.files import Json

if TYPE_CHECKING:
    from kd_jax.models.config import ModelConfig

ARCHITECTURES = {"gpt2": "GPT2LMHeadModel"}
FIXED = {
    "learned_positions": True,
    "layer_norm": True,
    "gated_mlp": False,
    "attention_bias": True,
    "output_bias": True,
    "mlp_bias": True,
}
DEFAULTS = {"activation": "gelu_new", "norm_eps": 1e-5}
PREFIX = "transformer."
# The causal mask and its fill value, which old checkpoints store as buffers.
TOLERATED = (r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",)
TIED = "lm_head.weight"
# Other spellings of four fields. If a config has both spellings, transformers uses the spelling on the left.
SPELLINGS = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}


def check(config: ModelConfig) -> None:
    """Checks that the three parts of the fused matrix [D, 3 D] of query, key and value have equal size."""
    check_equal_heads(config)


def from_hf(fields: Fields) -> Json:
    """Returns the keywords of `ModelConfig` from config.json."""
    fields = {**fields, **{SPELLINGS[name]: value for name, value in fields.items() if name in SPELLINGS}}
    by_layer = flag(fields, "scale_attn_by_inverse_layer_idx", False)
    refuse_unless(not by_layer, fields, "scale_attn_by_inverse_layer_idx", "false")
    refuse_unless(flag(fields, "scale_attn_weights", True), fields, "scale_attn_weights", "true")
    refuse_unless(not flag(fields, "add_cross_attention", False), fields, "add_cross_attention", "false")
    width = whole(fields, "n_embd")
    return {
        "vocab_size": whole(fields, "vocab_size"),
        "hidden_size": width,
        "intermediate_size": whole(fields, "n_inner", 0) or 4 * width,
        "num_layers": whole(fields, "n_layer"),
        "num_heads": whole(fields, "n_head"),
        "max_positions": whole(fields, "n_positions"),
        "activation": fields.get("activation_function", "gelu_new"),
        "norm_eps": real(fields, "layer_norm_epsilon", 1e-5),
        "tie_embeddings": flag(fields, "tie_word_embeddings", True),
    }


def to_hf(config: ModelConfig) -> Json:
    """Returns the fields of config.json from a `ModelConfig`."""
    return {
        "vocab_size": config.vocab_size,
        "n_embd": config.hidden_size,
        "n_inner": config.intermediate_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_positions": config.max_positions,
        "n_ctx": config.max_positions,
        "activation_function": config.activation,
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
    }


def tensors(config: ModelConfig) -> Layout:
    """Returns each parameter's tensor on disk.

    A matrix of `Conv1D` is [in, out], as in this project, so only the output matrix is transposed.
    """
    layout: Layout = {
        "embed/embedding": Tensor("transformer.wte.weight"),
        "positions/embedding": Tensor("transformer.wpe.weight"),
        "norm/scale": Tensor("transformer.ln_f.weight"),
        "norm/bias": Tensor("transformer.ln_f.bias"),
    }
    if not config.tie_embeddings:
        layout["head/kernel"] = Tensor("lm_head.weight", transposed=True)
    width = config.hidden_size
    for i in range(config.num_layers):
        ours, theirs = f"layers/{i}", f"transformer.h.{i}"
        for leaf, name in (("scale", "weight"), ("bias", "bias")):
            layout[f"{ours}/attention_norm/{leaf}"] = Tensor(f"{theirs}.ln_1.{name}")
            layout[f"{ours}/mlp_norm/{leaf}"] = Tensor(f"{theirs}.ln_2.{name}")
        for leaf, name in (("kernel", "weight"), ("bias", "bias")):
            for part, path in enumerate(("query", "key", "value")):
                fused = Tensor(f"{theirs}.attn.c_attn.{name}", first=part * width, columns=3 * width)
                layout[f"{ours}/attention/{path}/{leaf}"] = fused
            layout[f"{ours}/attention/output/{leaf}"] = Tensor(f"{theirs}.attn.c_proj.{name}")
            layout[f"{ours}/mlp/up/{leaf}"] = Tensor(f"{theirs}.mlp.c_fc.{name}")
            layout[f"{ours}/mlp/down/{leaf}"] = Tensor(f"{theirs}.mlp.c_proj.{name}")
    return layout
