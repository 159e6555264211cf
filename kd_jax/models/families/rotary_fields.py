"""The fields of config.json that describe rotary embeddings, in the spellings of transformers 4 and transformers 5.

- Up to transformers 4, the base and the scaling are at the top level, as `rope_theta` and `rope_scaling`. Most folders
  of the Hugging Face hub have this spelling. Gemma 3 has another base for layers with a window, `rope_local_base_freq`.
- Since transformers 5, the object `rope_parameters` has the base and the scaling. Gemma 3 has one such object for each
  type of layers.

Both are read. The spelling of transformers 4 is written, which transformers 5 still reads.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from kd_jax.models.families.fields import Fields, flag, real, refuse_unless, required, whole
from kd_jax.models.rotary import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rotary,
    Scaling,
    YarnScaling,
    yarn_attention_factor,
)
from kd_jax.storage import untrusted
from kd_jax.storage.files import Json

LENGTH = "original_max_position_embeddings"
MANY_FACTORS = 2**16  # more pairs of coordinates than any head has


@dataclasses.dataclass(frozen=True)
class RotaryNames:
    """The names and defaults of a family's fields at the top level of config.json.

    Args:
      base: the name of the base.
      default_base: the base if no field names the base.
      share: the name of the part of each head that is turned; None if the family always turns all coordinates.
      default_share: the part if no field names the part.
      types: the names of the scalings that the family has.
      aliases: other names of scalings, with the usual names.
    """

    base: str = "rope_theta"
    default_base: float = 10000.0
    share: str | None = None
    default_share: float = 1.0
    types: tuple[str, ...] = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)


def rotary_from_hf(fields: Fields, names: RotaryNames = RotaryNames()) -> Json:
    """Returns the keywords `rope_theta`, `rope_scaling` and `rotary_share` of `ModelConfig`.

    If both `rope_scaling` and `rope_parameters` are set, transformers uses `rope_scaling` and ignores
    `rope_parameters`, including the base.

    Raises:
      ValueError: a field has a value that the rotary embedding does not have.
    """
    name = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    rotary = _rotary(fields, name, fields.get(name) or {}, names)
    return {"rope_theta": rotary.base, "rope_scaling": rotary.scaling, "rotary_share": rotary.share}


def layered_rotary_from_hf(fields: Fields, names: RotaryNames, window_base: float) -> Json:
    """Returns the keywords of `ModelConfig` for a family whose layers with a window have their own rotary embedding.

    Args:
      fields: the fields of config.json.
      names: the fields of the layers without a window.
      window_base: the base in layers with a window if no field names this base.

    Returns:
      The keywords that `rotary_from_hf` returns, and `window_rotary`.

    Raises:
      ValueError: a field has a value that the rotary embedding does not have.
    """
    layered = fields.get("rope_parameters") or {}
    refuse_unless(
        isinstance(layered, Mapping) and set(layered) <= {"full_attention", "sliding_attention"},
        fields, "rope_parameters", "an object for 'full_attention' and an object for 'sliding_attention'",
    )  # fmt: skip
    full, window = (layered.get(kind) or {} for kind in ("full_attention", "sliding_attention"))
    scaling = fields.get("rope_scaling") or {}
    for name, value in (("rope_parameters", full), ("rope_scaling", scaling)):
        refuse_unless(isinstance(value, Mapping), fields, name, "an object, or null")
    keywords = rotary_from_hf({**fields, "rope_scaling": None, "rope_parameters": {**full, **scaling}}, names)
    local = dataclasses.replace(names, base="rope_local_base_freq", default_base=window_base)
    return keywords | {"window_rotary": _rotary(fields, "rope_parameters", window, local)}


def rotary_to_hf(rotary: Rotary, max_positions: int, names: RotaryNames = RotaryNames()) -> Json:
    """Returns the fields of a rotary embedding of a model with `max_positions`."""
    fields: Json = {names.base: rotary.base, "rope_scaling": _scaling_to_hf(rotary.scaling, max_positions)}
    if names.share is not None:
        fields[names.share] = rotary.share
    if isinstance(rotary.scaling, LongRopeScaling):
        fields[LENGTH] = rotary.scaling.original_max_positions  # Phi-3 reads the length only at the top level
    return fields


def layered_rotary_to_hf(rotary: Rotary, window: Rotary, max_positions: int, names: RotaryNames) -> Json:
    """Returns the fields for layers without a window and for layers with a window. This is the inverse of reading."""
    if window.scaling is None:
        return rotary_to_hf(rotary, max_positions, names) | {"rope_local_base_freq": window.base}
    kinds = {"full_attention": rotary, "sliding_attention": window}  # the older spelling has no scaling of the second
    return {"rope_parameters": {kind: _rope_parameters(part, max_positions) for kind, part in kinds.items()}}


def _rotary(fields: Fields, name: str, rope: Any, names: RotaryNames) -> Rotary:
    """Returns the rotary embedding that the object `rope` describes, which is the field `name`."""
    refuse_unless(isinstance(rope, Mapping), fields, name, "an object, or null")
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise ValueError(
            f"{name} = {untrusted.printable(dict(rope))} is not supported; expected one rotary embedding for all layers."
        )
    kind = rope.get("rope_type", rope.get("type", "default"))
    kind = names.aliases.get(kind, kind) if isinstance(kind, str) else kind
    if kind not in names.types:
        known = [repr(known) for known in names.types]
        raise ValueError(
            f"rope_type {untrusted.printable(kind)} in {name} = {untrusted.printable(dict(rope))} is not supported; expected "
            f"rope_type {', '.join(known[:-1])} or {known[-1]}."
        )
    share_name = names.share or "partial_rotary_factor"
    top = {"rope_theta": fields.get(names.base), "partial_rotary_factor": fields.get(share_name)}
    both = {"rope_theta": names.default_base, "partial_rotary_factor": names.default_share}
    both |= {key: source[key] for source in (top, rope) for key in both if source.get(key) is not None}
    share = real(both, "partial_rotary_factor")
    expected = "1.0" if names.share is None else "at most 1"
    refuse_unless(share == 1 or (names.share is not None and share < 1), both, "partial_rotary_factor", expected)
    scaling = None if kind == "default" else _READERS[kind](fields, rope)
    return Rotary(real(both, "rope_theta"), scaling, share)


def _linear(fields: Fields, rope: Fields) -> LinearScaling:
    return LinearScaling(real(rope, "factor"))


def _dynamic(fields: Fields, rope: Fields) -> DynamicScaling:
    factor = real(rope, "factor")
    refuse_unless(factor >= 1, rope, "factor", "at least 1")
    return DynamicScaling(factor, whole(fields, "max_position_embeddings"))


def _yarn(fields: Fields, rope: Fields) -> YarnScaling:
    length = _original_length(fields, rope)
    factor = real(rope, "factor", whole(fields, "max_position_embeddings", 0) / length or None)
    attention_factor = real(rope, "attention_factor", 0.0)
    if rope.get("mscale") and rope.get("mscale_all_dim") and not attention_factor:
        # Only DeepSeek's models name both scales.
        scales = [yarn_attention_factor(factor, real(rope, name)) for name in ("mscale", "mscale_all_dim")]
        attention_factor = scales[0] / scales[1]
    scaling = YarnScaling(
        factor, length, attention_factor,
        beta_fast=real(rope, "beta_fast", 32.0), beta_slow=real(rope, "beta_slow", 1.0), truncate=flag(rope, "truncate", True),
    )  # fmt: skip
    ordered = scaling.beta_slow <= scaling.beta_fast
    refuse_unless(ordered, {"beta_slow": scaling.beta_slow}, "beta_slow", f"at most beta_fast = {scaling.beta_fast}")
    return scaling


def _longrope(fields: Fields, rope: Fields) -> LongRopeScaling:
    length = _original_length(fields, rope)
    return LongRopeScaling(
        short_factors=_numbers(rope, "short_factor"),
        long_factors=_numbers(rope, "long_factor"),
        original_max_positions=length,
        factor=real(rope, "factor", whole(fields, "max_position_embeddings", 0) / length or None),
        attention_factor=real(rope, "attention_factor", 0.0),
    )


def _llama3(fields: Fields, rope: Fields) -> Llama3Scaling:
    scaling = Llama3Scaling(
        factor=real(rope, "factor"),
        low_freq_factor=real(rope, "low_freq_factor"),
        high_freq_factor=real(rope, "high_freq_factor"),
        original_max_positions=_original_length(fields, rope),
    )
    ordered = scaling.low_freq_factor < scaling.high_freq_factor
    refuse_unless(ordered, rope, "low_freq_factor", f"less than high_freq_factor = {scaling.high_freq_factor}")
    return scaling


_READERS: dict[str, Callable[[Fields, Fields], Scaling]] = {
    "linear": _linear, "dynamic": _dynamic, "yarn": _yarn, "longrope": _longrope, "llama3": _llama3,
}  # fmt: skip


def _original_length(fields: Fields, rope: Fields) -> int:
    """Returns the length before the scaling.

    The length is a field at the top level or in `rope`. Without this field, the length is the model's number of
    positions.
    """
    holder = fields if fields.get(LENGTH) is not None else rope
    length = whole(holder, LENGTH, fields.get("max_position_embeddings"))
    refuse_unless(length >= 2, {LENGTH: length}, LENGTH, "at least 2")
    return length


def _numbers(rope: Fields, name: str) -> tuple[float, ...]:
    """Returns a list of positive numbers."""
    values = required(rope, name)
    refuse_unless(isinstance(values, list) and 0 < len(values) < MANY_FACTORS, rope, name, "a list of positive numbers")
    return tuple(real({name: value}, name) for value in values)


def _rope_parameters(rotary: Rotary, max_positions: int) -> Json:
    scaling, fields = rotary.scaling, _scaling_to_hf(rotary.scaling, max_positions) or {"rope_type": "default"}
    length = {LENGTH: scaling.original_max_positions} if isinstance(scaling, LongRopeScaling) else {}
    return {"rope_theta": rotary.base, **fields, **length}


def _scaling_to_hf(scaling: Scaling | None, max_positions: int) -> Json | None:
    """Returns the object `rope_scaling`. Values that follow from the others are omitted, because old readers refuse them."""
    match scaling:
        case None:
            return None
        case LinearScaling(factor):
            return {"rope_type": "linear", "factor": factor}
        case DynamicScaling(factor):
            return {"rope_type": "dynamic", "factor": factor}
        case YarnScaling():
            fields = {name: getattr(scaling, name) for name in ("factor", "attention_factor", "beta_fast", "beta_slow")}
            fields |= {} if scaling.truncate else {"truncate": False}
            return {"rope_type": "yarn", **fields, LENGTH: scaling.original_max_positions}
        case LongRopeScaling(short, long, length, factor, attention_factor):
            fields: Json = {"rope_type": "longrope", "short_factor": list(short), "long_factor": list(long)}
            fields |= {} if factor == max_positions / length else {"factor": factor}
            usual = dataclasses.replace(scaling, attention_factor=0.0).attention_factor
            return fields | ({} if attention_factor == usual else {"attention_factor": attention_factor})
        case Llama3Scaling():
            names = ("factor", "low_freq_factor", "high_freq_factor")
            fields = {name: getattr(scaling, name) for name in names}
            return {"rope_type": "llama3", **fields, LENGTH: scaling.original_max_positions}
        case _:
            raise ValueError(f"the scaling {scaling} of a rotary embedding has no form in config.json.")
