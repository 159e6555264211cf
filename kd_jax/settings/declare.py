"""Declares keys as fields of frozen dataclasses, and reads a config by such a declaration.

A *section* is a dataclass of keys. A key that is *open* takes a mapping with keywords of its own, or a spec.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeGuard, TypeVar, runtime_checkable

from kd_jax.settings.value_types import EXPECTED, fits


@runtime_checkable
class Config(Protocol):
    """A mapping with the keys of a config: an `ml_collections.ConfigDict` or a dict."""

    def __getitem__(self, key: str, /) -> Any: ...
    def __contains__(self, key: str, /) -> bool: ...
    def __iter__(self, /) -> Iterator[str]: ...


Section = TypeVar("Section")
MOST = 2**31  # a step is an int32
Field = dataclasses.Field[Any]


def key(
    default: object, meaning: str, *, least: float | None = None, choices: Sequence[str] = (), most: int = MOST,
    numbers: bool = False, is_open: bool = False,
) -> Any:  # fmt: skip
    """Returns the field of a key.

    Args:
      default: the default value, which also gives the type of the key.
      meaning: one line that says what the key does.
      least: the smallest value that is allowed.
      choices: the values that are allowed.
      most: the upper bound of whole numbers, which is not allowed itself.
      numbers: True if a tuple may have only whole numbers.
      is_open: True if the value is a mapping with keywords of its own, or a spec.
    """
    metadata = dict(meaning=meaning, least=least, choices=tuple(choices), most=most, numbers=numbers, is_open=is_open)
    if isinstance(default, Mapping):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def section(kind: type[Section], meaning: str = "") -> Section:
    """Returns the field of a section, whose keys are the fields of the dataclass `kind`."""
    field: Any = dataclasses.field(default_factory=kind, metadata={"meaning": meaning, "is_open": False})
    return field


def keys_of(kind: type) -> Iterator[tuple[str, Field, object]]:
    """Yields the name, the field and the default value of each key of a section."""
    for field in dataclasses.fields(kind):
        is_made = field.default_factory is not dataclasses.MISSING
        yield field.name, field, field.default_factory() if is_made else field.default  # pyrefly: ignore


def is_open(field: Field) -> bool:
    """Returns True if a key takes a mapping with keywords of its own, or a spec."""
    return field.metadata["is_open"]


def is_section(default: object) -> bool:
    """Returns True if the default value of a key is a section."""
    return dataclasses.is_dataclass(default)


def defaults(kind: type) -> dict[str, Any]:
    """Returns the default values of a section as nested dicts."""
    return {name: defaults(type(default)) if is_section(default) else default for name, field, default in keys_of(kind)}


def open_names(*kinds: type) -> tuple[str, ...]:
    """Returns the names of the open keys of sections, and of the sections inside them."""
    names: dict[str, None] = {}  # a dict keeps the order
    for kind in kinds:
        for name, field, default in keys_of(kind):
            names |= dict.fromkeys(open_names(type(default)) if is_section(default) else [name] * is_open(field))
    return tuple(names)


def read(kind: type[Section], config: Config, prefix: str = "") -> Section:
    """Returns a section with the values of a config, after a check of their types.

    ml_collections itself refuses most assignments of the wrong type. It accepts None, a bool in place of a number, and
    any content of a dict that replaces another dict.

    Args:
      kind: the dataclass of the section.
      config: the config of the section.
      prefix: the prefix of the keys in messages.

    Raises:
      ValueError: a key is missing, or a value does not have the type of the default.
    """
    values = {}
    for name, field, default in keys_of(kind):
        full_name = f"{prefix}{name}"
        if name not in config:
            raise ValueError(
                f"the config lacks the key {full_name!r}: a dict that replaces a section must have all keys of the "
                "section."
            )
        value = config[name]
        if is_section(default):
            if not _is_mapping(value):
                names = ", ".join(sorted(other for other, *_ in keys_of(type(default))))
                raise ValueError(f"{full_name}={value!r} must be a dict with the keys {names}.")
            values[name] = read(type(default), value, f"{full_name}.")
        elif is_open(field) or isinstance(default, Mapping):
            _check_mapping(full_name, value, default)
            values[name] = plain(value)
        else:
            values[name] = _checked_value(full_name, value, default, field)
    return kind(**values)


def check_ranges(values: object, prefix: str = "") -> None:
    """Checks that the values of a section, and of the sections inside it, are in their ranges.

    Raises:
      ValueError: a value is out of range, or is not one of the choices; the message names the key.
    """
    for name, field, _ in keys_of(type(values)):
        value, full_name, metadata = getattr(values, name), f"{prefix}{name}", field.metadata
        if is_section(value):
            check_ranges(value, f"{full_name}.")
        elif is_open(field) or isinstance(value, Mapping):
            _check_below(full_name, value, MOST)
        else:
            _check_below(full_name, value, metadata["most"])
            if metadata["least"] is not None and not value >= metadata["least"]:  # written so that nan is refused
                raise ValueError(f"{full_name}={value} must be at least {metadata['least']}.")
            if metadata["choices"] and value not in metadata["choices"]:
                raise ValueError(f"{full_name}={value!r} is not one of {', '.join(metadata['choices'])}.")


def plain(value: Any) -> Any:
    """Returns any value of a config with a dict in place of each ConfigDict."""
    if _is_mapping(value):
        return {name: plain(value[name]) for name in value}
    if type(value) in (list, tuple):
        return type(value)(plain(entry) for entry in value)
    return value


def _check_mapping(name: str, value: object, default: object) -> None:
    is_spec = isinstance(value, str) and isinstance(default, Mapping) and "name" in default
    if isinstance(default, Mapping) and not _is_mapping(value) and not is_spec:
        raise ValueError(f"{name}={value!r} must be a dict such as {dict(default) or {'key': 'value'}}.")


def _checked_value(name: str, value: Any, default: object, field: Field) -> object:
    kind = type(default)
    if not fits(value, kind):
        raise ValueError(f"{name}={value!r} must be {EXPECTED.get(kind, kind.__name__)}.")
    if not isinstance(default, tuple):
        return value
    if default and (wrong := [entry for entry in value if not fits(entry, type(default[0]))]):
        raise ValueError(f"{name}={value!r} must be a tuple such as {default!r}; {wrong[0]!r} has another type.")
    if field.metadata["numbers"] and not all(fits(entry, int) for entry in value):
        raise ValueError(f"{name}={value!r} must be a tuple of whole numbers, such as (0, 3, 6).")
    return tuple(value)


def _check_below(name: str, value: object, most: int) -> None:
    """Checks that the whole numbers of a value, which may be a mapping, are below a bound."""
    if isinstance(value, Mapping):
        for entry, inner in value.items():
            _check_below(f"{name}.{entry}", inner, most)
    elif isinstance(value, int) and value >= most:
        raise ValueError(f"{name}={value} must be below {most}.")


def _is_mapping(value: object) -> TypeGuard[Config]:
    return hasattr(value, "keys")
