"""Chat templates, rendered by Jinja's sandbox as transformers renders them.

The sandbox keeps a template away from Python's objects and from files. Three limits stop a template that would work for
ever or fill the memory:

- a time limit, which is checked at each line of the template and at each call of a function in Python;
- a limit on the size of the text;
- a limit on the sizes of the values that operators, filters, namespaces and calls may have.

The limits do not stop every harmful template. A single call of a function in C cannot be interrupted, and there are
other ways to make a large value.
"""

import contextlib
import datetime
import functools
import json
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, ParamSpec, TypeVar

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.utils
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 10.0  # for one text: 100,000 times the usual time
CHARACTERS = 2**20  # the limit of a rendered text, plus 16 times the size of the variables
LARGEST = 2**24  # the largest length, width or count inside a template
# Filters that take a width, a count or a precision, and whose result or time grows with the number.
WITH_NUMBERS = ("batch", "center", "indent", "round", "slice", "truncate", "wordwrap")

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def render(template: str, variables: Mapping[str, object], date: str, marks: tuple[str, str] = ("", "")) -> str:
    """Returns the rendered template, as transformers renders it.

    Args:
      template: the Jinja template.
      variables: the values that the template may read, each a JSON value.
      date: the date, in ISO 8601 format, that `strftime_now` returns in place of the present date.
      marks: texts that are written at the start and at the end of each part inside the tag `generation`.

    Raises:
      ValueError: the template is not valid Jinja, raised an error, was refused by the sandbox, or needed too much time,
        memory or text. The message is the end of a sentence whose subject is the template.
    """
    today = datetime.datetime.fromisoformat(date)
    limit = CHARACTERS + 16 * len(json.dumps(variables))
    pieces, length = [], 0
    with _errors(), _time_limit():
        compiled = _compiled(template, marks)
        for piece in compiled.generate({"strftime_now": lambda format: today.strftime(format)} | dict(variables)):
            pieces.append(piece)
            length += len(piece)
            if length > limit:
                raise _LimitError(f"writes more than {limit} characters")
    return "".join(pieces)


def names(template: str) -> list[str]:
    """Compiles the template, and returns the names of the variables that the template reads.

    The name `date` stands for a call of `strftime_now`, whose date is an argument of `render`.

    Raises:
      ValueError: the template fails, as in `render`.
    """
    with _errors(), _time_limit():
        environment = _compiled(template).environment
        variables = jinja2.meta.find_undeclared_variables(environment.parse(template))
    known = {*environment.globals, "strftime_now"}
    return sorted((variables - known) | ({"date"} if "strftime_now" in variables else set()))


class _LimitError(jinja2.TemplateError):
    """The error of a template that has reached a limit of this module."""


class _Generation(jinja2.ext.Extension):
    """The tag `generation`, which marks the assistant's text.

    The tag changes the rendered text only if the environment has `marks`.
    """

    tags = {"generation"}  # noqa: RUF012  # as in Jinja

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # transformers uses a call block, too: variables that are set inside the tag exist only inside the tag.
        return jinja2.nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

    def _text(self, caller: Callable[[], str]) -> str:
        start, end = getattr(self.environment, "marks", ("", ""))
        return f"{start}{caller()}{end}"


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace, which refuses attributes that begin with an underscore, as transformers does."""

    def __init__(*arguments: Any, **attributes: object) -> None:
        self, *rest = arguments  # an attribute of the namespace may have the name self
        jinja2.utils.Namespace.__init__(self)
        for name, value in dict(*rest, **attributes).items():
            self[name] = value

    def __setitem__(self, name: str, value: object) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot have the attribute {name!r}")
        _check_size(value)
        super().__setitem__(name, value)


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with limits on the sizes of values.

    Jinja does not evaluate intercepted operators while it compiles a template. So the limits apply to constants, too.
    """

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_number(left.bit_length() * right)
        for sequence, number in ((left, right), (right, left)) if operator == "*" else ():
            if isinstance(sequence, str | list | tuple) and isinstance(number, int):
                _check_number(len(sequence) * number)
        return super().call_binop(context, operator, left, right)

    def call(*arguments: Any, **keywords: Any) -> Any:
        for value in (*arguments[3:], *keywords.values()):
            _check_size(value)
            if isinstance(getattr(arguments[2], "__self__", None), str):  # a method such as ljust
                _check_number(value)
        return ImmutableSandboxedEnvironment.call(*arguments, **keywords)


def _check_size(value: object) -> None:
    if isinstance(value, str | list | tuple | dict):
        _check_number(len(value))


def _check_number(value: object) -> None:
    if isinstance(value, int) and value > LARGEST:
        raise _LimitError(f"makes a value of the size {value:.3g}; at most {LARGEST} is accepted")


def _checked(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Returns a filter that refuses large numbers in all arguments after the first."""

    @functools.wraps(function)  # Jinja reads attributes of the function
    def checked(*arguments: Arguments.args, **keywords: Arguments.kwargs) -> Result:
        for value in (*arguments[1:], *keywords.values()):
            _check_number(value)
        return function(*arguments, **keywords)

    return checked


def _environment(marks: tuple[str, str]) -> jinja2.Environment:
    """Returns a Jinja environment with the settings of transformers, so that a template gives the same text.

    There is one difference: `strftime_now` is a variable of `render`. The present date in a prompt would change the
    rows of a run that is resumed on another day.
    """
    # Any, because the types of Jinja allow only its own filters.
    environment: Any = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters |= {name: _checked(environment.filters[name]) for name in WITH_NUMBERS}
    environment.filters["tojson"] = _to_json
    environment.marks = marks
    environment.globals |= {"raise_exception": _raise_exception, "namespace": _Namespace}
    return environment


@functools.lru_cache(maxsize=4)
def _compiled(template: str, marks: tuple[str, str] = ("", "")) -> jinja2.Template:
    return _environment(marks).from_string(template)


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """Turns any error of a template into a ValueError. The message is the end of a sentence about the template."""
    try:
        yield
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"is not valid Jinja: line {error.lineno}: {error.message}"[:500]) from error
    except jinja2.TemplateError as error:  # for example an error of raise_exception or of the sandbox
        raise ValueError(str(error)[:500]) from error
    except MemoryError as error:
        raise ValueError("needed more memory than the machine has") from error
    except Exception as error:
        raise ValueError(f"{type(error).__name__}: {str(error)[:500]}") from error


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    """Raises an error if the block takes longer than SECONDS.

    Python calls a trace function at each line of the template and at each call of a function. Unlike a signal, a trace
    function works in any thread.
    """
    until = time.monotonic() + SECONDS

    def check(frame: types.FrameType, event: str, argument: object) -> Callable[..., Any] | None:
        if time.monotonic() > until:
            raise _LimitError(f"took longer than {SECONDS:g} s")
        return check if frame.f_code.co_filename == "<template>" else None

    before = sys.gettrace()
    sys.settrace(check)
    try:
        yield
    finally:
        sys.settrace(before)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Returns a value as JSON. Jinja's own filter escapes HTML and has other keywords."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
