"""Fills the templates of views with the columns of a row."""

import json
import string
from collections.abc import Mapping
from typing import Any

Row = Mapping[str, Any]
Prompt = str | list[dict[str, Any]]  # a text, or the messages of a conversation


def names_in(text: str, key: str = "text") -> tuple[str, ...]:
    """Returns the names in braces of a template, each once.

    Raises:
      ValueError: a brace is not closed, or a field is not a plain name.

    Example:
      >>> names_in("{prompt} {{not a column}} {hint}")
      ('prompt', 'hint')
    """
    if not isinstance(text, str):
        raise ValueError(f"{key}={text!r} must be a text.")
    try:
        fields = [
            (name, form, conversion) for _, name, form, conversion in string.Formatter().parse(text) if name is not None
        ]
    except ValueError as error:
        raise ValueError(f"{key}={text!r} is no template ({error}); write {{{{ and }}}} for braces.") from error
    for name, form, conversion in fields:
        if not name.isidentifier() or form or conversion:
            raise ValueError(
                f"{key}={text!r}: {{{name}}} is not the plain name of a column; write {{{{ and }}}} for braces."
            )
    return tuple(dict.fromkeys(name for name, *_ in fields))


def fill(text: str, prompt: Prompt, values: Row) -> Prompt:
    """Returns a template with values in place of its names.

    Args:
      text: the template.
      prompt: the value of ``{prompt}``: a text, or messages. With messages, the filled template replaces the content of
        the last message, which must be the user's.
      values: the values of the other names: a text, a number, or messages, which become the lines of their contents.

    Raises:
      ValueError: a value is None, or the last message is not the user's.
    """
    parts = {}
    for name in names_in(text):
        if name != "prompt" and values[name] is None:
            raise ValueError(f"the row has no {name}, which the template {text!r} shows.")
        parts[name] = "" if name == "prompt" else text_of(values[name])
    if isinstance(prompt, str):
        return text.format(**parts | {"prompt": prompt})
    *before, last = prompt
    if last["role"] != "user":
        raise ValueError(f"the last message of a prompt must be the user's, and is the {last['role']}'s.")
    return [*before, {**last, "content": text.format(**parts | {"prompt": text_of(last["content"], " ")})}]


def text_of(value: Any, separator: str = "\n") -> str:
    """Returns a column's value as a text: a text itself, the JSON text of a number, or the joined contents of messages."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        return json.dumps(value)
    # A message has a content; a part of a message has a text, or is an image.
    texts = [text_of(part["content"], " ") if "content" in part else part.get("text", "") for part in value]
    return separator.join(text for text in texts if text)
