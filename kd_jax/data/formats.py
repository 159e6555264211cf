"""The formats of rows that people have: conversations, prompts with responses, instructions, and plain text.

A format is recognised by the fields of the first row, or named in the option `format`. Each format becomes rows with
prompt, context and response. The row of a conversation also has `messages`: all turns as JSON text.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from kd_jax.storage import untrusted
from kd_jax.storage.files import Json

FORMATS = ("auto", "messages", "conversations", "prompt_response", "instruction", "text")
OF_TURNS = ("messages", "conversations")
MESSAGES = "messages"  # the column of a built dataset that has the turns of a conversation as JSON text
ASSISTANT = "assistant"
OF_COLUMNS = "data.options.columns"  # the option that asks for further fields
# The roles of ShareGPT's rows, and the names that chat templates have for these roles.
ROLES = {
    "human": "user", "user": "user", "gpt": ASSISTANT, "assistant": ASSISTANT, "chatgpt": ASSISTANT, "model": ASSISTANT,
    "bot": ASSISTANT, "function_call": ASSISTANT, "system": "system", "tool": "tool", "observation": "tool",
    "function_response": "tool",
}  # fmt: skip
IN_WORDS = {
    "messages": "conversations in the field {messages}",
    "conversations": "conversations in the field {messages}",
    "prompt_response": "the fields {prompt} and {response}",
    "instruction": "the fields {prompt}, {context} and {response}",
    "text": "plain text in the field {response}",
}


class MissingFieldError(ValueError):
    """The error of a row that lacks the field of a further column.

    Attributes:
      column: the name of the column.
    """

    def __init__(self, message: str, column: str):
        super().__init__(message)
        self.column = column


@dataclasses.dataclass(frozen=True)
class Format:
    """The rule by which the rows of a file become rows of a dataset.

    Attributes:
      name: one of `FORMATS`, not auto.
      fields: the name of a column -> the name of the field in the file.
      keys: the name of a column -> the option that names the field, or a phrase for a field of this format.
      optional: the columns whose field may be missing or null, which then are empty.
      columns: the names of further fields, whose value may also be a number or a boolean.
      nulls: True if a null in a further column is an empty text, as in Parquet files.
    """

    name: str
    fields: Mapping[str, str]
    keys: Mapping[str, str]
    optional: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    nulls: bool = False

    @property
    def has_turns(self) -> bool:
        """True if the rows are conversations."""
        return self.name in OF_TURNS

    def described(self) -> str:
        """Returns a phrase with the fields that are read.

        Example:
          >>> Format("prompt_response", {"prompt": "q", "response": "a"}, {}).described()
          'the fields q and a'
        """
        return IN_WORDS[self.name].format(**self.fields)


def recognise(
    fields: Mapping[str, Any], format: str, prompt_field: str, response_field: str, context_field: str, messages_field: str
) -> Format:  # fmt: skip
    """Returns the format of a file.

    Args:
      fields: the first row of the file; an empty row if there is none.
      format: one of `FORMATS`. With auto, options that name a field decide, and then the fields of the first row.
      prompt_field, response_field, context_field, messages_field: the names of fields; "" for the name of the format.

    Raises:
      ValueError: the format is unknown, an option names a field that the format does not have, or no format is
        recognised.
    """
    if format not in FORMATS:
        raise ValueError(f"data.options.format={format!r} must be one of {', '.join(FORMATS)}.")
    named = {"prompt": prompt_field, "response": response_field, "context": context_field, "messages": messages_field}
    if format == "auto":
        format = _recognised(fields, named)
    known = {
        "messages": {"messages": "messages"}, "conversations": {"messages": "conversations"},
        "prompt_response": {"prompt": "prompt", "response": "response"}, "text": {"response": "text"},
        "instruction": {"prompt": "instruction", "context": "input", "response": "output"},
    }[format]  # fmt: skip
    if format == "prompt_response" and context_field:
        known["context"] = context_field
    for column, field in named.items():
        if field and column not in known:
            raise ValueError(
                f"data.options.{column}_field={field!r} is not read in rows of data.options.format={format!r}; leave it empty, "
                f"or choose another format."
            )
    found = {column: named[column] or field for column, field in known.items()}
    by_format = format in ("instruction", "text")
    keys = {
        column: f"data.options.format={format!r}"
        if by_format and not named[column]
        else f"data.options.{column}_field={field!r}"
        for column, field in found.items()
    }
    return Format(format, found, keys, optional=("context",) if format == "instruction" else ())


def _recognised(fields: Mapping[str, Any], named: Mapping[str, str]) -> str:
    if named["messages"]:
        turns = fields.get(named["messages"])
        first = turns[0] if isinstance(turns, list) and turns else None
        return "conversations" if isinstance(first, dict) and "from" in first else "messages"
    if any(named.values()):
        return "prompt_response"
    wanted = {
        "messages": ("messages",), "conversations": ("conversations",), "prompt_response": ("prompt", "response"),
        "instruction": ("instruction", "output"), "text": ("text",),
    }  # fmt: skip
    for format, names in wanted.items():
        if all(name in fields for name in names):
            return format
    if not fields or "prompt" in fields or "response" in fields:
        return "prompt_response"
    raise ValueError(
        f"the first row has the fields {untrusted.clip(', '.join(fields))}, which are of no known format. The formats are messages, "
        f"conversations, prompt and response, instruction with input and output, and text. Name the fields with "
        f"data.options.prompt_field and data.options.response_field, or with data.options.messages_field."
    )


def is_text(value: str) -> bool:
    """Returns True if a string can be encoded in UTF-8."""
    try:
        return value.isascii() or bool(value.encode())
    except UnicodeEncodeError:
        return False


def row_of_turns(row: Json, where: str, format: Format) -> dict[str, str]:
    """Returns the row of a conversation: the last assistant's turn as the response, and the turn before as the prompt.

    The column `messages` has all turns as JSON text. Each turn has a role and a content, and may have further entries,
    which a chat template may read. `name` is the last part of `where`, for messages.

    Args:
      row: the row of the file.
      where: the place of the row, for messages.
      format: the format, messages or conversations.

    Raises:
      ValueError: a turn is invalid, no turn is the assistant's, or nothing stands before the assistant's last turn.
    """
    messages = _turns(row, where, format)
    of_assistant = [index for index, message in enumerate(messages) if message["role"] == ASSISTANT]
    if not of_assistant:
        roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
        raise ValueError(f"{where}: the conversation has no turn of the assistant; its turns are of the roles {roles}.")
    last = of_assistant[-1]
    if all(message["role"] in (ASSISTANT, "system") for message in messages[:last]):
        raise ValueError(f"{where}: no turn of a user or of a tool stands before the assistant's last turn.")
    return {
        "name": where.rpartition("/")[2], "prompt": messages[last - 1]["content"], "response": messages[last]["content"],
        MESSAGES: json.dumps(messages, ensure_ascii=False, default=str),
    }  # fmt: skip


def first_words(messages: list[Json]) -> str:
    """Returns the content of the first turn of a user, or of a tool, which decides the split of a conversation."""
    others = [message for message in messages if message["role"] not in (ASSISTANT, "system")]
    return next((message["content"] for message in others if message["role"] == "user"), others[0]["content"])


def _turns(row: Json, where: str, format: Format) -> list[Json]:
    """Returns the turns of a row in the form that chat templates read."""
    field, key = format.fields["messages"], format.keys["messages"]
    turns = row.get(field)
    if not isinstance(turns, list) or not turns:
        problem = f"is {untrusted.printable(turns)}, not a list of turns" if field in row else "is missing"
        names = untrusted.clip(", ".join(row))
        raise ValueError(
            f"{where}: the field {field!r} of {key} {problem}; the row has {names}. All rows of a dataset must have one format."
        )
    messages = [_turn(turn, f"{where}: turn {number}") for number, turn in enumerate(turns, start=1)]
    system = row.get("system")
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return messages


def _turn(turn: object, where: str) -> Json:
    """Returns a turn with role and content, and with its further entries that are not null."""
    if not isinstance(turn, dict):
        raise ValueError(f"{where} is {untrusted.printable(turn)}; expected an object with role and content.")
    turn = {name: value for name, value in turn.items() if value is not None}
    if "role" not in turn and "from" in turn:
        given = turn.pop("from")
        role = ROLES.get(given.lower(), "") if isinstance(given, str) else ""
        if not role:
            raise ValueError(
                f"{where}: from is {untrusted.printable(given)}, which is no known role; the roles are {', '.join(ROLES)}."
            )
        turn["role"], turn["content"] = role, turn.pop("value", None)
    role, content = turn.get("role"), turn.get("content")
    if not isinstance(role, str) or not role:
        raise ValueError(
            f"{where}: the role is {untrusted.printable(role)}; expected a text such as user or assistant."
        )
    if content is None and turn.get("tool_calls"):
        content = ""
    if isinstance(content, list):
        content = "".join(_part(part, where) for part in content)
    if not isinstance(content, str):
        problem = "has no content" if content is None else f"has the content {untrusted.printable(content)}"
        raise ValueError(
            f"{where} of the role {untrusted.printable(role)} {problem}; expected a text or a list of parts."
        )
    if not is_text(content) or not is_text(role):
        raise ValueError(f"{where} has half of a surrogate pair, which is no character.")
    return {**turn, "role": role, "content": content}


def _part(part: object, where: str) -> str:
    """Returns the text of a part of a content."""
    text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
    if not isinstance(text, str):
        kind = untrusted.printable(part.get("type") if isinstance(part, dict) else part)
        raise ValueError(f"{where} has a part of the type {kind} in its content; only parts of text are read.")
    return text


def row_of(row: Json, where: str, format: Format) -> dict[str, str]:
    """Returns the row of a dataset for the row of a file, with the columns of the format and the further columns.

    Args:
      row: the row of the file.
      where: the place of the row, for messages.
      format: the format of all rows of the file.

    Raises:
      MissingFieldError: the field of a further column is missing.
      ValueError: another field is missing, or a value is wrong; the message names the option that asks for the field.
    """
    further = {column: column for column in format.columns}
    fields = further if format.has_turns else {**format.fields, **further}
    keys = {**format.keys, **dict.fromkeys(format.columns, OF_COLUMNS)}
    empty = (*format.optional, *(format.columns if format.nulls else ()))
    values = values_of(row, where, fields, scalars=format.columns, optional=format.optional, keys=keys, nulls=empty)
    if format.has_turns:
        return row_of_turns(row, where, format) | values
    return {"prompt": "", **values} if format.name == "text" else values


def values_of(
    row: Json, where: str, fields: Mapping[str, str], *, several: Sequence[str] = (), scalars: Sequence[str] = (),
    optional: Sequence[str] = (), keys: Mapping[str, str] | None = None, nulls: Sequence[str] = (),
) -> Json:  # fmt: skip
    """Returns the values of a row's fields by the names of kd_jax.

    Args:
      row: the row of a file.
      where: the place of the row, for messages.
      fields: the name of a field in kd_jax -> the name of the field in the file.
      several: the names in kd_jax of the fields whose value may also be a non-empty list of strings.
      scalars: the names in kd_jax of the fields whose value may also be a finite number or a boolean, which becomes its
        JSON text.
      optional: the names in kd_jax of the fields that may be missing, which then are empty.
      keys: the name of a field in kd_jax -> the option that asks for the field, for messages.
      nulls: the names in kd_jax of the fields that may be null, which then are empty.

    Raises:
      MissingFieldError: a field in `scalars` is missing.
      ValueError: another field is missing, or a value has the wrong type.
    """
    values: Json = {}
    for ours, field in fields.items():
        value = row.get(field, "" if ours in optional else None)
        if value is None and field in row and ours in nulls:
            value = ""
        if ours in scalars and (isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))):
            value = json.dumps(value)
        many = ours in several and isinstance(value, list) and value and all(isinstance(v, str) for v in value)
        if not isinstance(value, str) and not many:
            kinds = "a string, a finite number or a boolean" if ours in scalars else "a string"
            problem = f"is {untrusted.printable(row[field])}, not {kinds}" if field in row else "is missing"
            asked = f" {keys[ours]} asks for this field." if keys and ours in keys else ""
            message = f"{where}: the field {field!r} {problem}; the row has {untrusted.clip(', '.join(row))}.{asked}"
            raise MissingFieldError(message, ours) if ours in scalars and field not in row else ValueError(message)
        if not all(map(is_text, value if many else [value])):
            raise ValueError(f"{where}: the field {field!r} has half of a surrogate pair, which is no character.")
        values[ours] = value
    return values
