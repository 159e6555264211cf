"""Rows of text as ids: a prompt and the response that follows it, encoded as one text, and long prompts truncated."""

import dataclasses
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from kd_jax.data import prompts
from kd_jax.data.tokenizer import Tokenizer

ENCODED_AT_ONCE = 4096  # rows: enough for all cores, few enough to hold as Python lists


class Encoded(NamedTuple):
    """A row as ids.

    Attributes:
      prompt: the ids of the rendered prompt, with the tokenizer's `prefix_ids` unless the template writes its own.
      response: the ids of the response, without an end token.
      truncated: whether some of the user's text was removed from the prompt.
      own_prefix: whether the prompt's text begins with the tokenizer's `prefix_ids`, which are then not added again.
    """

    prompt: list[int]
    response: list[int]
    truncated: bool
    own_prefix: bool


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Renders and encodes rows.

    Attributes:
      tokenizer: gives the ids.
      template: how prompts are written (`kd_jax.data.prompts`).
      max_prompt_length: the largest number of tokens of a prompt.
      truncates: whether the user's text of a longer prompt is truncated. Otherwise the caller decides what happens to the row.
    """

    tokenizer: Tokenizer
    template: str | prompts.Template
    max_prompt_length: int = sys.maxsize
    truncates: bool = False

    def rows(self, source: Sequence[Mapping[str, str]]) -> Iterator[Encoded]:
        """Yields each row of a source, which needs a length and an index: tfds' sources raise no IndexError.

        Raises:
          ValueError: the template's own tokens are more than `max_prompt_length`, and prompts are to be truncated.
        """
        render = prompts.make_render(self.template, self.tokenizer)
        adds_prefix = prompts.adds_special_tokens(self.template)
        indices = iter(range(len(source)))
        while some := [source[i] for i in itertools.islice(indices, ENCODED_AT_ONCE)]:
            texts = [(render(row["prompt"], row["context"]), row["response"]) for row in some]
            for row, (prompt, response) in zip(some, self.tokenizer.encode_pairs(texts), strict=True):
                own_prefix = adds_prefix and self.tokenizer.begins_with_prefix(prompt)
                whole = self.tokenizer.with_prefix(prompt) if adds_prefix else prompt
                if len(whole) <= self.max_prompt_length or not self.truncates:
                    yield Encoded(whole, response, False, own_prefix)
                else:
                    yield self._truncated(render, adds_prefix, row, len(whole), own_prefix)

    def _truncated(
        self, render: prompts.Render, adds_prefix: bool, row: Mapping[str, str], length: int, own_prefix: bool
    ) -> Encoded:
        """Removes tokens from the end of the context, and then of the prompt, until the rendered prompt fits."""
        prompt, context = row["prompt"], row["context"]
        while True:
            excess = length - self.max_prompt_length
            if context:
                context = self._shortened(context, excess)
            elif prompt:
                prompt = self._shortened(prompt, excess)
            else:
                name = prompts.as_template(self.template).name
                raise ValueError(
                    f"the template {name} writes {length} tokens around an empty prompt, and max_prompt_length is "
                    f"{self.max_prompt_length}: no prompt can be truncated to fit. Raise max_prompt_length."
                )
            ids, response = self.tokenizer.encode_pairs([(render(prompt, context), row["response"])])[0]
            ids = self.tokenizer.with_prefix(ids) if adds_prefix else ids
            if len(ids) <= self.max_prompt_length:
                return Encoded(ids, response, True, own_prefix)
            length = len(ids)

    def _shortened(self, text: str, excess: int) -> str:
        """Returns the text without its last `excess` tokens, and in any case without its last character."""
        ends = [end for _, end in self.tokenizer.encode_offsets(text)]
        kept = ends[len(ends) - excess - 1] if len(ends) > excess else 0
        return text[: min(kept, len(text) - 1)]
