"""The program of the process that `sandbox` starts, for Jinja templates and for tokenizers of the tokenizers library.

The program is started as a script and reads one request per line. It imports nothing from kd_jax.
"""

import contextlib
import json
import resource
import sys
from typing import Any, NoReturn

MIB = 2**20
CHARACTERS = MIB  # the limit of a rendered text, plus 16 times the size of the variables


class Failed(Exception):
    """A failure whose message is the end of a sentence about the template."""


def _serve(kind: str, memory: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # the process may write no file
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    kept: dict[str, Any] = {}
    work = {"template": _templated, "tokenizer": _tokenized}[kind]
    _reply({})
    for line in sys.stdin.buffer:
        try:
            _reply({"value": work(kept, **json.loads(line))})
        except MemoryError:
            _reply({"error": f"needed more than {memory // MIB} MiB of memory"})
        except Failed as error:
            _reply({"error": str(error)[:500]})
        except BaseException as error:  # any error of a template, or a panic of Rust
            _reply({"error": f"{type(error).__name__}: {str(error)[:500]}"})


def _reply(answer: dict[str, Any]) -> None:
    sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
    sys.stdout.buffer.flush()


def _tokenized(kept: dict[str, Any], method: str, arguments: list[Any], content: str | None = None) -> Any:
    import tokenizers

    if content is not None:
        kept.clear()
        kept["tokenizer"] = tokenizers.Tokenizer.from_str(content)
        kept["tokenizer"].no_padding()
        kept["tokenizer"].no_truncation()
    found = getattr(kept["tokenizer"], method)(*arguments)
    if method == "encode_batch":
        return [(encoding.ids, encoding.offsets) for encoding in found]
    return [encoding.ids for encoding in found] if method == "encode_batch_fast" else found


def _templated(
    compiled: dict[str, Any], template: str, variables: dict[str, Any] | None = None, date: str = ""
) -> list[str] | str:
    """Returns the answer to `names`, or with variables the answer to `render`."""
    import jinja2

    if template not in compiled:
        compiled.clear()
        try:
            compiled[template] = _environment().from_string(template)
        except jinja2.TemplateSyntaxError as error:
            raise Failed(f"is not valid Jinja: line {error.lineno}: {error.message}") from error
    return _names(template) if variables is None else _rendered(compiled[template], variables, date)


def _names(template: str) -> list[str]:
    import jinja2.meta

    environment = _environment()
    found = jinja2.meta.find_undeclared_variables(environment.parse(template))
    return sorted((found - {*environment.globals, "strftime_now"}) | ({"date"} if "strftime_now" in found else set()))


def _rendered(template: Any, variables: dict[str, Any], date: str) -> str:
    import datetime

    import jinja2

    today = datetime.datetime.fromisoformat(date)
    limit = CHARACTERS + 16 * len(json.dumps(variables))
    pieces, length = [], 0
    try:
        for piece in template.generate({"strftime_now": lambda format: today.strftime(format)} | variables):
            pieces.append(piece)
            length += len(piece)
            if length > limit:
                raise Failed(f"writes more than {limit} characters")
    except jinja2.TemplateError as error:  # for example from raise_exception, or refused by the sandbox
        raise Failed(str(error)) from error
    return "".join(pieces)


def _environment() -> Any:
    """Returns a Jinja environment with the settings of transformers, so that a template gives the same text as there.

    There is one difference: `strftime_now` is a variable of `_rendered`. The present date in a prompt would change the
    rows of a run that is resumed on another day.
    """
    from jinja2 import exceptions, ext, nodes, utils
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        """The tag `generation`, which marks the text of the assistant. The text is rendered as without the tag."""

        tags = {"generation"}  # noqa: RUF012  # as in Jinja

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            # transformers uses a call block, too: variables that are set inside the tag end with the tag.
            return nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

        def _text(self, caller: Any) -> str:
            return caller()

    class Namespace(utils.Namespace):
        """Jinja's namespace without attributes that begin with an underscore, which transformers refuses, too."""

        def __init__(*arguments: Any, **attributes: Any) -> None:
            self, *rest = arguments  # allows an attribute with the name self
            utils.Namespace.__init__(self)
            for name, value in dict(*rest, **attributes).items():
                self[name] = value

        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise exceptions.SecurityError(f"a namespace cannot have the attribute {name!r}")
            super().__setitem__(name, value)

    environment: Any = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise_exception, "namespace": Namespace}
    return environment


def _raise_exception(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # The filter of Jinja escapes HTML and has other keywords.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]))
