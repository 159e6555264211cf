"""Turns the names and numbers of a config into functions, and explains errors in them.

A spec is a name, or a mapping with the name under ``"name"`` and keyword arguments beside the name::

    {"name": "alpha_beta", "alpha": 0.2, "beta": 0.7}

The name may be a call, ``"alpha_beta(alpha=0.2, beta=0.7)"``. Then the keyword arguments beside the name are ignored,
so that a flag can replace one function by another function with other keywords.

A module is its own registry: a spec may name the entries of its ``__all__``, or its public callables if it has no
``__all__``. ``ALIASES`` may list further names of entries. A name from another module is written like an entry point,
``"package.module:function"``, also as a call. For a function of a notebook, or of the script that runs, the module is
``__main__``: ``"__main__:mine(scale=2.0)"``.

A config holds names, not functions, because a config is data that is stored beside the checkpoints and read again when
a run resumes.
"""

import ast
import difflib
import functools
import importlib
import inspect
import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Spec = str | Mapping[str, Any]  # or an ml_collections.ConfigDict, or any other object that `dict` accepts


def bind(spec: Spec, module: ModuleType, later: tuple[str, ...] = (), **defaults: Any) -> functools.partial[Any]:
    """Returns the function that a spec names, with the keywords bound, such as a divergence or an assistant.

    The function is traced once on abstract arguments: vectors for parameters called ``log_...`` or ``...logits``,
    scalars for the other positional parameters. A number out of range is therefore an error when a run is set up, not
    in the first step.

    Args:
      spec: a name, or a mapping with ``name`` and keywords.
      module: the module in which the name is looked up.
      later: names of integer keywords that each call gives, such as `target`, if the function has them.
      **defaults: values of keywords that the spec does not give.

    Returns:
      A ``functools.partial`` that takes the function's positional arguments, and the keywords in `later`.

    Raises:
      ValueError: a name or a keyword is unknown, a keyword is missing, or a number is out of range.

    Example:
      >>> from kd_jax import divergences
      >>> bind({"name": "skew_forward_kl", "skew": 0.2}, divergences).keywords
      {'skew': 0.2}
    """
    function, keywords = look_up(spec, module, positional=True, later=later, **defaults)
    return close(function, later, **keywords)


def close(function: Callable[..., Any], later: tuple[str, ...] = (), **keywords: Any) -> functools.partial[Any]:
    """Returns ``functools.partial(function, **keywords)``, after tracing it once as `bind` does."""
    bound = functools.partial(function, **keywords)
    vector = lambda parameter: parameter.startswith("log_") or parameter.endswith("logits")
    shapes = [
        jax.ShapeDtypeStruct((2,) if vector(parameter) else (), jnp.float32)
        for parameter in array_parameters(function, later)
    ]
    integers = {name: jax.ShapeDtypeStruct((), jnp.int32) for name in later if takes(function, name)}
    jax.eval_shape(bound, *shapes, **integers)
    return bound


def build(spec: Spec, module: ModuleType, **defaults: Any) -> Any:
    """Calls the factory that a spec names, and returns the result, such as a schedule or an optimiser.

    A keyword's value may be a spec (a mapping with ``name``) or a list of specs. Such specs are built first, from the
    same module. A config describes ``join_schedules`` in this way.

    Args:
      spec: a name, or a mapping with ``name`` and keywords.
      module: the module in which the name is looked up.
      **defaults: values of keywords that the spec does not give.

    Returns:
      The result of calling the factory with the keywords.

    Raises:
      ValueError: a name or a keyword is unknown, a keyword is missing, or a number is out of range.

    Example:
      >>> from kd_jax import schedules
      >>> spec = {"name": "linear_schedule", "init_value": 0.0, "end_value": 1.0, "transition_steps": 10}
      >>> float(build(spec, schedules)(5))
      0.5
    """
    factory, keywords = look_up(spec, module, positional=False, **defaults)
    return factory(**build_nested(keywords, module))


def look_up(
    spec: Spec, module: ModuleType, *, positional: bool, beside: tuple[str, ...] = (), later: tuple[str, ...] = (),
    **defaults: Any,
) -> tuple[Callable[..., Any], dict[str, Any]]:  # fmt: skip
    """Returns the function that a spec names, and the keywords of the spec.

    The name is checked against the module, and the keywords against the function's signature.

    Args:
      spec: a name, or a mapping with ``name`` and keywords.
      module: the module in which the name is looked up.
      positional: True if the required positional parameters are arrays that are given later, so that a spec may not
        name them. False if these parameters are keywords that the spec must give.
      beside: additional keywords that a spec may have and the function does not take.
      later: names of parameters that each call gives, so that a spec may not give them.
      **defaults: values of keywords that the spec does not give.

    Returns:
      The function, and its keywords with their values.

    Raises:
      ValueError: a name or a keyword is unknown, a keyword is missing, or a text stands in place of a number.
    """
    if not isinstance(spec, str) and not hasattr(spec, "keys"):
        raise ValueError(
            f"{spec!r} is not a spec: write a name, a call such as name(keyword=1.0), or a mapping with the key 'name'."
        )
    keywords = {} if isinstance(spec, str) else dict(spec)
    name = spec if isinstance(spec, str) else keywords.pop("name", None)
    is_call = isinstance(name, str) and "(" in name
    if isinstance(name, str):
        module, name = _home(name, module)
        if is_call:
            name, keywords = _parse_call(name)
    known = names(module)
    if name not in known and name not in getattr(module, "ALIASES", ()):
        problem = "no name" if name is None else f"unknown name {name!r}"
        location = f"in the spec {_show(spec)}{nearest(name, known)}"
        raise ValueError(f"{problem} {location}; {module.__name__} has {', '.join(known)}.")
    function = getattr(module, name)
    keywords = defaults | keywords

    parameters = inspect.signature(function).parameters.values()
    arrays = [*array_parameters(function, later), *later] if positional else []
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    options = {p.name: p.default for p in parameters if p.kind in by_name and p.name not in arrays}
    unknown = [keyword for keyword in keywords if keyword not in options and keyword not in beside]
    if unknown and not any(p.kind == p.VAR_KEYWORD for p in parameters):
        location = f"in the spec {_show(spec)}{nearest(unknown[0], [*options, *beside])}"
        takes = f"{name} takes {', '.join([*options, *beside]) or 'no keywords'}"
        is_beside = not isinstance(spec, str) and not is_call
        hint = f"; the name as a call, '{name}()', ignores the keywords beside the name" if is_beside else ""
        raise ValueError(f"unknown keyword {unknown[0]!r} {location}; {takes}{hint}.")
    missing = [o for o, default in options.items() if default is inspect.Parameter.empty and o not in keywords]
    if missing:
        raise ValueError(f"the spec {_show(spec)} lacks {', '.join(missing)}, for which {name} has no default.")
    for keyword, value in keywords.items():
        default = options.get(keyword)
        if isinstance(value, str) and isinstance(default, numbers.Real):
            kind = "true or false" if isinstance(default, bool) else "a number"
            raise ValueError(f"{keyword}={value!r} in the spec {_show(spec)} must be {kind}, such as {default!r}.")
    return function, keywords


def build_nested(keywords: Mapping[str, Any], module: ModuleType) -> dict[str, Any]:
    """Returns the keywords with each spec among their values replaced by the object that `build` makes of the spec."""
    return {name: _build_nested(value, module) for name, value in keywords.items()}


def array_parameters(function: Callable[..., Any], later: tuple[str, ...] = ()) -> list[str]:
    """Returns the names of a function's required positional parameters, except those in `later`."""
    return [
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty and p.name not in later
    ]


def takes(function: Callable[..., Any], keyword: str) -> bool:
    """Returns True if a function has a parameter of a name."""
    return keyword in inspect.signature(function).parameters


def names(module: ModuleType) -> list[str]:
    """Returns the names that a spec may take from a module: ``__all__``, or else the public callables."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    return [name for name in dir(module) if not name.startswith("_") and callable(getattr(module, name))]


def check_number(name: str, value: object, low: float = -math.inf, high: float = math.inf) -> float:
    """Returns ``value`` as a float, after a check that ``value`` is a finite Python number from ``low`` to ``high``.

    Raises:
      ValueError: ``value`` is not a finite number, or is out of range.
    """
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, not {value!r}.")
    if not low <= float(value) <= high:
        raise ValueError(f"{name} must be between {low:g} and {high:g}, but is {value!r}.")
    return float(value)


def check_fraction(name: str, value: object) -> float | jax.Array:
    """Returns ``value``, after a check that a Python number is in ``[0, 1]``.

    An array is not checked, because the array may be traced.
    """
    if isinstance(value, jax.Array | np.ndarray):
        return jnp.asarray(value)
    return check_number(name, value, 0.0, 1.0)


def nearest(name: object, known: Iterable[str]) -> str:
    """Returns `` (did you mean 'forward_kl'?)`` for a name close to a known name, and an empty string otherwise."""
    lower = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(str(name).lower(), lower, n=1)
    return f" (did you mean {lower[close[0]]!r}?)" if close else ""


def _home(name: str, module: ModuleType) -> tuple[ModuleType, str]:
    """Returns the module and the function's name of ``package.module:name``; without a colon the module is `module`."""
    path, colon, rest = name.partition(":")
    if not colon or "(" in path:  # a colon inside a call's keywords does not separate a module
        return module, name
    try:
        return importlib.import_module(path), rest
    except (ImportError, TypeError, ValueError) as error:  # TypeError and ValueError come from relative and empty names
        raise ValueError(f"the module {path!r} of the name {name!r} cannot be imported: {error}.") from error


def _parse_call(text: str) -> tuple[str, dict[str, Any]]:
    """Returns the name and the keywords of a call. The keywords' values must be literals."""
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise SyntaxError
        return call.func.id, {str(k.arg): ast.literal_eval(k.value) for k in call.keywords if k.arg}
    except (SyntaxError, ValueError):
        raise ValueError(f"{text!r} is not a call with keywords, such as alpha_beta(alpha=0.2, beta=0.7).") from None


def _build_nested(value: Any, module: ModuleType) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_build_nested(entry, module) for entry in value)
    return build(value, module) if hasattr(value, "keys") and "name" in value else value


def _show(spec: Spec) -> str:
    return repr(spec if isinstance(spec, str) else dict(spec))
