"""Prompt templates: functions from a row's prompt and context to the text that a model continues."""

import dataclasses
import datetime
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kd_jax.data import chat_template
from kd_jax.data.tokenizer import Tokenizer
from kd_jax.resolve import nearest
from kd_jax.settings import Data
from kd_jax.storage.files import Json

TEMPLATES = ("plain", "alpaca", "chat")
DATE = "2026-01-01"  # the default date of strftime_now, which is fixed so that a resumed run has the same rows
OURS = ("messages", "add_generation_prompt")  # variables of a chat template that are set for each row
Render = Callable[[str, str], str]  # (prompt, context) -> text


@dataclasses.dataclass(frozen=True)
class Template:
    """A prompt template with its options.

    Attributes:
      name: the name: plain, alpaca or chat.
      options: the variables of a chat template, such as enable_thinking, with JSON values. The option `date` is also
        the date of the templates' function strftime_now, which is `DATE` by default.
      system: the system message of a chat; "" for none.

    Raises:
      ValueError: the name is unknown, an option is not a JSON value or is set for each row, the date is invalid, or
        another template than chat has options or a system message.
    """

    name: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    system: str = ""

    def __post_init__(self) -> None:
        if self.name not in TEMPLATES:
            near = nearest(self.name, TEMPLATES)
            raise ValueError(f"unknown prompt template {self.name!r}{near}; there are {', '.join(TEMPLATES)}.")
        object.__setattr__(self, "options", _json_object(self.options))
        if not isinstance(self.system, str):
            raise ValueError(f"data.system={self.system!r} must be a text; an empty text is no system message.")
        if self.name != "chat" and (self.options or self.system):
            key, value = ("template_options", self.options) if self.options else ("system", self.system)
            raise ValueError(
                f"data.{key}={value!r} (--{key}) is for a tokenizer's chat template, and the template {self.name} does not "
                f"read this key. Set data.template (--template) to chat, or leave data.{key} empty."
            )
        for name in OURS:
            if name in self.options:
                raise ValueError(
                    f"data.template_options.{name}: each row's prompt decides this variable; remove the option."
                )
        _check_date(self.options.get("date", DATE))

    @classmethod
    def of(cls, options: Data | Mapping[str, Any]) -> "Template":
        """Returns the template that the `data` part of a config names. A stored config may lack newer keys."""
        if isinstance(options, Data):
            return cls(options.template, options.template_options, options.system)
        return cls(options["template"], options.get("template_options", {}), options.get("system", ""))

    def set_apart(self) -> Json:
        """Returns the options and the system message as a dict. An empty value is omitted.

        So a fingerprint of this dict is the fingerprint of an empty dict if neither is used.

        Example:
          >>> Template("chat", system="Be brief.").set_apart(), Template("chat").set_apart()
          ({'system': 'Be brief.'}, {})
        """
        return {name: value for name, value in (("template_options", self.options), ("system", self.system)) if value}


def as_template(template: str | Template) -> Template:
    """Returns a `Template` unchanged, and for a name the template without options and system message."""
    return Template(template) if isinstance(template, str) else template


def make_render(template: str | Template, tokenizer: Tokenizer) -> Render:
    """Returns the template as a function of a row's prompt and context.

    Args:
      template: a `Template`, or the name of one: plain, alpaca or chat.
      tokenizer: the tokenizer, which has the chat template. The templates plain and alpaca do not use the tokenizer.

    Returns:
      (prompt, context) -> the text whose continuation is the response.

    Raises:
      ValueError: the name is unknown. For chat: the tokenizer has no template, Jinja cannot read the template, or the
        template does not read an option or does not write the system message.
    """
    template = as_template(template)
    if template.name == "chat":
        return _make_chat(template, tokenizer)
    return alpaca if template.name == "alpaca" else plain


def adds_special_tokens(template: str | Template) -> bool:
    """Returns True if special tokens, such as a bos, are added to a rendered prompt.

    A chat template writes the special tokens as part of the prompt.
    """
    return as_template(template).name != "chat"


def plain(prompt: str, context: str) -> str:
    r"""Returns the prompt, followed by a blank line and the context if there is one. The text ends with a newline.

    No newline is added to a text that already ends with one, or to an empty text.

    Example:
      >>> plain("def f(): return 1", "")
      'def f(): return 1\n'
      >>> plain("### Response:\n", "")
      '### Response:\n'
      >>> plain("Sum up.", "It rains.")
      'Sum up.\n\nIt rains.\n'
      >>> plain("", "")
      ''
    """
    text = "\n\n".join(part for part in (prompt, context) if part)
    return f"{text}\n" if text and not text.endswith("\n") else text


def alpaca(prompt: str, context: str) -> str:
    """Returns a prompt in the template of Stanford Alpaca, which MiniLLM, DistiLLM, ABKD and AMiD use for Dolly.

    References:
      Taori et al., "Stanford Alpaca: an instruction-following LLaMA model", 2023,
      https://github.com/tatsu-lab/stanford_alpaca
      Gu et al., "MiniLLM: knowledge distillation of large language models", 2024, https://arxiv.org/abs/2306.08543
    """
    pairing = ", paired with an input that provides further context" if context else ""
    context_part = f"### Input:\n{context}\n\n" if context else ""
    return (
        f"Below is an instruction that describes a task{pairing}. "
        "Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{prompt}\n\n{context_part}### Response:\n"
    )


def with_template_end(tokenizer: Tokenizer, template: str | Template) -> Tokenizer:
    """Returns the tokenizer with the template's end of a turn as the end token that the student learns.

    A chat template often ends a turn with another token than the tokenizer's end token: `<|im_end|>` in place of
    `<|endoftext|>`. The first token that the template writes after an answer is the end of a turn if this token is an
    added token. The tokenizer's own end token still ends a response. The templates plain and alpaca write no end of a
    turn, and the tokenizer is returned unchanged.

    Args:
      tokenizer: the tokenizer as loaded.
      template: the template, as in `make_render`.
    """
    template = as_template(template)
    if template.name != "chat" or tokenizer.chat_template is None:
        return tokenizer
    answer = "kd_jax"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]
    try:
        text = render_chat(template, tokenizer, messages, add_generation_prompt=False)
    except ValueError:  # the template does not support a turn of the assistant
        return tokenizer
    after = text.rpartition(answer)[2].lstrip(" ")
    ids = tokenizer.encode(after) if after and answer in text else []
    return tokenizer.with_ends(ids[0]) if ids and tokenizer.is_added(ids[0]) else tokenizer


def _make_chat(template: Template, tokenizer: Tokenizer) -> Render:
    """Returns the tokenizer's chat template as a function that writes one user message up to the start of the answer."""
    folder = tokenizer.folder
    if tokenizer.chat_template is None:
        raise ValueError(
            f"the template chat needs a chat_template, and {folder} has none, neither in tokenizer_config.json nor as "
            f"chat_template.jinja. Use a chat model's tokenizer, or the template plain or alpaca."
        )
    try:
        variables = chat_template.names(tokenizer.chat_template)
    except ValueError as error:
        raise ValueError(f"the chat_template of {folder} {error}.") from error
    _check_options(template, variables, folder)

    def write(system: str, prompt: str, context: str) -> str:
        content = "\n\n".join(part for part in (prompt, context) if part)
        messages = [{"role": "system", "content": system}] if system else []
        return render_chat(template, tokenizer, [*messages, {"role": "user", "content": content}])

    def chat(prompt: str, context: str) -> str:
        try:
            return write(template.system, prompt, context)
        except ValueError as error:
            raise ValueError(f"the chat_template of {folder} failed on the prompt {prompt[:60]!r}: {error}.") from error

    if template.system and chat("Hello.", "") == write("", "Hello.", ""):
        raise ValueError(
            f"the chat_template of {folder} does not write a system message, but data.system (--system) is set. Leave "
            f"data.system empty, and put the text into the prompts."
        )
    return chat


def render_chat(
    template: Template, tokenizer: Tokenizer, messages: list[Json], add_generation_prompt: bool = True,
    marks: tuple[str, str] = ("", ""),
) -> str:  # fmt: skip
    """Returns the messages as the tokenizer's chat template writes them.

    As in transformers, tools and documents are None in a template, and only the special tokens that exist are defined.

    Args:
      template: the template chat with its options.
      tokenizer: the tokenizer, which has the chat template.
      messages: the turns, each with role and content.
      add_generation_prompt: True to end the text with the start of an answer.
      marks: the argument of `chat_template.render`.

    Raises:
      ValueError: the template fails, as in `chat_template.render`.
    """
    variables: Json = tokenizer.special_tokens | {"tools": None, "documents": None} | dict(template.options)
    variables |= {"messages": messages, "add_generation_prompt": add_generation_prompt}
    return chat_template.render(tokenizer.chat_template or "", variables, template.options.get("date", DATE), marks)


def _check_options(template: Template, variables: list[str], folder: Path) -> None:
    """Refuses an option that the chat template never reads, because a misspelt option would have no effect."""
    for name in template.options:
        if name not in variables:
            others = [other for other in variables if other not in OURS]
            known = f"the variables that it reads are {', '.join(others)}" if others else "it reads no such variable"
            raise ValueError(
                f"data.template_options.{name}: the chat_template of {folder} never reads {name!r}{nearest(name, others)}; "
                f"{known}."
            )


def _check_date(date: object) -> None:
    try:
        datetime.datetime.fromisoformat(date if isinstance(date, str) else "")
    except ValueError:
        raise ValueError(f"data.template_options.date={date!r} must be a date such as {DATE!r}.") from None


def _json_object(options: object) -> Json:
    """Returns the options as JSON values: a ConfigDict becomes an object, and a tuple becomes an array."""

    def plain_value(value: Any) -> Json:
        if hasattr(value, "to_dict"):
            return value.to_dict()
        raise TypeError(f"{value!r} is not a JSON value")

    try:
        json_options = json.loads(json.dumps(options, default=plain_value, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"data.template_options={options!r}: {error}. A value may be a text, a finite number, true, false, null, a list or an "
            f"object."
        ) from error
    if not isinstance(json_options, dict):
        raise ValueError(
            f"data.template_options={options!r} must be an object of JSON, such as {{'enable_thinking': False}}."
        )
    return json_options
