"""What the family files share: how a tensor lies on disk, and how config.json spells a rotary embedding."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from kd_jax import untrusted

Fields = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where one of our parameters lies in a Hugging Face checkpoint.

    Args:
      name: the tensor's name on disk.
      transposed: the disk holds [out, in] (`torch.nn.Linear`), we hold [in, out].
      part: which of `parts` equal slices of the last axis, for a tensor that holds several fused parameters.
      parts: how many parameters are fused.
    """

    name: str
    transposed: bool = False
    part: int = 0
    parts: int = 1


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Rotary frequencies stretched for a longer context, as Llama 3.1 does it: low ones divided by `factor`.

    References:
      Grattafiori et al., "The Llama 3 Herd of Models", https://arxiv.org/abs/2407.21783, 2024.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


def required(fields: Fields, name: str) -> Any:
    """The field's value; absent or null is an error that names it."""
    if fields.get(name) is None:
        kind = untrusted.shown(fields.get("model_type"))
        raise ValueError(f"the field {name!r} is missing; a {kind} config must give it.")
    return fields[name]


def whole(fields: Fields, name: str, default: int | None = None) -> int:
    """A size; without a default it is required. 2^31 and more is no size of anything, and overflows elsewhere."""
    if fields.get(name) is None and default is not None:
        return default
    value = required(fields, name)
    fits = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31
    refuse_unless(fits, fields, name, "a whole number below 2^31")
    return value


def real(fields: Fields, name: str, default: float | None = None) -> float:
    """A positive number; without a default it is required."""
    if fields.get(name) is None and default is not None:
        return default
    value = required(fields, name)
    fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e30
    refuse_unless(fits, fields, name, "a positive number")
    return float(value)


def flag(fields: Fields, name: str, default: bool) -> bool:
    """True or false; null is the default."""
    value = default if fields.get(name) is None else fields[name]
    refuse_unless(isinstance(value, bool), fields, name, "true or false")
    return value


def refuse_unless(supported: bool, fields: Fields, name: str, expected: str) -> None:
    """A field that is in use and that the transformer does not implement must not be ignored silently."""
    if not supported:
        raise ValueError(f"{name} = {untrusted.shown(fields.get(name))} is not supported; expected {expected}.")


def refuse_another_function(fields: Fields) -> None:
    """Refuses the fields by which transformers gives any model another function."""
    refuse_unless(flag(fields, "is_causal", True), fields, "is_causal", "true")
    refuse_unless(not fields.get("per_layer_config"), fields, "per_layer_config", "null")


def refuse_window(fields: Fields) -> None:
    """Every layer attends to everything: a sliding window that could cut anything off is refused."""
    used = flag(fields, "use_sliding_window", True) and fields.get("sliding_window") is not None
    cuts = used and whole(fields, "sliding_window") < whole(fields, "max_position_embeddings")
    refuse_unless(not cuts, fields, "sliding_window", "null, or at least max_position_embeddings")


def rotary_from_hf(fields: Fields) -> dict[str, Any]:
    """Returns `rope_theta` and `rope_scaling`, read from every spelling that transformers 5.24 reads.

    Up to transformers 4 both fields are at the top level, and `rope_scaling` is null for the plain embedding. Since
    transformers 5 one field, `rope_parameters`, holds the base as well. Where both fields are set, transformers uses
    `rope_scaling` and ignores `rope_parameters`, its base included.
    """
    name = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    rope = fields.get(name) or {}
    refuse_unless(isinstance(rope, Mapping), fields, name, "an object, or null")
    kind = rope.get("rope_type", rope.get("type", "default"))
    both = {"rope_theta": 10000.0, "partial_rotary_factor": 1.0}
    both |= {key: source[key] for source in (fields, rope) for key in both if source.get(key) is not None}
    if kind not in ("default", "llama3") or any(isinstance(value, Mapping) for value in rope.values()):
        raise ValueError(
            f"the rotary embedding {name} = {untrusted.shown(dict(rope))} is not supported; expected rope_type 'default' "
            "or 'llama3'."
        )
    refuse_unless(both["partial_rotary_factor"] == 1.0, both, "partial_rotary_factor", "1.0")
    scaling = _llama3_scaling(fields, rope) if kind == "llama3" else None
    return {"rope_theta": real(both, "rope_theta"), "rope_scaling": scaling}


def _llama3_scaling(fields: Fields, rope: Fields) -> Llama3Scaling:
    """Returns the scaling; the length before it is named at the top level, or in `rope`, or is the model's own."""
    name = "original_max_position_embeddings"
    named = fields if fields.get(name) is not None else rope
    scaling = Llama3Scaling(
        factor=real(rope, "factor"),
        low_freq_factor=real(rope, "low_freq_factor"),
        high_freq_factor=real(rope, "high_freq_factor"),
        original_max_positions=whole(named, name, fields.get("max_position_embeddings")),
    )
    ordered = scaling.low_freq_factor < scaling.high_freq_factor
    refuse_unless(ordered, rope, "low_freq_factor", f"less than high_freq_factor = {scaling.high_freq_factor}")
    return scaling


def rotary_to_hf(theta: float, scaling: Llama3Scaling | None) -> dict[str, Any]:
    """The classic spelling, which transformers 4 needs and transformers 5 still reads."""
    if scaling is None:
        return {"rope_theta": theta, "rope_scaling": None}
    return {
        "rope_theta": theta,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        },
    }
