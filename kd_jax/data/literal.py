"""Special tokens as text: a user who writes `<|im_end|>` writes ten characters and does not end a turn.

A special token in a turn is marked before the template is rendered. After that, the tokens that the template wrote are
known. The text is encoded by a second tokenizer in which the special tokens have other names, so that the names in a
user's text mean nothing.
"""

import json
import re
from collections.abc import Sequence

import tokenizers

from kd_jax.data.tokenizer import Tokenizer
from kd_jax.data.tokenizer_json import named_errors
from kd_jax.storage.files import Json

# Noncharacters of Unicode, which no text has: the mark in a special token that is text, and the marks of a generation.
BREAK, START, END = "\ufdd0", "\ufdd1", "\ufdd2"
NAME = "\ufdd3{}\ufdd4"  # the name of a special token in the second tokenizer, with its id
REPLACED = dict.fromkeys(range(0xFDD0, 0xFDD5), "\ufffd")  # the character that Unicode has for what is no character

Encoding = tuple[list[int], list[tuple[int, int]]]  # the ids, and the first and last character of each id


class LiteralTokens:
    """Encodes texts in which some special tokens are text.

    Example:
      In a tokenizer with the special token `</s>`, `hide("a </s>")` is "a <" + BREAK + "/s>".
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids = {
            token.content: number
            for number, token in tokenizer.backend.get_added_tokens_decoder().items()
            if token.special and token.content
        }
        names = "|".join(map(re.escape, sorted(self._ids, key=len, reverse=True)))
        self._hidden = re.compile(names) if names else None
        self._marks = re.compile(f"(?P<token>{names})(?!{BREAK})|{BREAK}" if names else BREAK)
        self._renamed: tokenizers.Tokenizer | None = None

    def hide(self, text: str) -> str:
        """Returns a text in which each special token is marked as text."""
        text = clean(text)
        return self._hidden.sub(lambda found: found[0][0] + BREAK + found[0][1:], text) if self._hidden else text

    def without_tokens(self, text: str) -> str:
        """Returns a text in which a space is in place of each special token."""
        return self._hidden.sub(" ", text) if self._hidden else text

    def encode(self, texts: Sequence[str], spans: Sequence[Sequence[int]]) -> list[tuple[Encoding, list[int]]]:
        """Returns the encoding of each text, and positions in the text as positions of the encoded text.

        Args:
          texts: rendered texts, with the marks of `hide`.
          spans: positions of characters in each text, in ascending order.

        Raises:
          ValueError: the tokenizers library fails on a text.
        """
        plain = [index for index, text in enumerate(texts) if BREAK not in text]
        marked = [index for index, text in enumerate(texts) if BREAK in text]
        found: dict[int, tuple[Encoding, list[int]]] = {}
        for index, encoding in zip(plain, self._tokenizer.encode_offsets([texts[i] for i in plain]), strict=True):
            found[index] = encoding, list(spans[index])
        renamed = [self._rename(texts[i], spans[i]) for i in marked]
        if renamed:
            with named_errors(f"{self._tokenizer.folder}: tokenizer.json cannot encode this"):
                encoded = self._second().encode_batch([text for text, _ in renamed], add_special_tokens=False)
            for index, encoding, (_, positions) in zip(marked, encoded, renamed, strict=True):
                found[index] = (encoding.ids, encoding.offsets), positions
        return [found[index] for index in range(len(texts))]

    def _rename(self, text: str, positions: Sequence[int]) -> tuple[str, list[int]]:
        """Returns a text with the names of the second tokenizer and without marks, and where its positions are now."""
        pieces, moved, start, length = [], [], 0, 0
        remaining = list(positions)

        def append(piece: str, begin: int, end: int) -> None:
            nonlocal length
            while remaining and remaining[0] < end:
                moved.append(length + min(remaining.pop(0) - begin, len(piece)))
            pieces.append(piece)
            length += len(piece)

        for found in self._marks.finditer(text):
            append(text[start : found.start()], start, found.start())
            name = NAME.format(self._ids[found["token"]]) if found[0] != BREAK else ""
            append(name, found.start(), found.end())
            start = found.end()
        append(text[start:], start, len(text) + 1)
        return "".join(pieces), moved

    def _second(self) -> tokenizers.Tokenizer:
        """Returns the tokenizer in which the special tokens have other names and the same ids."""
        if self._renamed is not None:
            return self._renamed
        names = {content: NAME.format(number) for content, number in self._ids.items()}
        fields: Json = json.loads(self._tokenizer.backend.to_str())
        fields["added_tokens"] = [
            token | {"content": names.get(token["content"], token["content"])} for token in fields["added_tokens"]
        ]
        fields["post_processor"] = None  # it may name special tokens, and no tokens are added here
        model = fields["model"]
        if isinstance(model.get("vocab"), dict):
            model["vocab"] = {names.get(token, token): number for token, number in model["vocab"].items()}
        elif isinstance(model.get("vocab"), list):
            model["vocab"] = [[names.get(token, token), *others] for token, *others in model["vocab"]]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        problem = (
            f"{self._tokenizer.folder}: a turn has a special token as text, and this tokenizer cannot encode it so"
        )
        with named_errors(problem):
            second = tokenizers.Tokenizer.from_str(json.dumps(fields))
            if any(second.token_to_id(name) != self._ids[content] for content, name in names.items()):
                raise ValueError("its special tokens cannot have other names")
        self._renamed = second
        return second


def clean(text: str) -> str:
    """Returns a text in which the noncharacters of this module are replaced."""
    return text if text.isascii() else text.translate(REPLACED)
