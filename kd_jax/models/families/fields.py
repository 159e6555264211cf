"""The layout of a tensor on disk, and checked fields of config.json. All family files use this code."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Set
from typing import TYPE_CHECKING, Any

from kd_jax.storage import untrusted
from kd_jax.storage.files import Json

if TYPE_CHECKING:
    from kd_jax.models.config import ModelConfig

Fields = Mapping[str, Any]
MISTRAL_WINDOW = QWEN_WINDOW = 4096  # the default of sliding_window in transformers
QWEN_FULL_LAYERS = 28  # the default of max_window_layers in transformers
MANY_LAYERS = 2**16  # more layers than any model has; limits the length of a list that config.json decides


@dataclasses.dataclass(frozen=True)
class Tensor:
    """The tensor of a Hugging Face checkpoint that holds one of this project's parameters.

    A tensor with several parameters has `groups` groups of `columns` columns. In each group the parameter has the
    columns from `first` on.

    Args:
      name: the tensor's name on disk.
      transposed: True if the tensor on disk is [out, in] (`torch.nn.Linear`) and the parameter is [in, out].
      first: the first column of the parameter in a group, after a transposition.
      columns: the number of columns of a group; 0 if the tensor has only this parameter.
      groups: the number of groups, such as the number of heads if the parameters alternate from head to head.
      row, rows: the index on the first of three axes, such as the number of the expert, and the length of this axis;
        None and 0 for a tensor with at most two axes.
    """

    name: str
    transposed: bool = False
    first: int = 0
    columns: int = 0
    groups: int = 1
    row: int | None = None
    rows: int = 0

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The tensors that hold the parameter: only this one."""
        return (self,)

    def shape(self, parameter: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the tensor's shape on disk, from the shape of the parameter."""
        shape = (*parameter[:-1], self.groups * self.columns or parameter[-1])
        shape = shape[::-1] if self.transposed else shape
        return (self.rows, *shape) if self.rows else shape


@dataclasses.dataclass(frozen=True)
class Stack:
    """Tensors of equal shape, such as those of several experts, which are the rows of one parameter.

    Args:
      parts: the tensors, in the order of the parameter's first axis.
    """

    parts: tuple[Tensor, ...]


Layout = dict[str, Tensor | Stack]  # the name of a parameter, such as 'layers/0/mlp/up/kernel' -> the tensors on disk


def required(fields: Fields, name: str) -> Any:
    """Returns the field's value. An absent or null field is an error that names the field."""
    if fields.get(name) is None:
        kind = fields.get("model_type")  # the fields of a rotary embedding have no model_type
        where = (
            f"a {untrusted.printable(kind)} config"
            if kind
            else f"an object such as {untrusted.printable(dict(fields))}"
        )
        raise ValueError(f"the field {name!r} is missing; {where} must have this field.")
    return fields[name]


def whole(fields: Fields, name: str, default: int | None = None) -> int:
    """Returns a size. Without a default the field is required.

    A number of 2^31 or more is refused, because no size is so large, and such a number would overflow.
    """
    if fields.get(name) is None and default is not None:
        return default
    value = required(fields, name)
    fits = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31
    refuse_unless(fits, fields, name, "a whole number below 2^31")
    return value


def real(fields: Fields, name: str, default: float | None = None) -> float:
    """Returns a positive number. Without a default the field is required."""
    if fields.get(name) is None and default is not None:
        return default
    value = required(fields, name)
    fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e30
    refuse_unless(fits, fields, name, "a positive number")
    return float(value)


def flag(fields: Fields, name: str, default: bool) -> bool:
    """Returns True or False. A null or absent field has the default value."""
    value = default if fields.get(name) is None else fields[name]
    refuse_unless(isinstance(value, bool), fields, name, "true or false")
    return value


def refuse_unless(supported: bool, fields: Fields, name: str, expected: str) -> None:
    """Raises an error for a field whose value the transformer does not implement."""
    if not supported:
        raise ValueError(f"{name} = {untrusted.printable(fields.get(name))} is not supported; expected {expected}.")


def refuse_another_function(fields: Fields) -> None:
    """Refuses the fields with which transformers changes the function that a model computes."""
    refuse_unless(flag(fields, "is_causal", True), fields, "is_causal", "true")
    refuse_unless(not fields.get("per_layer_config"), fields, "per_layer_config", "null")


def window_from_hf(fields: Fields) -> Json:
    """Returns the sliding window of a Mistral config, which all layers have; null means no window."""
    layer_types(fields, {"full_attention"})
    return {"sliding_window": optional_window({"sliding_window": MISTRAL_WINDOW, **fields})}


def windows_from_hf(fields: Fields) -> Json:
    """Returns the sliding window of a Qwen config, and the layers that have the window."""
    used = flag(fields, "use_sliding_window", False)
    fields = {"sliding_window": QWEN_WINDOW, **fields} if used else {**fields, "sliding_window": None}
    last = min(whole(fields, "num_hidden_layers"), MANY_LAYERS)
    windowed = range(whole(fields, "max_window_layers", QWEN_FULL_LAYERS), last)
    return layer_windows_from_hf(fields, () if fields["sliding_window"] is None else windowed)


def layer_windows_from_hf(fields: Fields, windowed: Iterable[int]) -> Json:
    """Returns the sliding window, and the layers that have the window.

    Args:
      fields: the fields of config.json. `layer_types` names the type of each layer.
      windowed: the indices of the layers with a window if the config has no `layer_types`.
    """
    depth, kinds = whole(fields, "num_hidden_layers"), layer_types(fields, {"full_attention", "sliding_attention"})
    window, layers = optional_window(fields), tuple(windowed)
    if kinds:
        refuse_unless(len(kinds) == depth, fields, "layer_types", f"a type for each of the {depth} layers")
        layers = tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")
    refuse_unless(
        not layers or window is not None, fields, "layer_types",
        "'full_attention' in every layer if use_sliding_window is false or sliding_window is null",
    )  # fmt: skip
    return {"sliding_window": window, "sliding_layers": layers} if layers else {}


def layer_types(fields: Fields, known: Set[str]) -> list[str]:
    """Returns the types of the layers; [] if the config does not list them."""
    kinds = fields.get("layer_types") or []
    supported = isinstance(kinds, list) and all(isinstance(kind, str) and kind in known for kind in kinds)
    refuse_unless(supported, fields, "layer_types", f"{' or '.join(map(repr, sorted(known)))} in every layer")
    return kinds


def windows_to_hf(window: int | None, layers: Set[int], depth: int) -> Json:
    """Returns the fields of a Qwen config with `depth` layers, of which `layers` have the window."""
    if window is None:
        return {"use_sliding_window": False}
    # The first versions of transformers for Qwen read only max_window_layers.
    fields = {"use_sliding_window": True, "max_window_layers": min(layers)}
    return fields | layer_windows_to_hf(window, layers, depth)


def layer_windows_to_hf(window: int | None, layers: Set[int], depth: int) -> Json:
    """Returns the window and the types of the layers. This is the inverse of `layer_windows_from_hf`."""
    kinds = ["sliding_attention" if layer in layers else "full_attention" for layer in range(depth)]
    return {"sliding_window": window, "layer_types": kinds}


def optional_window(fields: Fields) -> int | None:
    """Returns the sliding window; None if the field is null or absent."""
    if fields.get("sliding_window") is None:
        return None
    window = whole(fields, "sliding_window")
    refuse_unless(window >= 1, fields, "sliding_window", "null, or at least 1")
    return window


def check_equal_heads(config: ModelConfig) -> None:
    """Checks that heads are not grouped, and that the head size is D / num_heads."""
    if config.num_kv_heads != config.num_heads or config.head_dim * config.num_heads != config.hidden_size:
        raise ValueError(
            f"family {config.family!r} needs num_kv_heads = num_heads and head_dim = hidden_size / num_heads; got "
            f"hidden_size={config.hidden_size}, num_heads={config.num_heads}, "
            f"num_kv_heads={config.num_kv_heads}, head_dim={config.head_dim}."
        )
