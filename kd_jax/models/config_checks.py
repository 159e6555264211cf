"""Checks of a `ModelConfig`: names, sizes, indices of layers, and settings that need each other."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from kd_jax.models.rotary import DynamicScaling
from kd_jax.storage import untrusted

if TYPE_CHECKING:
    from kd_jax.models.config import ModelConfig

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu")
QK_NORMS = ("none", "head", "each_head", "width")
NORMS = ("before", "after", "around", "residual")
# Each layer is a module to build, so the number in a config.json is limited. Otherwise building might never end.
MAX_LAYERS = 1024


def check_sizes(config: ModelConfig) -> None:
    """Checks that sizes are positive whole numbers, and ids whole numbers."""
    for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "max_positions"):
        if not _is_whole(getattr(config, name)) or getattr(config, name) < 1:
            raise ValueError(
                f"{name}={untrusted.printable(getattr(config, name))} must be a whole number of at least 1, and below 2^31."
            )
    for name in ("intermediate_size", "num_kv_heads", "head_dim", "embedding_size", "expert_size"):
        if not _is_whole(getattr(config, name)):
            raise ValueError(
                f"{name}={untrusted.printable(getattr(config, name))} must be a positive whole number, or 0 for its default."
            )
    for name in ("position_offset", "num_experts", "experts_per_token"):
        if not _is_whole(getattr(config, name)):
            raise ValueError(
                f"{name}={untrusted.printable(getattr(config, name))} must be a whole number of at least 0."
            )
    if config.num_layers > MAX_LAYERS:
        raise ValueError(f"num_layers={config.num_layers} must be at most {MAX_LAYERS}.")
    for name in ("bos_id", "eos_id", "pad_id"):
        value = getattr(config, name)
        ids = value if name == "eos_id" and isinstance(value, tuple) else (value,)
        if value is not None and not all(map(_is_whole, ids)):
            raise ValueError(
                f"{name}={untrusted.printable(value)} must be an id, a whole number of at least 0, or None."
            )


def check_layers(config: ModelConfig) -> None:
    """Checks the sliding window, and the indices of the layers that have settings of their own."""
    window, sliding = config.sliding_window, config.sliding_layers
    if window is not None and not (_is_whole(window) and window >= 1):
        raise ValueError(f"sliding_window={untrusted.printable(window)} must be a whole number of at least 1, or None.")
    if sliding is not None and (window is None or not sliding or not _are_layers(sliding, config)):
        raise ValueError(
            f"sliding_layers={untrusted.printable(sliding)} must be indices of the {config.num_layers} layers, and "
            f"needs sliding_window, which is {window}."
        )
    for name in ("unrotated_layers", "dense_layers"):
        if not _are_layers(getattr(config, name), config):
            raise ValueError(
                f"{name}={untrusted.printable(getattr(config, name))} must be indices of the {config.num_layers} layers."
            )


def check_attention(config: ModelConfig) -> None:
    """Checks that the numbers of heads divide, that rotary positions turn pairs, and that factors are positive."""
    if config.num_heads % config.num_kv_heads:
        raise ValueError(f"num_heads={config.num_heads} does not divide by num_kv_heads={config.num_kv_heads}.")
    if not config.learned_positions:
        _check_rotary(config)
    positive = (
        "norm_eps",
        "rope_theta",
        "attention_scale",
        "embedding_multiplier",
        "residual_multiplier",
        "logit_divisor",
    )
    for name in (*positive, "attention_cap", "logit_cap"):
        value = getattr(config, name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
        if not is_number and (value is not None or name in positive):
            raise ValueError(f"{name}={untrusted.printable(value)} must be a positive number.")


def _check_rotary(config: ModelConfig) -> None:
    """Checks that the rotary embeddings fit the heads and the number of positions."""
    for rotary in (config.rotary, config.window_rotary or config.rotary):
        rotary.check(config.head_dim)
        scaling = rotary.scaling
        if isinstance(scaling, DynamicScaling) and scaling.max_positions != config.max_positions:
            raise ValueError(
                f"the dynamic rotary scaling has max_positions={scaling.max_positions}; expected the model's "
                f"max_positions={config.max_positions}."
            )


def check_choices(config: ModelConfig) -> None:
    """Checks the settings that are one of several values, and the settings that need each other."""
    choices: dict[str, tuple[object, ...]] = {"activation": ACTIVATIONS, "qk_norm": QK_NORMS, "norms": NORMS}
    for name, known in (choices | {"parallel_norms": (0, 1, 2)}).items():
        if (value := getattr(config, name)) not in known:
            raise ValueError(f"unknown {name} {untrusted.printable(value)}; known: {', '.join(map(str, known))}.")
    if config.parallel_norms and config.norms != "before":
        raise ValueError(
            f"parallel_norms={config.parallel_norms} needs norms='before', because both parts of a block read the same "
            f"hidden states; got norms={config.norms!r}."
        )
    if not config.num_experts:
        if config.experts_per_token or config.expert_size or config.dense_layers:
            raise ValueError(
                f"experts_per_token={config.experts_per_token}, expert_size={config.expert_size} and dense_layers="
                f"{config.dense_layers} need num_experts above 0."
            )
    elif not 1 <= config.experts_per_token <= config.num_experts:
        raise ValueError(
            f"experts_per_token={config.experts_per_token} must be at least 1 and at most num_experts={config.num_experts}."
        )


def _are_layers(layers: tuple[int, ...], config: ModelConfig) -> bool:
    return all(_is_whole(i) and i < config.num_layers for i in layers)


def _is_whole(value: object) -> bool:
    """Returns True for a whole number from 0 to 2^31 - 1."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31
