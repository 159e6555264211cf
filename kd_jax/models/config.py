"""The sizes and settings of a model. A config is frozen and hashable, so it can be a static argument of jit."""

import dataclasses
from collections.abc import Sequence

from kd_jax.models.families import FAMILIES
from kd_jax.models.rotary import DynamicScaling, Rotary, Scaling
from kd_jax.storage import untrusted

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu")
# Each layer is a module to build, so the number in a config.json is limited. Otherwise building might never end.
MAX_LAYERS = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The sizes and settings of a decoder-only transformer.

    A value of 0 or None stands for the value that follows from the family and the other sizes. `load_config` reads the
    config of a teacher. The config of a student with random weights is written by hand.

    Args:
      family: 'gpt2', 'llama', 'qwen2' or 'qwen3'. The family decides the tensor names on disk and some settings.
      vocab_size: the number of rows of the embedding, padding ids included.
      hidden_size: D, the width of the residual stream.
      num_layers: the number of transformer blocks.
      num_heads: the number of query heads.
      intermediate_size: the width inside the MLP. Default: 4 D, or 8/3 D rounded up to a multiple of 64 for a gated
        MLP.
      num_kv_heads: the number of key and value heads, each shared by num_heads / num_kv_heads query heads. Default:
        num_heads.
      head_dim: the width of a head. Default: D / num_heads.
      max_positions: the length of the longest sequence; a hard limit only for learned positions.
      sliding_window: the number of tokens that a token attends to, itself included; None for all. The window is not
        implemented, so longer sequences are refused.
      sliding_layers: the indices of the layers that have the window; None for all layers, if there is a window.
      tie_embeddings: True if the output matrix is the transposed embedding.
      activation: the activation function of the MLP, by its Hugging Face name.
      norm_eps: the number that is added to the variance in every norm.
      rope_theta: the base of the rotary frequencies.
      rope_scaling: the scaling of the rotary frequencies, such as `rotary.YarnScaling`, or None.
      rotary_share: the part of each head's coordinates that rotary positions turn, above 0 and at most 1.
      window_rotary: the rotary embedding of the layers with a window; None for the same embedding in all layers.
      attention_bias: True if the query, key and value projections have a bias.
      output_bias: True if the attention's output projection has a bias.
      mlp_bias: True if the MLP's projections have a bias.
      qk_norm: True for an RMS norm on each head's query and key.
      learned_positions: True for an embedding of positions in place of rotary positions.
      layer_norm: True for LayerNorm with a bias in place of RMSNorm.
      gated_mlp: True for down(act(gate x) * up x) in place of down(act(up x)).
      bos_id: the first token of a text, if the model has one.
      eos_id: the token, or tokens, that end a text.
      pad_id: the padding token.

    Raises:
      ValueError: a size is not positive or does not divide another size, a name is unknown, or a setting differs from
        the value that the family fixes.

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
    rope_scaling: Scaling | None = None
    rotary_share: float = 1.0
    window_rotary: Rotary | None = None
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
        if not self.learned_positions:
            self._check_rotary()
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"unknown activation {untrusted.printable(self.activation)}; known: {', '.join(ACTIVATIONS)}."
            )
        family.check(self)

    @property
    def rotary(self) -> Rotary:
        """The rotary embedding of all layers, or of the layers without a window if there is `window_rotary`."""
        return Rotary(self.rope_theta, self.rope_scaling, self.rotary_share)

    @property
    def longest_sequence(self) -> int:
        """The length of the longest sequence with the same result as in transformers.

        This is the number of positions, or the sliding window if the window is shorter.
        """
        return self.max_positions if self.sliding_window is None else min(self.max_positions, self.sliding_window)

    @property
    def layers_with_window(self) -> frozenset[int]:
        """The indices of the layers that have the sliding window."""
        all_layers = () if self.sliding_window is None else range(self.num_layers)
        return frozenset(all_layers if self.sliding_layers is None else self.sliding_layers)

    def with_layers(self, layers: Sequence[int]) -> "ModelConfig":
        """Returns the config of a model that consists of the given layers, in the given order.

        Each layer keeps its sliding window, if it has one.
        """
        sliding = tuple(new for new, old in enumerate(layers) if old in self.layers_with_window)
        window = self.sliding_window if sliding else None
        return dataclasses.replace(
            self, num_layers=len(layers), sliding_window=window, sliding_layers=sliding if window else None
        )

    def _check_rotary(self) -> None:
        for rotary in (self.rotary, self.window_rotary or self.rotary):
            rotary.check(self.head_dim)
            scaling = rotary.scaling
            if isinstance(scaling, DynamicScaling) and scaling.max_positions != self.max_positions:
                raise ValueError(
                    f"the dynamic rotary scaling has max_positions={scaling.max_positions}; expected the model's "
                    f"max_positions={self.max_positions}."
                )

    def _check_window(self) -> None:
        window = self.sliding_window
        if window is not None and not (_is_whole(window) and window >= 1):
            raise ValueError(
                f"sliding_window={untrusted.printable(window)} must be a whole number of at least 1, or None."
            )
        if self.sliding_layers is None:
            return
        layers = tuple(sorted(set(self.sliding_layers)))
        if window is None or not layers or not all(_is_whole(i) and i < self.num_layers for i in layers):
            raise ValueError(
                f"sliding_layers={untrusted.printable(self.sliding_layers)} must be indices of the {self.num_layers} layers, and "
                f"needs sliding_window, which is {window}."
            )
        self._set("sliding_layers", None if len(layers) == self.num_layers else layers)

    def _check_sizes(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "max_positions"):
            if not _is_whole(getattr(self, name)) or getattr(self, name) < 1:
                raise ValueError(
                    f"{name}={untrusted.printable(getattr(self, name))} must be a whole number of at least 1, and below 2^31."
                )
        for name in ("intermediate_size", "num_kv_heads", "head_dim"):
            if not _is_whole(getattr(self, name)):
                raise ValueError(
                    f"{name}={untrusted.printable(getattr(self, name))} must be a positive whole number, or 0 for its default."
                )
        if self.num_layers > MAX_LAYERS:
            raise ValueError(f"num_layers={self.num_layers} must be at most {MAX_LAYERS}.")
        for name in ("bos_id", "eos_id", "pad_id"):
            value = getattr(self, name)
            ids = value if name == "eos_id" and isinstance(value, tuple) else (value,)
            if value is not None and not all(map(_is_whole, ids)):
                raise ValueError(
                    f"{name}={untrusted.printable(value)} must be an id, a whole number of at least 0, or None."
                )

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # the only way to set a field of a frozen dataclass


def _is_whole(value: object) -> bool:
    """Returns True for a whole number from 0 to 2^31 - 1."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31
