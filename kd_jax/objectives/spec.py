"""The description of a term in a config: all keys, their default values, and the keys that go together."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from kd_jax import resolve
from kd_jax.settings import Config, Spec, defaults
from kd_jax.settings import Term as TermKeys
from kd_jax.settings.declare import plain

# The keys that only a term of kind divergence uses.
OF_DIVERGENCES = (
    "assistant", "between", "weights", "vocabulary", "entry_clip", "logits", "temperature", "teacher_temperature",
    "temperature_squared", "importance",
)  # fmt: skip


class TermSpec(Mapping[str, Any]):
    """All keys of a term. A key that the config lacks has its default value."""

    def __init__(self, given: Config):
        self.given, self.defaults = given, defaults(TermKeys)
        if unknown := [key for key in given if key not in self.defaults]:
            raise ValueError(
                f"a term has no key {unknown[0]!r}{resolve.nearest(unknown[0], self.defaults)}; it has {', '.join(self)}."
            )

    def __getitem__(self, key: str) -> Any:
        value = plain(self.given[key]) if key in self.given else self.defaults[key]
        if isinstance(self.defaults[key], tuple) and isinstance(value, list):  # a config from JSON has lists
            value = tuple(value)
        return self.defaults["policy"] | value if key == "policy" else value

    def __iter__(self) -> Iterator[str]:
        return iter(self.defaults)

    def __len__(self) -> int:
        return len(self.defaults)


def check_keys(spec: Mapping[str, Any]) -> None:
    """Checks that a term has no setting that its kind does not read, and that the assistant's settings fit.

    A policy gradient may have a divergence, and a divergence a policy, so that a flag can replace one kind by the other.
    """
    kind, standard = spec["kind"], defaults(TermKeys)
    if kind != "divergence":
        for key in OF_DIVERGENCES:
            is_set = has_function(spec[key]) if key in ("assistant", "logits") else plain(spec[key]) != standard[key]
            if is_set:
                raise ValueError(
                    f"{key}={spec[key]!r} goes with kind='divergence', not with kind={kind!r}; set {key}={standard[key]!r}."
                )
    for key in ("tokens", "row_gate"):
        if kind == "spans" and has_function(spec[key]):
            raise ValueError(
                f"{key}={spec[key]!r} weights tokens, but kind='spans' compares spans of several tokens; set {key}.name='none'."
            )
    if not has_function(spec["assistant"]) and (spec["weight"] != 0 or spec["stop_gradient"]):
        raise ValueError(
            f"there is no assistant for weight={spec['weight']} and stop_gradient={spec['stop_gradient']}: name an "
            "assistant, or set weight=0.0 and stop_gradient=False."
        )


def values_by_column(where: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Returns the key `where` with a tuple of texts for each column."""
    found = {}
    for column, values in where.items():
        listed = tuple(values) if isinstance(values, list | tuple) else (values,)
        if not listed or not all(isinstance(value, str | int | float) for value in listed):
            raise ValueError(
                f"where={dict(where)!r}: the value of {column} must be a text, a number, or a list of these."
            )
        found[column] = tuple(value if isinstance(value, str) else json.dumps(value) for value in listed)
    return found


def has_function(spec: Spec | None) -> bool:
    """Returns True if the spec names a function. The names none and raw, and None, stand for no function."""
    name = spec if isinstance(spec, str) or spec is None else spec["name"]
    return name not in (None, "none", "raw")


def name_of_call(spec: Spec) -> str:
    """Returns the name of a spec without the keywords of a call."""
    return (spec if isinstance(spec, str) else spec["name"]).partition("(")[0]
