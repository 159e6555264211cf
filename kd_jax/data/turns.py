"""Conversations as a chat template writes them, and the characters of the assistant's turns that the loss counts.

The text is the one of `apply_chat_template` in transformers. The loss counts the parts that the template marks with
`{% generation %}`. In a template without these marks, a turn of the assistant begins where the rendered turns before it
end, with the start of an answer, and ends after the token that ends a turn.
"""

import contextlib
import json
import re
from collections.abc import Generator, Mapping, Sequence
from typing import NamedTuple

from kd_jax.data import literal, prompts
from kd_jax.data.formats import ASSISTANT, MESSAGES
from kd_jax.data.tokenizer import Tokenizer
from kd_jax.storage import untrusted
from kd_jax.storage.files import Json

GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
MARKS = re.compile(f"{literal.START}(.*?){literal.END}", re.DOTALL)
WORDS = 4  # a template that writes at least this many words before a conversation adds something

Spans = tuple[tuple[int, int], ...]  # the first character of each part, and the one after its last


class Rendered(NamedTuple):
    """A conversation as text.

    Attributes:
      text: the text, with the marks of `literal.LiteralTokens.hide`.
      spans: the parts of the text that the loss counts.
      last: the number of the part with which the assistant's last turn begins.
    """

    text: str
    spans: Spans
    last: int


class Turns:
    """Renders the conversations of rows with a tokenizer's chat template.

    Args:
      template: the template chat with its options.
      tokenizer: the tokenizer, which has the chat template, and whose `eos_id` ends a turn.
    """

    def __init__(self, template: prompts.Template, tokenizer: Tokenizer):
        self._template, self._tokenizer = template, tokenizer
        self._marked = GENERATION.search(tokenizer.chat_template or "") is not None
        self._literal = literal.LiteralTokens(tokenizer)
        self._end = tokenizer.backend.id_to_token(tokenizer.eos_id) or ""

    def prompt(self, row: Mapping[str, str]) -> str:
        """Returns the turns before the assistant's last turn, up to the start of the answer.

        Raises:
          ValueError: the template refuses the conversation; the message names the row.
        """
        messages = self._messages(row)
        last = _last(messages)
        with self._named(row):
            return self._checked(messages[:last], add_generation_prompt=True)

    def whole(self, row: Mapping[str, str], all_turns: bool) -> Rendered:
        """Returns the conversation up to the assistant's last turn.

        Args:
          row: a row with the column `messages`. Its prompt, context and response replace those in the column.
          all_turns: True to count all turns of the assistant that have a turn of another role before, except the
            system's. False to count the last turn.

        Raises:
          ValueError: the template refuses the conversation, omits a turn, or writes a turn of the assistant in such a way
            that it is not found in the text; the message names the row.
        """
        messages = self._messages(row)
        messages = messages[: _last(messages) + 1]
        counted = answered(messages) if all_turns else [len(messages) - 1]
        with self._named(row):
            return self._by_marks(messages, counted) if self._marked else self._by_prefixes(messages, counted)

    def added(self) -> str:
        """Returns the text that the template writes before the first turn of a user; "" if there are only a few words."""
        mark = "kd_jax"
        system = [{"role": "system", "content": self._template.system}] if self._template.system else []
        try:
            text = self._render([*system, {"role": "user", "content": mark}], add_generation_prompt=True)
        except ValueError:
            return ""
        before = text.partition(mark)[0]
        before = before.replace(self._template.system, "") if self._template.system else before
        words = re.findall(r"[^\W\d_]{2,}", self._literal.without_tokens(before))
        return before.strip() if len(words) >= WORDS else ""

    def _messages(self, row: Mapping[str, str]) -> list[Json]:
        """Returns the turns of a row with the system message of the template, and with special tokens as text."""
        messages = json.loads(row[MESSAGES])
        last = _last(messages)
        messages[last]["content"] = row["response"]
        messages[last - 1]["content"] = "\n\n".join(part for part in (row["prompt"], row.get("context", "")) if part)
        if self._template.system and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self._template.system})
        change = {True: literal.clean, False: self._literal.hide}
        return [m | {"content": change[m["role"] == ASSISTANT](m["content"])} for m in messages]

    def _render(self, messages: list[Json], *, add_generation_prompt: bool = False, marked: bool = False) -> str:
        marks = (literal.START, literal.END) if marked else ("", "")
        return prompts.render_chat(self._template, self._tokenizer, messages, add_generation_prompt, marks)

    def _checked(self, messages: list[Json], *, add_generation_prompt: bool = False, marked: bool = False) -> str:
        """Renders messages, and checks that each turn that is not the assistant's is in the text."""
        text = self._render(messages, add_generation_prompt=add_generation_prompt, marked=marked)
        for message in messages:
            content = message["content"].strip()
            if (
                message["role"] != ASSISTANT
                and content not in text
                and json.dumps(content, ensure_ascii=False)[1:-1] not in text
            ):
                raise ValueError(
                    f"it does not write a turn of the role {untrusted.printable(message['role'])}, so that the text would lack "
                    f"{untrusted.printable(content.replace(literal.BREAK, ''))}"
                )
        return text

    @contextlib.contextmanager
    def _named(self, row: Mapping[str, str]) -> Generator[None]:
        """Puts the row and the tokenizer's folder before the message of an error."""
        try:
            yield
        except ValueError as error:
            where = f"{row['name']}: " if row.get("name") else ""
            raise ValueError(
                f"{where}the chat_template of {self._tokenizer.folder} failed on the conversation that begins "
                f"{row['prompt'][:60]!r}: {error}."
            ) from error

    def _by_marks(self, messages: list[Json], counted: Sequence[int]) -> Rendered:
        """Returns the text with the parts that the template marks as generated."""
        text = self._checked(messages, marked=True)
        pieces, spans, position, length = [], [], 0, 0
        for found in MARKS.finditer(text):
            pieces += [text[position : found.start()], found[1]]
            begin = length + len(pieces[-2])
            length = begin + len(found[1])
            spans += [(begin, length)] * bool(found[1])
            position = found.end()
        text = "".join([*pieces, text[position:]])
        before = self._render(messages[:-1])
        begin = len(before) if text.startswith(before) else max((start for start, _ in spans), default=0)
        last = [index for index, span in enumerate(spans) if span[0] >= begin]
        if not last:
            raise ValueError("its generation marks are around no text of the assistant's last turn")
        kept = spans if len(counted) > 1 else spans[last[0] :]
        return Rendered(text[: spans[-1][1]], tuple(kept), last[0] - (len(spans) - len(kept)))

    def _by_prefixes(self, messages: list[Json], counted: Sequence[int]) -> Rendered:
        """Returns the text with the parts that follow the rendered turns before each turn of the assistant."""
        text, spans = self._checked(messages), []
        for index in counted:
            begin = self._begin(text, messages, index, spans[-1][1] if spans else 0)
            spans.append((begin, self._end_of_turn(text, messages[index]["content"].strip(), begin)))
        return Rendered(text[: spans[-1][1]], tuple(spans), len(spans) - 1)

    def _begin(self, text: str, messages: list[Json], index: int, position: int) -> int:
        """Returns the position of the first character that the assistant writes in a turn."""
        prompt = self._render(messages[:index], add_generation_prompt=True)
        if text.startswith(prompt):
            return len(prompt)
        # The start of an answer is another text in a finished turn, such as "<think>" that the template then removes.
        before = self._render(messages[:index])
        content = messages[index]["content"].strip()
        begin = text.find(content, len(before) if text.startswith(before) else position) if content else -1
        if begin < 0:
            raise ValueError(
                f"turn {index + 1}, which is the assistant's, is not found in the text of the whole conversation. Set "
                f"data.loss_on='last', or use a template with generation marks"
            )
        return begin

    def _end_of_turn(self, text: str, content: str, begin: int) -> int:
        """Returns the position after the token that ends a turn; after the turn's content if there is no such token."""
        found = text.find(content, begin) if content else -1
        after = found + len(content) if found >= 0 else begin
        end = text.find(self._end, after) if self._end else -1
        if end >= 0 and (found < 0 or not text[after:end].strip()):
            return end + len(self._end)
        return after if found >= 0 else len(text.rstrip())

    def encode(self, rendered: Sequence[Rendered]) -> list[tuple[list[int], Spans]]:
        """Returns the ids of each text, and the ids that belong to each part.

        An id with characters of a part and of the text before belongs to the part. If the assistant's last turn has no
        token that ends a turn, the tokenizer's `eos_id` is added.
        """
        positions = [[position for span in one.spans for position in span] for one in rendered]
        rows = []
        for (ids, offsets), moved in self._literal.encode([one.text for one in rendered], positions):
            starts, ends = zip(*offsets, strict=True) if offsets else ((), ())
            spans, first = [], 0
            for begin, end in zip(moved[::2], moved[1::2], strict=True):
                first = next((i for i in range(first, len(ids)) if ends[i] > begin), len(ids))
                stop = next((i for i in range(first, len(ids)) if starts[i] >= end), len(ids))
                spans.append((first, stop))
            ids = list(ids)
            if spans and not self._has_ended(ids[slice(*spans[-1])]):
                ids = [*ids[: spans[-1][1]], self._tokenizer.eos_id]
                spans[-1] = (spans[-1][0], len(ids))
            rows.append((ids, tuple(spans)))
        return rows

    def _has_ended(self, ids: list[int]) -> bool:
        while ids and ids[-1] not in self._tokenizer.end_ids and not self._tokenizer.decode(ids[-1:], False).strip():
            ids = ids[:-1]
        return bool(ids) and ids[-1] in self._tokenizer.end_ids


def answered(messages: Sequence[Json]) -> list[int]:
    """Returns the indices of the assistant's turns that have a turn of a user or of a tool before.

    Example:
      >>> answered([{"role": role} for role in ("system", "assistant", "user", "assistant")])
      [3]
    """
    others = [index for index, message in enumerate(messages) if message["role"] not in (ASSISTANT, "system")]
    first = others[0] if others else len(messages)
    return [i for i, message in enumerate(messages) if message["role"] == ASSISTANT and i > first]


def without_oldest(row: Mapping[str, str]) -> dict[str, str] | None:
    """Returns a conversation without its oldest turns: those before the second turn of a user, except the system's.

    None means that only the turns of the last exchange are left.
    """
    messages = json.loads(row[MESSAGES])
    last = _last(messages)
    begin = 1 if messages[0]["role"] == "system" else 0
    later = [i for i in range(begin + 1, last) if messages[i]["role"] == "user"]
    if not later:
        return None
    return {**row, MESSAGES: json.dumps([*messages[:begin], *messages[later[0] :]], ensure_ascii=False)}


def is_exchange(row: Mapping[str, str]) -> bool:
    """Returns True if a conversation is one turn of a user and one of the assistant, so that any template can write it."""
    messages = json.loads(row[MESSAGES])
    return [message["role"] for message in messages] == ["user", ASSISTANT]


def _last(messages: Sequence[Json]) -> int:
    """Returns the index of the assistant's last turn."""
    return max(index for index, message in enumerate(messages) if message["role"] == ASSISTANT)
