"""Granite: Llama with factors of the embedding, of attention, of the residual sums and of the logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kd_jax.models.families import llama
from kd_jax.models.families.fields import Fields, real
from kd_jax.storage.files import Json

if TYPE_CHECKING:
    from kd_jax.models.config import ModelConfig

ARCHITECTURES = {"granite": "GraniteForCausalLM"}
FIXED: Json = {}
FACTORS = {
    "attention_scale": "attention_multiplier", "embedding_multiplier": "embedding_multiplier",
    "residual_multiplier": "residual_multiplier", "logit_divisor": "logits_scaling",
}  # fmt: skip
DEFAULTS = llama.DEFAULTS | {
    "attention_scale": None, "embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logit_divisor": 1.0,
}  # fmt: skip
PREFIX, TOLERATED, TIED = llama.PREFIX, llama.TOLERATED, llama.TIED
check, tensors = llama.check, llama.tensors


def from_hf(fields: Fields) -> Json:
    """Returns the keywords of `ModelConfig` from config.json. Every factor is 1 by default, also that of attention."""
    return llama.from_hf(fields) | {ours: real(fields, theirs, 1.0) for ours, theirs in FACTORS.items()}


def to_hf(config: ModelConfig) -> Json:
    """Returns the fields of config.json from a `ModelConfig`."""
    return llama.to_hf(config) | {theirs: getattr(config, ours) for ours, theirs in FACTORS.items()}
