"""The sizes and settings of a model. A config is frozen and hashable, so it can be a static argument of jit."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from kd_jax.models import config_checks
from kd_jax.models.families import FAMILIES
from kd_jax.models.rotary import Rotary, Scaling

OF_FAMILY: Any = None  # the default of a number that `__post_init__` replaces by the value of the family
# The settings that only some families have, with their values in all other families. A family module lists the settings
# that differ in `FIXED`, and the settings that can be chosen in `DEFAULTS`.
PLAIN: dict[str, object] = {
    "learned_positions": False,
    "position_offset": 0,
    "sliding_window": None,
    "unrotated_layers": (),
    "rotary_share": 1.0,
    "window_rotary": None,
    "attention_bias": False,
    "output_bias": False,
    "mlp_bias": False,
    "qk_norm": "none",
    "layer_norm": False,
    "norm_scale": True,
    "norm_bias": True,
    "unit_offset": False,
    "norms": "before",
    "parallel_norms": 0,
    "final_norm": True,
    "gated_mlp": True,
    "attention_cap": None,
    "logit_cap": None,
    "sqrt_embedding": False,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logit_divisor": 1.0,
    "num_experts": 0,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The sizes and settings of a decoder-only transformer.

    A value of 0 or None stands for the value that follows from the family and the other sizes. `load_config` reads the
    config of a teacher. The config of a student with random weights is written by hand.

    Args:
      family: a name in `families.FAMILIES`, such as 'llama'. The family decides the tensor names on disk and some
        settings.
      vocab_size: the number of rows of the embedding, padding ids included.
      hidden_size: D, the width of the residual stream.
      num_layers: the number of transformer blocks.
      num_heads: the number of query heads.
      intermediate_size: the width inside the MLP. Default: 4 D, or 8/3 D rounded up to a multiple of 64 for a gated
        MLP.
      num_kv_heads: the number of key and value heads, each shared by num_heads / num_kv_heads query heads. Default:
        num_heads.
      head_dim: the width of a head. Default: D / num_heads.
      embedding_size: the width of the embedding and of the final hidden states. A width other than D has a projection
        to D before the first block, and a projection back after the final norm. Default: D.
      max_positions: the length of the longest sequence; a hard limit only for learned positions.
      position_offset: the number of rows of the embedding of positions before the row of position 0.
      sliding_window: the number of tokens that a token attends to, itself included; None for all.
      sliding_layers: the indices of the layers that have the window; None for all layers, if there is a window.
      unrotated_layers: the indices of the layers without rotary positions.
      tie_embeddings: True if the output matrix is the transposed embedding.
      activation: the activation function of the MLP, by its Hugging Face name.
      norm_eps: the number that is added to the variance in every norm.
      rope_theta: the base of the rotary frequencies.
      rope_scaling: the scaling of the rotary frequencies, such as `rotary.YarnScaling`, or None.
      rotary_share: the share of each head's coordinates, from the first coordinate, that rotary positions turn.
      window_rotary: the rotary embedding of the layers with a window; None for the same embedding in all layers.
      attention_bias: True if the query, key and value projections have a bias.
      output_bias: True if the attention's output projection has a bias.
      mlp_bias: True if the MLP's projections have a bias.
      qk_norm: the norm of queries and keys. 'none'; 'head' for a norm of each head, with one scale for all heads;
        'each_head' for a norm of each head, with a scale for each head; 'width' for one norm over all heads.
      learned_positions: True for an embedding of positions in place of rotary positions.
      layer_norm: True for LayerNorm in place of RMSNorm.
      norm_scale: False for norms without a scale.
      norm_bias: False for a LayerNorm without a bias.
      unit_offset: True if the scale of a norm is 1 + the parameter.
      norms: the places of the norms. 'before' for x + f(norm(x)), 'after' for x + norm(f(x)), 'around' for
        x + norm(f(norm(x))), and 'residual' for norm(x + f(x)); f is attention or the MLP.
      parallel_norms: 0 for an MLP that reads the sum of x and attention's output. 1 or 2 for x + attention(norm(x)) +
        mlp(norm(x)), with this number of norms.
      final_norm: False for hidden states without a norm after the last block.
      gated_mlp: True for down(act(gate x) * up x) in place of down(act(up x)).
      attention_scale: the factor of the product of query and key. Default: 1 / sqrt(head_dim).
      attention_cap: the cap c of the scores of attention, c * tanh(score / c); None for no cap.
      logit_cap: the cap c of the logits, c * tanh(logit / c); None for no cap.
      sqrt_embedding: True if the embedding is multiplied by sqrt(D), rounded to the type of the computation.
      embedding_multiplier: a factor of the embedding.
      residual_multiplier: a factor of the output of attention and of the MLP.
      logit_divisor: the divisor of the logits, by which the model divides the final hidden states.
      num_experts: the number of experts that replace the MLP; 0 for one MLP.
      experts_per_token: the number of experts that each token is sent to.
      expert_size: the width inside an expert. Default: intermediate_size.
      dense_layers: the indices of the layers that have one MLP in a model with experts.
      normalise_experts: True if the weights of a token's chosen experts are divided by their sum.
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
    embedding_size: int = 0
    max_positions: int = 1024
    position_offset: int = OF_FAMILY
    sliding_window: int | None = None
    sliding_layers: tuple[int, ...] | None = None
    unrotated_layers: tuple[int, ...] = ()
    tie_embeddings: bool = True
    activation: str | None = None
    norm_eps: float = OF_FAMILY
    rope_theta: float = 10000.0
    rope_scaling: Scaling | None = None
    rotary_share: float = OF_FAMILY
    window_rotary: Rotary | None = None
    attention_bias: bool | None = None
    output_bias: bool | None = None
    mlp_bias: bool | None = None
    qk_norm: str | None = None
    learned_positions: bool | None = None
    layer_norm: bool | None = None
    norm_scale: bool | None = None
    norm_bias: bool | None = None
    unit_offset: bool | None = None
    norms: str | None = None
    parallel_norms: int = OF_FAMILY
    final_norm: bool | None = None
    gated_mlp: bool | None = None
    attention_scale: float = OF_FAMILY
    attention_cap: float | None = None
    logit_cap: float | None = None
    sqrt_embedding: bool | None = None
    embedding_multiplier: float = OF_FAMILY
    residual_multiplier: float = OF_FAMILY
    logit_divisor: float = OF_FAMILY
    num_experts: int = OF_FAMILY
    experts_per_token: int = 0
    expert_size: int = 0
    dense_layers: tuple[int, ...] = ()
    normalise_experts: bool = True
    bos_id: int | None = None
    eos_id: int | tuple[int, ...] | None = None
    pad_id: int | None = None

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"unknown family {self.family!r}; known: {', '.join(FAMILIES)}.")
        family = FAMILIES[self.family]
        self._resolve(family.DEFAULTS, PLAIN | family.FIXED)
        if isinstance(self.eos_id, list):
            self._set("eos_id", tuple(self.eos_id))
        config_checks.check_sizes(self)
        self._fill_sizes()
        for name in ("sliding_layers", "unrotated_layers", "dense_layers"):
            if getattr(self, name) is not None:
                self._set(name, tuple(sorted(set(getattr(self, name)))))
        config_checks.check_layers(self)
        if self.sliding_layers is not None and len(self.sliding_layers) == self.num_layers:
            self._set("sliding_layers", None)
        if self.sliding_window is None:
            self._set("window_rotary", None)  # no layer reads this embedding
        config_checks.check_attention(self)
        config_checks.check_choices(self)
        family.check(self)

    def _resolve(self, choices: Mapping[str, object], fixed: Mapping[str, object]) -> None:
        """Sets the settings that the family decides, and checks that no other value is given."""
        for name, value in choices.items():
            if getattr(self, name) is None:
                self._set(name, value)
        for name, value in fixed.items():
            if name in choices:
                continue
            if getattr(self, name) not in (None, value):
                raise ValueError(f"family {self.family!r} fixes {name}={value}; got {getattr(self, name)!r}.")
            self._set(name, value)

    def _fill_sizes(self) -> None:
        """Sets the sizes that follow from other sizes."""
        defaults = {"num_kv_heads": self.num_heads, "embedding_size": self.hidden_size}
        if not self.head_dim and self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} does not divide by num_heads={self.num_heads}; change "
                "one of them, or give head_dim."
            )
        defaults["head_dim"] = self.hidden_size // self.num_heads
        gated = -(-8 * self.hidden_size // (3 * 64)) * 64
        defaults["intermediate_size"] = gated if self.gated_mlp else 4 * self.hidden_size
        for name, value in defaults.items():
            self._set(name, getattr(self, name) or value)
        if self.num_experts:
            self._set("expert_size", self.expert_size or self.intermediate_size)
        if self.attention_scale is None:
            self._set("attention_scale", self.head_dim**-0.5)
        derived = {"embedding_size": self.hidden_size, "attention_scale": self.head_dim**-0.5}
        for name, value in derived.items():
            if name not in FAMILIES[self.family].DEFAULTS and getattr(self, name) != value:
                raise ValueError(f"family {self.family!r} fixes {name}={value}; got {getattr(self, name)!r}.")

    @property
    def rotary(self) -> Rotary:
        """The rotary embedding of all layers, or of the layers without a window if there is `window_rotary`."""
        return Rotary(self.rope_theta, self.rope_scaling, self.rotary_share)

    @property
    def layers_with_window(self) -> frozenset[int]:
        """The indices of the layers that have the sliding window."""
        all_layers = () if self.sliding_window is None else range(self.num_layers)
        return frozenset(all_layers if self.sliding_layers is None else self.sliding_layers)

    @property
    def layers_with_experts(self) -> frozenset[int]:
        """The indices of the layers that have experts in place of one MLP."""
        return frozenset(range(self.num_layers) if self.num_experts else ()) - frozenset(self.dense_layers)

    def with_layers(self, layers: Sequence[int]) -> "ModelConfig":
        """Returns the config of a model that consists of the given layers, in the given order.

        Each layer keeps its own settings: the sliding window, the rotary positions and the experts.
        """
        of_new = lambda chosen: tuple(new for new, old in enumerate(layers) if old in chosen)
        sliding = of_new(self.layers_with_window)
        return dataclasses.replace(
            self, num_layers=len(layers), sliding_window=self.sliding_window if sliding else None,
            sliding_layers=sliding or None, unrotated_layers=of_new(self.unrotated_layers),
            dense_layers=of_new(self.dense_layers),
        )  # fmt: skip

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # the only way to set a field of a frozen dataclass
