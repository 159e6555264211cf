"""Gemma 3, the models of text only: Gemma 2 with norms of query and key, and with two rotary embeddings.

Five of six layers have a window. These layers have a rotary embedding of their own, with a smaller base.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kd_jax.models.families import gemma2, llama
from kd_jax.models.families.fields import MANY_LAYERS, Fields, refuse_unless, whole
from kd_jax.models.families.rotary_fields import RotaryNames, layered_rotary_from_hf, layered_rotary_to_hf, rotary_to_hf
from kd_jax.storage.files import Json

if TYPE_CHECKING:
    from kd_jax.models.config import ModelConfig

ARCHITECTURES = {"gemma3_text": "Gemma3ForCausalLM"}
FIXED = gemma2.FIXED | {"qk_norm": "head"}
DEFAULTS = {
    "activation": "gelu_pytorch_tanh", "norm_eps": 1e-6, "attention_bias": False, "output_bias": False,
    "sliding_window": None, "window_rotary": None, "attention_scale": None, "logit_cap": None,
}  # fmt: skip
PREFIX, TOLERATED, TIED = llama.PREFIX, llama.TOLERATED, llama.TIED
ROTARY, WINDOW_BASE, PATTERN = RotaryNames(default_base=1e6), 10000.0, 6  # the defaults of transformers
check, tensors = gemma2.check, gemma2.tensors


def from_hf(fields: Fields) -> Json:
    """Returns the keywords of `ModelConfig` from config.json."""
    # transformers has this field and does not read it, so the function of a model with a cap is not certain.
    refuse_unless(fields.get("attn_logit_softcapping") is None, fields, "attn_logit_softcapping", "null")
    depth, pattern = whole(fields, "num_hidden_layers"), whole(fields, "sliding_window_pattern", PATTERN)
    refuse_unless(pattern >= 1, fields, "sliding_window_pattern", "at least 1")
    windowed = [i for i in range(min(depth, MANY_LAYERS)) if (i + 1) % pattern]
    return gemma2.common_from_hf(fields, windowed) | layered_rotary_from_hf(fields, ROTARY, WINDOW_BASE)


def to_hf(config: ModelConfig) -> Json:
    """Returns the fields of config.json from a `ModelConfig`."""
    window = config.window_rotary
    if window is None:
        return gemma2.common_to_hf(config) | rotary_to_hf(config.rotary, config.max_positions, ROTARY)
    return gemma2.common_to_hf(config) | layered_rotary_to_hf(config.rotary, window, config.max_positions, ROTARY)
