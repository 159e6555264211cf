"""The encoding of rows: prompt and response are encoded as one text, and long prompts are truncated."""

import dataclasses
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from kd_jax.data import prompts
from kd_jax.data.rows import Texts
from kd_jax.data.tokenizer import Tokenizer

ENCODED_AT_ONCE = 4096  # rows: enough for all cores, and few enough to hold as Python lists


class Encoded(NamedTuple):
    """A row as token ids.

    Attributes:
      prompt: the ids of the rendered prompt, with the tokenizer's `prefix_ids` unless the template writes its own.
      response: the ids of the response, to which no end token is added.
      truncated: True if some of the user's text was removed from the prompt.
      own_prefix: True if the prompt's text begins with the tokenizer's `prefix_ids`, which are then not added again.
    """

    prompt: list[int]
    response: list[int]
    truncated: bool
    own_prefix: bool


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Renders and encodes rows.

    Attributes:
      tokenizer: the tokenizer that gives the ids.
      template: the format of prompts (`kd_jax.data.prompts`).
      max_prompt_length: the largest number of tokens of a prompt.
      truncates: True to truncate the user's text of a longer prompt. With False the caller handles the longer prompt.
    """

    tokenizer: Tokenizer
    template: str | prompts.Template
    max_prompt_length: int = sys.maxsize
    truncates: bool = False

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
                long := [i for i, row in enumerate(encoded) if len(row.prompt) > self.max_prompt_length]
            ):
                shorter = self._shortened([rows[i] for i in long], [len(encoded[i].prompt) for i in long])
                for i, row, again in zip(long, shorter, self._encoded(render, shorter), strict=True):
                    rows[i], encoded[i] = row, again._replace(truncated=True, own_prefix=encoded[i].own_prefix)
            yield from zip(rows, encoded, strict=True)

    def _encoded(self, render: prompts.Render, rows: Sequence[Mapping[str, str]]) -> list[Encoded]:
        adds_prefix = prompts.adds_special_tokens(self.template)
        texts = [(render(row["prompt"], row["context"]), row["response"]) for row in rows]
        encoded = []
        for prompt, response in self.tokenizer.encode_pairs(texts):
            own_prefix = adds_prefix and self.tokenizer.begins_with_prefix(prompt)
            prefixed = self.tokenizer.with_prefix(prompt) if adds_prefix else prompt
            encoded.append(Encoded(prefixed, response, False, own_prefix))
        return encoded

    def _shortened(self, rows: Sequence[Mapping[str, str]], lengths: Sequence[int]) -> list[dict[str, str]]:
        """Returns the rows with shorter text, so that each rendered prompt fits into `max_prompt_length` tokens.

        The text is removed from the end of the row's context, or of the prompt if there is no context. At least one
        character is removed from each row, so that repeated calls end.
        """
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
