"""The encoding of rows: prompt and response are encoded as one text, and long prompts are truncated.

A row with the column `messages` is a conversation, which the template chat writes as a whole (`kd_jax.data.turns`).
"""

import dataclasses
import functools
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from kd_jax.data import prompts
from kd_jax.data.formats import MESSAGES
from kd_jax.data.literal import BREAK, LiteralTokens
from kd_jax.data.rows import Texts
from kd_jax.data.tokenizer import Tokenizer
from kd_jax.data.turns import Spans, Turns, is_exchange, without_oldest

ENCODED_AT_ONCE = 4096  # rows: enough for all cores, and few enough to hold as Python lists


class Encoded(NamedTuple):
    """A row as token ids.

    Attributes:
      prompt: the ids of the rendered prompt, with the tokenizer's `prefix_ids` unless the template writes its own.
      response: the ids of the response, to which no end token is added.
      truncated: True if some of the user's text was removed from the prompt.
      own_prefix: True if the prompt's text begins with the tokenizer's `prefix_ids`, which are then not added again.
      spans: for a conversation, the parts of `prompt` and `response` together that the loss counts, each with its end
        token; () for other rows.
    """

    prompt: list[int]
    response: list[int]
    truncated: bool
    own_prefix: bool
    spans: Spans = ()


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Renders and encodes rows.

    Attributes:
      tokenizer: the tokenizer that gives the ids.
      template: the format of prompts (`kd_jax.data.prompts`).
      max_prompt_length: the largest number of tokens of a prompt.
      truncates: True to shorten a longer prompt: the oldest turns of a conversation are removed, and then the user's text
        is truncated. With False the caller handles the longer prompt.
      all_turns: True to count all turns of the assistant in a conversation. The prompt is then never shortened.
    """

    tokenizer: Tokenizer
    template: str | prompts.Template
    max_prompt_length: int = sys.maxsize
    truncates: bool = False
    all_turns: bool = False

    def rows(self, source: Texts) -> Iterator[Encoded]:
        """Yields each row of a source in encoded form.

        Raises:
          ValueError: `truncates` is True, but the template's tokens without any user's text exceed
            `max_prompt_length`.
        """
        return (encoded for _, encoded in self.fitted(source))

    def fitted(self, source: Texts) -> Iterator[tuple[dict[str, str], Encoded]]:
        """Yields each row of a source with the text that is left of a truncated prompt, and in encoded form.

        The source needs a length and an index, because the sources of tfds raise no IndexError at their end.

        Raises:
          ValueError: as in `rows`.
        """
        render = prompts.make_render(self.template, self.tokenizer)
        indices = iter(range(len(source)))
        while rows := [source[i] for i in itertools.islice(indices, ENCODED_AT_ONCE)]:
            encoded = self._encoded(render, rows)
            while self.truncates and (
                long := [
                    i
                    for i, row in enumerate(encoded)
                    if len(row.prompt) > self.max_prompt_length and not (self.all_turns and row.spans)
                ]
            ):
                shorter = self._shortened([rows[i] for i in long], [len(encoded[i].prompt) for i in long])
                for i, row, again in zip(long, shorter, self._encoded(render, shorter), strict=True):
                    rows[i], encoded[i] = row, again._replace(truncated=True, own_prefix=encoded[i].own_prefix)
            yield from zip(rows, encoded, strict=True)

    def _encoded(self, render: prompts.Render, rows: Sequence[Mapping[str, str]]) -> list[Encoded]:
        is_chat = not prompts.adds_special_tokens(self.template)
        of_turns = [
            index for index, row in enumerate(rows) if row.get(MESSAGES) and (is_chat or self._refuse_turns(row))
        ]
        found = dict(zip(of_turns, self._encoded_turns([rows[i] for i in of_turns]), strict=True))
        others = [row for index, row in enumerate(rows) if index not in found]
        hide = self._literal.hide if is_chat else str
        texts = [(render(hide(row["prompt"]), hide(row["context"])), row["response"]) for row in others]
        pairs = iter(self._encode_pairs(texts))
        return [found[index] if index in found else self._with_prefix(*next(pairs)) for index in range(len(rows))]

    def _with_prefix(self, prompt: list[int], response: list[int]) -> Encoded:
        adds_prefix = prompts.adds_special_tokens(self.template)
        own_prefix = adds_prefix and self.tokenizer.begins_with_prefix(prompt)
        return Encoded(self.tokenizer.with_prefix(prompt) if adds_prefix else prompt, response, False, own_prefix)

    def _encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """Returns `Tokenizer.encode_pairs`, in which the special tokens that are marked as text are text."""
        encoded = self.tokenizer.encode_pairs([pair if BREAK not in pair[0] else ("", "") for pair in pairs])
        for index in [i for i, (prompt, _) in enumerate(pairs) if BREAK in prompt]:
            prompt, response = pairs[index]
            (((ids, offsets), (begin,)),) = self._literal.encode([prompt + response], [[len(prompt)]])
            split = next((i for i, (_, end) in enumerate(offsets) if end > begin), len(ids))
            encoded[index] = (ids[:split], ids[split:])
        return encoded

    @functools.cached_property
    def _literal(self) -> LiteralTokens:
        return LiteralTokens(self.tokenizer)

    @functools.cached_property
    def _turns(self) -> Turns:
        return Turns(prompts.as_template(self.template), self.tokenizer)

    def _encoded_turns(self, rows: Sequence[Mapping[str, str]]) -> list[Encoded]:
        """Returns conversations in encoded form. A conversation without a response is only a prompt."""
        if not rows:
            return []
        whole = [i for i, row in enumerate(rows) if row["response"] or self.all_turns]
        rendered = [self._turns.whole(rows[i], self.all_turns) for i in whole]
        found: dict[int, Encoded] = {}
        for i, one, (ids, spans) in zip(whole, rendered, self._turns.encode(rendered), strict=True):
            begin = spans[one.last][0]
            found[i] = Encoded(ids[:begin], ids[begin:], False, False, spans)
        others = [i for i in range(len(rows)) if i not in found]
        texts = [(self._turns.prompt(rows[i]), "") for i in others]
        for i, (prompt, _) in zip(others, self._encode_pairs(texts), strict=True):
            found[i] = Encoded(prompt, [], False, False)
        return [found[i] for i in range(len(rows))]

    def _refuse_turns(self, row: Mapping[str, str]) -> bool:
        """Refuses a conversation that the template cannot write; returns False for one prompt and one response."""
        if not is_exchange(row):
            name, where = prompts.as_template(self.template).name, f"{row['name']}: " if row.get("name") else ""
            raise ValueError(
                f"{where}the row is a conversation with more than one turn of a user and one of the assistant, which "
                f"data.template={name!r} cannot write. Set data.template='chat'."
            )
        return False

    def _shortened(self, rows: Sequence[Mapping[str, str]], lengths: Sequence[int]) -> list[dict[str, str]]:
        """Returns the rows with shorter text, so that each rendered prompt fits into `max_prompt_length` tokens.

        A conversation loses its oldest turns, one exchange in each call. From other rows, the text is removed from the
        end of the row's context, or of the prompt if there is no context. At least one character is removed from each
        row, so that repeated calls end.
        """
        later = {i: shorter for i, row in enumerate(rows) if row.get(MESSAGES) and (shorter := without_oldest(row))}
        others = [i for i in range(len(rows)) if i not in later]
        truncated = self._truncated([rows[i] for i in others], [lengths[i] for i in others])
        later |= dict(zip(others, truncated, strict=True))
        return [later[i] for i in range(len(rows))]

    def _truncated(self, rows: Sequence[Mapping[str, str]], lengths: Sequence[int]) -> list[dict[str, str]]:
        """Returns the rows with truncated text, as in `_shortened`."""
        fields = ["context" if row["context"] else "prompt" for row in rows]
        ends = self.tokenizer.token_ends([row[field] for row, field in zip(rows, fields, strict=True)])
        shortened: list[dict[str, str]] = []
        for row, field, length, ends_in_row in zip(rows, fields, lengths, ends, strict=True):
            if not row[field]:
                name = prompts.as_template(self.template).name
                raise ValueError(
                    f"the template {name} writes {length} tokens around an empty prompt, and max_prompt_length is "
                    f"{self.max_prompt_length}: no prompt can be truncated to fit. Raise max_prompt_length."
                )
            num_tokens = len(ends_in_row) - (length - self.max_prompt_length)
            end = ends_in_row[num_tokens - 1] if num_tokens > 0 else 0
            shortened.append({**row, field: row[field][: min(end, len(row[field]) - 1)]})
        return shortened
