"""SmolLM3: Llama with layers that have no rotary positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kd_jax.models.families import llama
from kd_jax.models.families.fields import (
    MANY_LAYERS,
    Fields,
    flag,
    layer_windows_from_hf,
    layer_windows_to_hf,
    optional_window,
    refuse_unless,
    whole,
)
from kd_jax.models.families.rotary_fields import RotaryNames
from kd_jax.storage.files import Json

if TYPE_CHECKING:
    from kd_jax.models.config import ModelConfig

ARCHITECTURES = {"smollm3": "SmolLM3ForCausalLM"}
FIXED: Json = {}
DEFAULTS = llama.DEFAULTS | {"sliding_window": None, "unrotated_layers": ()}
PREFIX, TOLERATED, TIED = llama.PREFIX, llama.TOLERATED, llama.TIED
ROTARY, INTERVAL = RotaryNames(default_base=2e6), 4  # the defaults of transformers
check, tensors = llama.check, llama.tensors


def from_hf(fields: Fields) -> Json:
    """Returns the keywords of `ModelConfig` from config.json."""
    fields = {"num_key_value_heads": 4, **fields}  # the default of transformers; null is the number of heads
    depth = min(whole(fields, "num_hidden_layers"), MANY_LAYERS)
    interval = whole(fields, "no_rope_layer_interval", INTERVAL)
    refuse_unless(interval >= 1, fields, "no_rope_layer_interval", "at least 1")
    rotates = fields.get("no_rope_layers")
    if rotates is None:
        rotates = [int((i + 1) % interval != 0) for i in range(depth)]
    is_list = isinstance(rotates, list) and len(rotates) >= depth and all(entry in (0, 1) for entry in rotates)
    refuse_unless(is_list, fields, "no_rope_layers", f"0 or 1 for each of the {depth} layers")
    unrotated = tuple(i for i in range(depth) if not rotates[i])
    if not flag(fields, "use_sliding_window", False):
        fields = {**fields, "sliding_window": None}
    windowed = unrotated if optional_window(fields) is not None else ()
    return (
        llama.common_from_hf(fields, tied=True, rotary=ROTARY)
        | llama.biases_from_hf(fields)
        | layer_windows_from_hf(fields, windowed)
        | {"mlp_bias": flag(fields, "mlp_bias", False), "unrotated_layers": unrotated}
    )


def to_hf(config: ModelConfig) -> Json:
    """Returns the fields of config.json from a `ModelConfig`."""
    return llama.common_to_hf(config, rotary=ROTARY) | {
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "no_rope_layers": [int(i not in config.unrotated_layers) for i in range(config.num_layers)],
        "use_sliding_window": config.sliding_window is not None,
        **layer_windows_to_hf(config.sliding_window, config.layers_with_window, config.num_layers),
    }
