"""What a model is: sizes and settings, frozen and hashable, so that it can be a static argument."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from kd_jax import untrusted
from kd_jax.models.families import FAMILIES
from kd_jax.models.families.fields import Llama3Scaling

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu")
MAX_LAYERS = 1024  # each is a module to build: a number in a config.json must not keep us building for ever


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What a decoder-only transformer is made of; 0 or None stands for what the family and the sizes imply.

    One would write it by hand for a student that starts from random weights; `load_config` reads a teacher's.

    Args:
      family: 'gpt2', 'llama', 'qwen2' or 'qwen3'; decides the names on disk and whatever the family fixes.
      vocab_size: rows of the embedding, padding ids included.
      hidden_size: D, the width of the residual stream.
      num_layers: transformer blocks.
      num_heads: query heads.
      intermediate_size: width inside the MLP. Default: 4 D, or 8/3 D rounded up to a multiple of 64 where
        gated.
      num_kv_heads: key and value heads, each shared by num_heads / num_kv_heads queries. Default: num_heads.
      head_dim: width of a head. Default: D / num_heads.
      max_positions: the longest sequence; a hard limit only where positions are learned.
      sliding_window: a token attends to itself and to so many - 1 tokens before it; None: to all. The window itself is
        not implemented, so longer sequences are refused.
      sliding_layers: indices of the layers that have the window; None: all of them, where there is a window.
      tie_embeddings: the output matrix is the embedding, transposed.
      activation: of the MLP, by its Hugging Face name.
      norm_eps: added to the variance in every norm.
      rope_theta: base of the rotary frequencies.
      rope_scaling: Llama 3.1's stretching of them.
      attention_bias: query, key and value projections have a bias.
      output_bias: the attention's output projection has a bias.
      mlp_bias: the MLP's projections have a bias.
      qk_norm: an RMS norm on each head's query and key.
      learned_positions: an embedding of positions in place of rotary.
      layer_norm: LayerNorm with a bias in place of RMSNorm.
      gated_mlp: down(act(gate x) * up x) in place of down(act(up x)).
      bos_id: first token of a text, where the model has one.
      eos_id: the token, or tokens, that end a text.
      pad_id: filler.

    Raises:
      ValueError: a size that is not positive or does not divide, an unknown name, a setting that the family
        fixes.

    Example:
      >>> config = ModelConfig(family="llama", vocab_size=512, hidden_size=96, num_layers=2, num_heads=4)
      >>> config.head_dim, config.num_kv_heads, config.intermediate_size
      (24, 4, 256)
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0
    max_positions: int = 1024
    sliding_window: int | None = None
    sliding_layers: tuple[int, ...] | None = None
    tie_embeddings: bool = True
    activation: str | None = None
    norm_eps: float | None = None
    rope_theta: float = 10000.0
    rope_scaling: Llama3Scaling | None = None
    attention_bias: bool | None = None
    output_bias: bool | None = None
    mlp_bias: bool | None = None
    qk_norm: bool | None = None
    learned_positions: bool | None = None
    layer_norm: bool | None = None
    gated_mlp: bool | None = None
    bos_id: int | None = None
    eos_id: int | tuple[int, ...] | None = None
    pad_id: int | None = None

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"unknown family {self.family!r}; known: {', '.join(FAMILIES)}.")
        family = FAMILIES[self.family]
        for name, value in family.FIXED.items():
            if getattr(self, name) not in (None, value):
                raise ValueError(f"family {self.family!r} fixes {name}={value}; got {getattr(self, name)!r}.")
            self._set(name, value)
        for name, value in family.DEFAULTS.items():
            if getattr(self, name) is None:
                self._set(name, value)
        if isinstance(self.eos_id, list):
            self._set("eos_id", tuple(self.eos_id))
        self._check_sizes()
        self._check_window()
        if not self.num_kv_heads:
            self._set("num_kv_heads", self.num_heads)
        if not self.head_dim:
            if self.hidden_size % self.num_heads:
                raise ValueError(
                    f"hidden_size={self.hidden_size} does not divide by num_heads={self.num_heads}; change "
                    "one of them, or give head_dim."
                )
            self._set("head_dim", self.hidden_size // self.num_heads)
        if not self.intermediate_size:
            gated = -(-8 * self.hidden_size // (3 * 64)) * 64
            self._set("intermediate_size", gated if self.gated_mlp else 4 * self.hidden_size)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} does not divide by num_kv_heads={self.num_kv_heads}.")
        if not self.learned_positions and self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; rotary positions turn pairs of coordinates.")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {untrusted.shown(self.activation)}; known: {', '.join(ACTIVATIONS)}.")
        family.check(self)

    @property
    def longest_sequence(self) -> int:
        """The longest sequence that is computed as transformers computes it: the positions, or the window."""
        return self.max_positions if self.sliding_window is None else min(self.max_positions, self.sliding_window)

    @property
    def layers_with_window(self) -> frozenset[int]:
        """Indices of the layers that have the sliding window."""
        every = () if self.sliding_window is None else range(self.num_layers)
        return frozenset(every if self.sliding_layers is None else self.sliding_layers)

    def with_layers(self, layers: Sequence[int]) -> "ModelConfig":
        """Returns the config of a model that is made of these layers, in this order, each with its window if it has one."""
        sliding = tuple(new for new, old in enumerate(layers) if old in self.layers_with_window)
        window = self.sliding_window if sliding else None
        return dataclasses.replace(
            self, num_layers=len(layers), sliding_window=window, sliding_layers=sliding if window else None
        )

    def _check_window(self) -> None:
        window = self.sliding_window
        if window is not None and not (_is_whole(window) and window >= 1):
            raise ValueError(f"sliding_window={untrusted.shown(window)} must be a whole number of at least 1, or None.")
        if self.sliding_layers is None:
            return
        layers = tuple(sorted(set(self.sliding_layers)))
        if window is None or not layers or not all(_is_whole(i) and i < self.num_layers for i in layers):
            raise ValueError(
                f"sliding_layers={untrusted.shown(self.sliding_layers)} must be indices of the {self.num_layers} layers, and "
                f"needs sliding_window, which is {window}."
            )
        self._set("sliding_layers", None if len(layers) == self.num_layers else layers)

    def _check_sizes(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "max_positions"):
            if not _is_whole(getattr(self, name)) or getattr(self, name) < 1:
                raise ValueError(
                    f"{name}={untrusted.shown(getattr(self, name))} must be a whole number of at least 1, and below 2^31."
                )
        for name in ("intermediate_size", "num_kv_heads", "head_dim"):
            if not _is_whole(getattr(self, name)):
                raise ValueError(
                    f"{name}={untrusted.shown(getattr(self, name))} must be a positive whole number, or 0 for its default."
                )
        if self.num_layers > MAX_LAYERS:
            raise ValueError(f"num_layers={self.num_layers} is more than {MAX_LAYERS}.")
        for name in ("bos_id", "eos_id", "pad_id"):
            value = getattr(self, name)
            several = value if name == "eos_id" and isinstance(value, tuple) else (value,)
            if value is not None and not all(map(_is_whole, several)):
                raise ValueError(
                    f"{name}={untrusted.shown(value)} must be an id, a whole number of at least 0, or None."
                )

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the one way to fill in a frozen dataclass


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31
