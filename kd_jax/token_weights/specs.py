"""Turns specs of rules and of row gates into functions of scores.

A spec has the rule's name and options, and these keys:

- ``of``: the score that the rule's parameter ``score`` receives. This is the name of a score or of an input, a mapping
  with the name and the score's options, or several of these with ``combine``. A mapping with ``of`` of its own, and
  without a name, is one score made of several.
- ``combine``: how several scores become one: 'product', or 'soft_or' for h + d - h d.
- ``scale``: how each score is scaled before: 'none', 'max' for division by the maximum, 'min_max', or 'quantiles' for
  the 5 % and 95 % quantiles with clipping to [0, 1]. The statistics are over the batch's counted tokens. If a rule has
  an option ``scale``, the key is this option, and a mapping under ``of`` may hold the scale of a score.
- ``divide_by``: 'all' to divide the weighted sum by the number of counted tokens, 'kept' by the sum of their weights.
- ``rules``: the factors of the rule `product`, a mapping from any names to specs without ``divide_by``.

An option of a rule, of a gate or of a temperature that is a number may have a schedule: a mapping with the name of a
schedule and its keywords. The options of a score may not.

A key with the value None is a key that the spec does not have.
"""

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from kd_jax import resolve
from kd_jax.resolve import Spec
from kd_jax.token_weights import row_gates, rules, statistics, temperatures
from kd_jax.token_weights import scores as token_scores
from kd_jax.token_weights.functions import Compute, Rule, Score, TokenFunction, Values
from kd_jax.token_weights.shapes import check_shapes

DIVISORS = ("all", "kept")
SCALES = ("none", "max", "min_max", "quantiles")
COMBINATIONS = ("product", "soft_or")
# The inputs that the caller supplies. A rule with one of the first two sees the whole batch.
WHOLE_BATCH = ("counted", "row")
INPUTS = (*WHOLE_BATCH, "position", "position_from_end", "drawn_log_q", "divergence", "has_view", "weights")
ARRAYS = ("teacher", "student", "target")  # the possible parameters of a score


def make_rule(spec: Spec | None) -> Rule | None:
    """Returns the rule that a spec describes, and None for the name 'none'.

    Args:
      spec: a mapping with the rule's name, its options, and the keys of this module; or the same as a call.

    Raises:
      ValueError: a name is unknown, an option is missing or out of range, or the rule returns an array of another shape
        than its tokens'.

    Example:
      >>> rule = make_rule({"name": "threshold", "of": "teacher_entropy", "at_least": 0.8, "divide_by": "all"})
      >>> rule.scores["teacher_entropy"].reads, rule.inputs, rule.looks_at_batch
      (('teacher',), (), False)
      >>> rule({"teacher_entropy": jnp.array([0.5, 0.9])}).tolist()
      [0.0, 1.0]
    """
    if spec is None or _name(spec) == "none":
        return None
    try:
        reads = _Reads("tokens")
        weights, divide_by = _rule(spec, rules, reads)
        if divide_by is None:
            raise ValueError(
                f"the spec {_show(spec)} lacks divide_by: 'all' divides the sum by the number of counted tokens, "
                "'kept' by the number of kept tokens, or by the sum of the weights."
            )
        statistics.check_name("divide_by", divide_by, DIVISORS)
        has_counted = "counted" in reads.inputs

        def compute(values: Values) -> Array:
            found = _as_float(weights(values))
            return jnp.where(values["counted"], found, 0) if has_counted else found

        local = not set(WHOLE_BATCH) & set(reads.inputs)
        # `compute` would give a scalar the shape of `counted`, so the check is of the rule itself.
        check_shapes(reads, lambda values: _as_float(weights(values)), local, jnp.floating, "a number")
        _refuse_weights(spec, reads)
        at_batch = not local or divide_by == "kept"
        return Rule(reads.scores, reads.inputs, reads.numbers, at_batch, compute, divide_by)
    except ValueError as error:
        raise ValueError(f"tokens: {error}") from error


def make_gate(spec: Spec | None) -> TokenFunction | None:
    """Returns the row gate that a spec describes, and None for the name 'none'.

    Args:
      spec: a mapping with the gate's name, its options, and the keys `of`, `combine` and `scale`; or the same as a call.

    Raises:
      ValueError: a name is unknown, an option is missing or out of range, or the gate does not return a truth value for
        each token.

    Example:
      >>> make_gate({"name": "drop_lowest", "of": "log_p", "fraction": 0.2}).inputs
      ('counted', 'row')
    """
    if spec is None or _name(spec) == "none":
        return None
    try:
        reads = _Reads("row_gate")
        compute, _ = _rule(spec, row_gates, reads, keys=())
        local = not set(WHOLE_BATCH) & set(reads.inputs)
        check_shapes(reads, compute, local, jnp.bool_, "True or False")
        _refuse_weights(spec, reads)
        return TokenFunction(reads.scores, reads.inputs, reads.numbers, not local, compute)
    except ValueError as error:
        raise ValueError(f"row_gate: {error}") from error


def make_temperature(spec: Spec) -> TokenFunction:
    """Returns the function that a spec of `kd_jax.token_weights.temperatures` describes, a factor of the temperature.

    Args:
      spec: a mapping with the function's name, its options, and the keys `of`, `combine` and `scale`; or a call.

    Raises:
      ValueError: a name is unknown, or an option is missing or out of range.
    """
    try:
        reads = _Reads("temperature")
        compute, _ = _rule(spec, temperatures, reads, keys=())
        check_shapes(reads, compute, False, jnp.floating, "a number")
        return TokenFunction(reads.scores, reads.inputs, reads.numbers, True, compute)
    except ValueError as error:
        raise ValueError(f"temperature: {error}") from error


class _Reads:
    """The scores, the inputs and the schedules that a rule reads; making the rule fills them.

    Attributes:
      key: the first part of the schedules' names.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self.scores: dict[str, Score] = {}
        self.numbers: dict[str, Spec] = {}
        self._inputs: set[str] = set()

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(name for name in INPUTS if name in self._inputs)

    def input(self, name: str) -> Compute:
        self._inputs.add(name)
        return lambda values: values[name]

    def score(self, spec: Spec) -> Compute:
        function, keywords = resolve.look_up(spec, token_scores, positional=True)
        if scheduled := [name for name, value in keywords.items() if _is_schedule(value)]:
            raise ValueError(
                f"the score {_show(spec)} has a schedule for {scheduled[0]!r}, but the options of a score are constant."
            )
        reads = _positional(function)
        if unknown := [name for name in reads if name not in ARRAYS]:
            raise ValueError(
                f"the score {_show(spec)} has a parameter {unknown[0]!r}, but a score reads {', '.join(ARRAYS)}."
            )
        options = ", ".join(f"{name}={value!r}" for name, value in keywords.items())
        name = str(_name(spec))
        label = f"{name}({options})" if options and "(" not in name else name
        self.scores[label] = Score(functools.partial(function, **keywords), reads)
        return lambda values: values[label]

    def number(self, name: str, schedule: Spec, whole: bool) -> Compute:
        """Returns the function from values to an option that has a schedule."""
        label = f"{self.key}.{name}"
        self.numbers[label] = schedule
        return lambda values: _rounded(values[label]) if whole else values[label]


def _rule(
    spec: Spec, module: Any, reads: _Reads, keys: tuple[str, ...] = ("divide_by",), within: str = ""
) -> tuple[Compute, str | None]:
    """Returns the function from values to the rule's result, and the spec's `divide_by`.

    Args:
      within: the beginning of the names of the rule's options, for a factor of a product.
    """
    beside = ("of", "combine", "scale", *keys, *(("rules",) if module is rules else ()))
    function, keywords = resolve.look_up(spec, module, positional=True, beside=beside)
    keywords = {name: value for name, value in keywords.items() if name not in beside or value is not None}
    needs = _positional(function)
    options = {name: keywords.pop(name) for name in _options(function) if name in keywords}
    divide_by = keywords.pop("divide_by", None)
    if function is rules.product:
        compute = _product(spec, keywords.pop("rules", None), reads, within)
    else:
        of = {name: keywords.pop(name) for name in ("of", "combine", "scale") if "score" in needs and name in keywords}
        if "score" in needs and "of" not in of:
            raise ValueError(f"the spec {_show(spec)} lacks of, the score at which the rule looks.")
        parts = [_combined(reads=reads, **of) if name == "score" else _parameter(name, spec, reads) for name in needs]
        annotations = inspect.get_annotations(function)
        scheduled = {
            name: reads.number(within + name, options.pop(name), annotations.get(name) in (int, "int"))
            for name in [name for name, value in options.items() if _is_schedule(value)]
            if annotations.get(name) not in (str, "str")
        }

        def compute(values: Values) -> Array:
            of_step = {name: number(values) for name, number in scheduled.items()}
            return function(*(part(values) for part in parts), **options, **of_step)

    if keywords:
        has = f"the rule reads {', '.join(needs)}" if needs else "the rule reads its rules"
        raise ValueError(f"the spec {_show(spec)} has no use for {next(iter(keywords))!r}: {has}.")
    return compute, divide_by


def _refuse_weights(spec: Spec, reads: _Reads) -> None:
    if "weights" in reads.inputs:
        raise ValueError(f"the spec {_show(spec)} reads weights, which only a temperature can read; choose a score.")


def _product(spec: Spec, specs: Mapping[str, Spec] | None, reads: _Reads, within: str) -> Compute:
    if not hasattr(specs, "keys") or not specs:
        raise ValueError(f"the spec {_show(spec)} lacks rules, a mapping from names to the specs of the factors.")
    factors = []
    for name, factor in specs.items():
        try:
            factors.append(_rule(factor, rules, reads, (), f"{within}rules.{name}.")[0])
        except ValueError as error:
            raise ValueError(f"rules.{name}: {error}") from error
    return lambda values: rules.product(*(_as_float(factor(values)) for factor in factors))


def _parameter(name: str, spec: Spec, reads: _Reads) -> Compute:
    """Returns the function from values to a rule's positional parameter."""
    if name in INPUTS:
        return reads.input(name)
    if name not in token_scores.__all__:
        known = (*token_scores.__all__, *INPUTS, "score")
        raise ValueError(
            f"the rule {_show(spec)} has a parameter {name!r}, which is no score and no input"
            f"{resolve.nearest(name, known)}; there are {', '.join(known)}. Options are keyword-only parameters."
        )
    if missing := [option for option, needed in _options(getattr(token_scores, name)).items() if needed]:
        raise ValueError(
            f"the rule {_show(spec)} has a parameter {name!r}, but this score needs {', '.join(missing)}. Call the "
            f"parameter 'score', and write of={{'name': {name!r}, {missing[0]!r}: ...}} in the spec."
        )
    return reads.score(name)


def _combined(of: Any, reads: _Reads, combine: str | None = None, scale: str = "none") -> Compute:
    """Returns the function from values to the score that `of`, `combine` and `scale` describe."""
    statistics.check_name("scale", scale, SCALES)
    several = isinstance(of, Sequence) and not isinstance(of, str)
    if several and combine is None:
        raise ValueError(f"of={of!r} needs combine, one of {', '.join(COMBINATIONS)}.")
    if not several and combine is not None:
        raise ValueError(f"combine={combine!r} needs a list of scores, but of={of!r} is one score.")
    parts = [_scaled(_score(each, reads), scale, reads) for each in (of if several else (of,))]
    if not several:
        return parts[0]
    statistics.check_name("combine", combine, COMBINATIONS)
    pair = jnp.multiply if combine == "product" else lambda h, d: h + d - h * d
    return lambda values: functools.reduce(pair, (part(values) for part in parts))


def _score(spec: Any, reads: _Reads) -> Compute:
    """Returns the function from values to one of the scores under `of`."""
    if hasattr(spec, "keys") and "name" not in spec and "of" in spec:
        keywords = dict(spec)
        if unknown := [name for name in keywords if name not in ("of", "combine", "scale")]:
            raise ValueError(f"unknown keyword {unknown[0]!r} in {_show(spec)}; a score has of, combine and scale.")
        return _combined(reads=reads, **keywords)
    name = _name(spec)
    readable = [each for each in INPUTS if each not in (*WHOLE_BATCH, "has_view")]
    known = (*token_scores.__all__, *readable)
    if name in readable:
        compute = reads.input(name)
    elif isinstance(name, str) and name not in known and not {":", "("} & set(name):
        raise ValueError(f"unknown score {name!r}{resolve.nearest(name, known)}; there are {', '.join(known)}.")
    else:
        compute = reads.score(spec)
    return lambda values: _as_float(compute(values))


def _scaled(score: Compute, scale: str, reads: _Reads) -> Compute:
    """Returns the score, scaled as `scale` says; the score is 0 at tokens that do not count, unless scale is 'none'."""
    if scale == "none":
        return score
    get_counted = reads.input("counted")

    def compute(values: Values) -> Array:
        x, counted = score(values), get_counted(values)
        batch = jnp.zeros(x.shape, jnp.int32)  # the quantiles are of the batch, so that the rows do not matter
        low, high = jnp.zeros((), x.dtype), jnp.max(x, initial=-jnp.inf, where=counted)
        if scale == "min_max":
            low = jnp.min(x, initial=jnp.inf, where=counted)
        elif scale == "quantiles":
            low, high = (statistics.quantiles(x, counted, batch, level) for level in (0.05, 0.95))
        span = high - low
        scaled = (x - low) / jnp.where(span > 0, span, 1)
        scaled = jnp.clip(scaled, 0, 1) if scale == "quantiles" else scaled
        return jnp.where(counted & (span != 0), scaled, 0)

    return compute


def _positional(function: Callable[..., Any]) -> tuple[str, ...]:
    """Returns the names of the positional parameters without a default."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.kind in kinds and p.default is p.empty)


def _options(function: Callable[..., Any]) -> dict[str, bool]:
    """Returns the names of the other parameters, and whether each must be given."""
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    positional = _positional(function)
    return {p.name: p.default is p.empty for p in parameters if p.kind in kinds and p.name not in positional}


def _is_schedule(value: Any) -> bool:
    return hasattr(value, "keys") and "name" in value


def _rounded(value: Array) -> Array:
    """Returns the nearest whole number; a Python number that is not finite stays as it is."""
    if isinstance(value, float):
        return round(value) if math.isfinite(value) else value
    return jnp.round(value).astype(jnp.int32)


def _as_float(values: Array) -> Array:
    values = jnp.asarray(values)
    return values if jnp.issubdtype(values.dtype, jnp.floating) else values.astype(float)


def _name(spec: Spec) -> str | None:
    return spec if isinstance(spec, str) else dict(spec).get("name") if hasattr(spec, "keys") else None


def _show(spec: Spec) -> str:
    return repr(spec if isinstance(spec, str) else dict(spec))
