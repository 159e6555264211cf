"""Rotary position embeddings: frequencies, the scalings for longer contexts, and the rotation itself.

At position t, a rotary embedding turns pair i of the coordinates of each query and key by the angle `t * frequency_i`.
Without a scaling, `frequency_i = base^(-2i/R)` in radians per position. R is the number of coordinates that are turned:
all coordinates of the head, or the first ones. Coordinates i and i + R/2 are one pair.

Two scalings depend on the length of the sequence, `DynamicScaling` and `LongRopeScaling`. The length is the number of
real tokens of the row that the model has read, so padding does not count, and no row depends on another row. In
transformers the length is the largest position of the batch. Both are the same for one row without padding. In a packed
row, each segment has its own length. With a cache, the length grows with each token:

- `LongRopeScaling`: when the row becomes longer than the original length, the complete cache is computed again with the
  other frequencies, as transformers does for Phi-3.
- `DynamicScaling`: the keys in the cache keep the frequencies of the length at which they were computed, as in
  transformers. A forward pass without a cache has one length for all tokens.

References:
  Su et al., "RoFormer", https://arxiv.org/abs/2104.09864, 2021, eq. 15.
"""

import dataclasses
import math
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Lengths = int | Int[Array, "B L"]


class Scaling(Protocol):
    """A change of the frequencies for sequences that are longer than the sequences of the first training."""

    @property
    def attention_factor(self) -> float:
        """The factor of rotated queries and keys."""

    def frequencies(self, base: float, dims: int, length: Lengths | None) -> Array | np.ndarray:
        """Returns the scaled frequencies [..., dims / 2].

        Args:
          base: the base of the frequencies.
          dims: the number of coordinates that are turned.
          length: the number of tokens of the sequence, or of each sequence; None for the original length. Only some
            scalings depend on the length.
        """


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Divides all frequencies by `factor`.

    References:
      Chen et al., "Extending Context Window of Large Language Models via Positional Interpolation",
      https://arxiv.org/abs/2306.15595, 2023, eq. 4.
    """

    factor: float
    attention_factor = 1.0

    def frequencies(self, base: float, dims: int, length: Lengths | None) -> np.ndarray:
        """Returns the scaled frequencies, which do not depend on the length."""
        return plain_frequencies(base, dims) / self.factor


@dataclasses.dataclass(frozen=True)
class DynamicScaling:
    """Multiplies the base by `(factor L / M - factor + 1)^(R / (R - 2))`, if the length L is more than M positions.

    M is `max_positions`. So the highest frequency stays the same, and the lowest one is divided by the inner number.

    References:
      Peng et al., "YaRN", https://arxiv.org/abs/2309.00071, 2023, section 3.3 and appendix B.1.
    """

    factor: float
    max_positions: int
    attention_factor = 1.0

    def frequencies(self, base: float, dims: int, length: Lengths | None) -> Array | np.ndarray:
        """Returns the frequencies for a sequence of `length` tokens."""
        frequencies, powers = plain_frequencies(base, dims), -np.arange(0, dims, 2) / (dims - 2)
        if length is None:
            return frequencies
        library = jnp if isinstance(length, jax.Array) else np
        longest = library.maximum(library.asarray(length), self.max_positions)[..., None]
        stretch = self.factor * longest / self.max_positions - (self.factor - 1)
        return frequencies * stretch**powers


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """YaRN: frequencies with few turns in the original length are divided by `factor`, all others stay the same.

    Frequencies with at least `beta_fast` turns stay the same, and frequencies with at most `beta_slow` turns are
    divided. Between both, the share of the scaled frequency grows linearly with the index of the frequency.

    Args:
      factor: the ratio of the longer to the original length.
      original_max_positions: the length of the sequences of the first training.
      attention_factor: the factor of rotated queries and keys. Default: `0.1 ln(factor) + 1`.
      beta_fast, beta_slow: numbers of turns in the original length.
      truncate: True to round the two indices that belong to `beta_fast` and `beta_slow` to whole numbers.

    References:
      Peng et al., "YaRN", https://arxiv.org/abs/2309.00071, 2023, sections 3.2 and 3.4.
    """

    factor: float
    original_max_positions: int
    attention_factor: float = 0.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def __post_init__(self) -> None:
        if not self.attention_factor:
            object.__setattr__(self, "attention_factor", yarn_attention_factor(self.factor))

    def frequencies(self, base: float, dims: int, length: Lengths | None) -> np.ndarray:
        """Returns the scaled frequencies, which do not depend on the length."""
        first, last = (
            dims * math.log(self.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(base))
            for turns in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dims - 1)
        last += 0.001 if first == last else 0.0  # as in the published code; a step in place of a ramp
        scaled = np.clip((np.arange(dims // 2) - first) / (last - first), 0, 1)
        return plain_frequencies(base, dims) * (1 - scaled + scaled / self.factor)


@dataclasses.dataclass(frozen=True)
class LongRopeScaling:
    """LongRoPE: each frequency has its own divisor, which depends on the length of the sequence.

    Args:
      short_factors: the divisors for sequences of at most `original_max_positions` tokens.
      long_factors: the divisors for longer sequences.
      original_max_positions: the length of the sequences of the first training.
      factor: the ratio of the longer to the original length.
      attention_factor: the factor of rotated queries and keys. Default: `sqrt(1 + ln(factor) / ln(original_max_positions))`,
        or 1 if `factor` is at most 1. The attention factor does not depend on the length.

    References:
      Ding et al., "LongRoPE", https://arxiv.org/abs/2402.13753, 2024, section 3.2.
    """

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_max_positions: int
    factor: float
    attention_factor: float = 0.0

    def __post_init__(self) -> None:
        if not self.attention_factor:
            long = self.factor > 1
            square = 1 + math.log(self.factor) / math.log(self.original_max_positions) if long else 1.0
            object.__setattr__(self, "attention_factor", math.sqrt(square))

    def frequencies(self, base: float, dims: int, length: Lengths | None) -> Array | np.ndarray:
        """Returns the frequencies for a sequence of `length` tokens."""
        frequencies = plain_frequencies(base, dims)
        short, long = frequencies / np.array(self.short_factors), frequencies / np.array(self.long_factors)
        if length is None:
            return short
        library = jnp if isinstance(length, jax.Array) else np
        return library.where((library.asarray(length) > self.original_max_positions)[..., None], long, short)


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """The scaling of Llama 3.1: the change depends on the wavelength `2 pi / frequency`.

    - A wavelength above original_max_positions / low_freq_factor is multiplied by `factor`.
    - A wavelength below original_max_positions / high_freq_factor is not changed.
    - Between these bounds the frequencies are interpolated linearly in original_max_positions / wavelength.

    References:
      Grattafiori et al., "The Llama 3 Herd of Models", https://arxiv.org/abs/2407.21783, 2024.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int
    attention_factor = 1.0

    def frequencies(self, base: float, dims: int, length: Lengths | None) -> np.ndarray:
        """Returns the scaled frequencies, which do not depend on the length."""
        frequencies = plain_frequencies(base, dims)
        turns = self.original_max_positions * frequencies / (2 * np.pi)
        unscaled = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        unscaled = np.clip(unscaled, 0.0, 1.0)  # the share of each frequency that is not scaled
        return frequencies * (unscaled + (1 - unscaled) / self.factor)


@dataclasses.dataclass(frozen=True)
class Rotary:
    """A rotary embedding.

    Args:
      base: the base of the frequencies.
      scaling: the scaling of the frequencies, or None.
      share: the part of the coordinates of each head that is turned, above 0 and at most 1. The turned coordinates come
        first.

    Example:
      >>> rotary_frequencies(Rotary(base=100.0), head_dim=4).tolist()
      [1.0, 0.10000000149011612]
      >>> rotary_frequencies(Rotary(base=100.0, scaling=LinearScaling(2.0), share=0.5), head_dim=4).tolist()
      [0.5]
    """

    base: float = 10000.0
    scaling: Scaling | None = None
    share: float = 1.0

    @property
    def attention_factor(self) -> float:
        """The factor of rotated queries and keys."""
        return 1.0 if self.scaling is None else self.scaling.attention_factor

    @property
    def depends_on_length(self) -> bool:
        """True if the frequencies depend on the length of the sequence."""
        return isinstance(self.scaling, DynamicScaling | LongRopeScaling)

    @property
    def restart_length(self) -> int | None:
        """The length beyond which a sequence with a cache has to be read again from its first token, or None."""
        return self.scaling.original_max_positions if isinstance(self.scaling, LongRopeScaling) else None

    def dims(self, head_dim: int) -> int:
        """Returns R, the number of coordinates of each head that are turned."""
        return int(head_dim * self.share)

    def check(self, head_dim: int) -> None:
        """Checks that the rotary embedding fits heads of this size.

        Raises:
          ValueError: the number of turned coordinates is odd or 0, or is not twice the number of LongRoPE's divisors.
        """
        dims = self.dims(head_dim)
        if self.share == 1 and head_dim % 2:
            raise ValueError(f"head_dim={head_dim} must be even, because rotary positions turn pairs of coordinates.")
        least = 4 if isinstance(self.scaling, DynamicScaling) else 2
        if dims % 2 or not least <= dims <= head_dim:
            raise ValueError(
                f"partial_rotary_factor={self.share:g} of head_dim={head_dim} gives {dims} rotary coordinates; expected an "
                f"even number from {least} to {head_dim}."
            )
        if isinstance(self.scaling, LongRopeScaling):
            counts = {"short_factor": self.scaling.short_factors, "long_factor": self.scaling.long_factors}
            for name, factors in counts.items():
                if len(factors) != dims // 2:
                    raise ValueError(
                        f"{name} of the rotary embedding has {len(factors)} numbers; expected {dims // 2}, one for each "
                        f"pair of the {dims} rotary coordinates."
                    )


def plain_frequencies(base: float, dims: int) -> np.ndarray:
    """Returns the frequencies base^(-2i/R), in radians per position, for R = `dims`. Their type is float64."""
    return base ** (-np.arange(0, dims, 2) / dims)


def yarn_attention_factor(factor: float, scale: float = 1.0) -> float:
    """Returns `0.1 scale ln(factor) + 1`, or 1 if `factor` is at most 1 (Peng et al., YaRN, eq. 22)."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def rotary_frequencies(rotary: Rotary, head_dim: int, length: Lengths | None = None) -> Array | np.ndarray:
    """Returns the frequencies [..., R/2] in radians per position, in float32.

    Args:
      rotary: the rotary embedding.
      head_dim: the number of coordinates of a head.
      length: the number of tokens of the sequence, or an array with the number for each token; None for a sequence that
        is not longer than the original length. A NumPy number gives a NumPy array.
    """
    dims = rotary.dims(head_dim)
    scaling = rotary.scaling
    frequencies = (
        plain_frequencies(rotary.base, dims) if scaling is None else scaling.frequencies(rotary.base, dims, length)
    )
    return frequencies.astype(np.float32)


def rotary_factors(
    rotary: Rotary, head_dim: int, positions: Int[Array, "B L"], segments: Int[Array, "B L"] | None = None
) -> tuple[Float[Array, "B L 1 R/2"], Float[Array, "B L 1 R/2"]]:
    """Returns the cosines and sines of the angles of tokens, times the attention factor, in float32.

    Args:
      rotary: the rotary embedding.
      head_dim: the number of coordinates of a head.
      positions: the position of each token among the real tokens of its row or segment.
      segments: the number of each token's segment in a packed row. All positions of a row belong to one sequence if
        there are no segments.
    """
    if not rotary.depends_on_length:
        lengths = None
    elif segments is None:
        lengths = positions.max(axis=-1, keepdims=True) + 1
    else:
        same = segments[:, :, None] == segments[:, None, :]
        lengths = jnp.where(same, positions[:, None, :], 0).max(axis=-1) + 1
    angles = (positions[..., None] * rotary_frequencies(rotary, head_dim, lengths))[..., None, :]
    return jnp.cos(angles) * rotary.attention_factor, jnp.sin(angles) * rotary.attention_factor


def rotate(
    x: Float[Array, "B L heads H"], cos: Float[Array, "B L 1 R/2"], sin: Float[Array, "B L 1 R/2"]
) -> Float[Array, "B L heads H"]:
    """Turns coordinates i and i + R/2 of each head as one pair, in float32. Coordinates from R on stay the same."""
    half = cos.shape[-1]
    first, second = (part.astype(jnp.float32) for part in (x[..., :half], x[..., half : 2 * half]))
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return turned if 2 * half == x.shape[-1] else jnp.concatenate([turned, x[..., 2 * half :]], axis=-1)
