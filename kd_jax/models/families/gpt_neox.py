"""GPT-NeoX and Pythia: attention and MLP side by side, LayerNorm, and a rotary embedding of a part of each head."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kd_jax.models.families import llama
from kd_jax.models.families.fields import Fields, Layout, Tensor, check_equal_heads, flag
from kd_jax.models.families.rotary_fields import RotaryNames
from kd_jax.storage.files import Json

if TYPE_CHECKING:
    from kd_jax.models.config import ModelConfig

ARCHITECTURES = {"gpt_neox": "GPTNeoXForCausalLM"}
FIXED = {"layer_norm": True, "gated_mlp": False, "mlp_bias": True}
DEFAULTS = {
    "activation": "gelu", "norm_eps": 1e-5, "attention_bias": True, "output_bias": True, "parallel_norms": 2,
    "rotary_share": 0.25,
}  # fmt: skip
PREFIX = "gpt_neox."
# The causal mask, its fill value and the rotary frequencies, which old checkpoints store as buffers.
TOLERATED = (r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",)
TIED = "embed_out.weight"
ROTARY = RotaryNames(base="rotary_emb_base", share="rotary_pct", default_share=0.25)


def check(config: ModelConfig) -> None:
    """Checks that config.json can express the heads, the biases and the parallel residual."""
    check_equal_heads(config)
    llama.check(config)
    if config.parallel_norms == 1:
        raise ValueError("family 'gpt_neox' has parallel_norms=2, or 0 without a parallel residual; got 1.")


def from_hf(fields: Fields) -> Json:
    """Returns the keywords of `ModelConfig` from config.json."""
    parallel = flag(fields, "use_parallel_residual", True)
    bias = flag(fields, "attention_bias", True)
    keywords = llama.common_from_hf({**fields, "head_dim": None}, eps="layer_norm_eps", rotary=ROTARY)
    return keywords | {"attention_bias": bias, "output_bias": bias, "parallel_norms": 2 if parallel else 0}


def to_hf(config: ModelConfig) -> Json:
    """Returns the fields of config.json from a `ModelConfig`."""
    fields = llama.common_to_hf(config, eps="layer_norm_eps", rotary=ROTARY) | {
        "attention_bias": config.attention_bias,
        "use_parallel_residual": config.parallel_norms > 0,
    }
    return {name: value for name, value in fields.items() if name not in ("head_dim", "num_key_value_heads")}


def tensors(config: ModelConfig) -> Layout:
    """Returns each parameter's tensor on disk. One tensor has query, key and value, which alternate from head to head."""
    layout: Layout = {"embed/embedding": Tensor("gpt_neox.embed_in.weight")}
    layout |= llama.norm_tensors(config, "norm", "gpt_neox.final_layer_norm")
    if not config.tie_embeddings:
        layout["head/kernel"] = Tensor("embed_out.weight", transposed=True)
    width, bias = config.head_dim, bool(config.attention_bias)
    for i in range(config.num_layers):
        ours, theirs = f"layers/{i}", f"gpt_neox.layers.{i}"
        for part, path in enumerate(("query", "key", "value")):
            for leaf, name in (("kernel", "weight"), ("bias", "bias")):
                if leaf == "kernel" or bias:
                    layout[f"{ours}/attention/{path}/{leaf}"] = Tensor(
                        f"{theirs}.attention.query_key_value.{name}", transposed=leaf == "kernel",
                        first=part * width, columns=3 * width, groups=config.num_heads,
                    )  # fmt: skip
        layout |= llama.linear_tensors(f"{ours}/attention/output", f"{theirs}.attention.dense", bias)
        layout |= llama.linear_tensors(f"{ours}/mlp/up", f"{theirs}.mlp.dense_h_to_4h", True)
        layout |= llama.linear_tensors(f"{ours}/mlp/down", f"{theirs}.mlp.dense_4h_to_h", True)
        for path, name in llama.NORMS:
            layout |= llama.norm_tensors(config, f"{ours}/{path}", f"{theirs}.{name}")
    return layout
