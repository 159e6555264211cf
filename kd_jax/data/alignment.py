"""The alignment of two tokenisations of a text: the byte at which each token ends, and the spans that both share.

Two tokenizers have different tokens, but both read the same bytes. A *span* is a piece of the text that begins and ends
at a boundary between tokens in both tokenisations, and that has no other such boundary inside. Positions are bytes of
the UTF-8 text and not characters, because a token may end inside a character, such as an emoji.
"""

import dataclasses
import functools
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from kd_jax.data.tokenizer import Tokenizer
from kd_jax.storage.files import Json

Ends = Sequence[int] | Int[np.ndarray, " N"]
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# The steps of a decoder that leave the bytes of each token as they are, apart from those that `_replacements` finds.
PLAIN_STEPS = ("ByteLevel", "Metaspace", "Replace", "ByteFallback", "Fuse", "Strip")


def common_spans(first_ends: Ends, second_ends: Ends) -> Int[np.ndarray, "S 6"]:
    """Returns the finest common spans of two tokenisations of a text, in time linear in the length of the text.

    Bytes after the last common boundary are in no span. A token without a byte of its own, such as the space that
    SentencePiece puts before a text, belongs to the span of the token after it.

    Args:
      first_ends: the byte at which each token of the first tokenisation ends; never decreasing, at least 0.
      second_ends: the same for the second tokenisation.

    Returns:
      For each span: the first token and the end of the tokens in the first tokenisation, the same in the second
      tokenisation, and the first byte and the end of the bytes. All ends are exclusive.

    Raises:
      ValueError: the ends of a tokenisation decrease, or are negative.

    Example:
      >>> common_spans([3, 9], [3, 6, 9]).tolist()
      [[0, 1, 0, 1, 0, 3], [1, 2, 1, 3, 3, 9]]
    """
    first, second = (np.asarray(ends, np.int64) for ends in (first_ends, second_ends))
    for ends in (first, second):
        if ends.size and (ends[0] < 0 or np.any(np.diff(ends) < 0)):
            raise ValueError(f"the ends of tokens must be at least 0 and never decrease; got {ends.tolist()}.")
    size = 1 + max(first.max(initial=0), second.max(initial=0))
    tokens = []  # for each byte position, the number of tokens that end there or before; 0 if no token ends there
    for ends in (first, second):
        table = np.zeros(size, np.int64)
        table[ends] = np.arange(1, len(ends) + 1)  # of several tokens with one end, the last one
        tokens.append(table)
    cuts = np.flatnonzero((tokens[0] > 0) & (tokens[1] > 0))
    cuts = cuts[cuts > 0]
    bounds = np.stack([tokens[0][cuts], tokens[1][cuts], cuts], axis=1)
    starts = np.concatenate([np.zeros((1, 3), np.int64), bounds[:-1]])[: len(bounds)]
    return np.stack([starts, bounds], axis=2).reshape(-1, 6)


class Reading(NamedTuple):
    """A text as tokens.

    Attributes:
      ids: the ids of the tokens.
      ends: the byte at which each token ends, counted from the first byte of the text.
      is_apart: False if the first token begins before the text, with bytes of the text that precedes it.
    """

    ids: Int[np.ndarray, " N"]
    ends: Int[np.ndarray, " N"]
    is_apart: bool = True


@dataclasses.dataclass(frozen=True, eq=False)
class ByteReader:
    """Finds the bytes of the text that each token of a tokenizer stands for.

    If the decoder of tokenizer.json only joins the bytes of the tokens, each token has bytes of its own, so that any ids
    can be read. Byte-level BPE and SentencePiece are of this kind. With other decoders, and if a normalizer changed the
    text, the offsets of the tokenizers library are used, which exist only for ids that were encoded from a text. Two
    tokens that share a character then end at the same byte.

    Attributes:
      tokenizer: the tokenizer.
    """

    tokenizer: Tokenizer

    @functools.cached_property
    def pieces(self) -> tuple[bytes, ...] | None:
        """The bytes of each id; None if the bytes of a token depend on the tokens beside it."""
        return pieces_of(self.tokenizer.fields(), self.tokenizer.vocabulary())

    def join(self, ids: Sequence[int]) -> bytes:
        """Returns the bytes of the text of ids, and of a space that SentencePiece puts before a text.

        The bytes of a part of a text need not be valid UTF-8.
        """
        if self.pieces is None:
            return self.tokenizer.decode(ids, skip_special_tokens=False).encode()
        return b"".join(self.pieces[i] for i in ids)

    def read(self, ids: Sequence[int], text: bytes, before: str = "") -> Reading | None:
        """Returns the ends of the tokens of a text; None if the tokens do not give the bytes of the text.

        Args:
          ids: the tokens of the text. They may be cut off after any token.
          text: the bytes of the text.
          before: the text that precedes `text`. Tokenisation begins with this text, and the first of `ids` may begin
            there.

        Example:
          For a tokenizer such as that of Llama 2, the tokens "▁a" and "b" of the text "ab" end at the bytes 1 and 2.
        """
        array = np.asarray(ids, np.int32)
        if self.pieces is None:
            return self._by_offsets(array, text, before)
        joined = self.join(ids)
        lengths = np.array([len(self.pieces[i]) for i in ids], np.int64)
        # The first token of the text may have bytes before the text: those of `before`, or a space that is added.
        most = int(np.cumsum(lengths)[np.flatnonzero(lengths)[:1]].sum()) if len(ids) else 0
        for leading in range(min(most + 1, len(joined)) or 1):
            is_before = before.encode().endswith(joined[:leading])
            if text.startswith(joined[leading:]) and (is_before or joined[:leading] == b" "):
                return Reading(array, np.maximum(np.cumsum(lengths) - leading, 0), leading == 0 or not is_before)
        return self._by_offsets(array, text, before)

    def encode(self, text: str, before: str = "") -> Reading | None:
        """Returns the tokens of a text and their ends; None as in `read`. No special token is added.

        Args:
          text: the text.
          before: the text that precedes `text`. Both are encoded as one text.
        """
        [(_, ids)] = self.tokenizer.encode_pairs([(before, text)])
        return self.read(ids, text.encode(), before)

    def written(self, ids: Sequence[int], before: str = "") -> tuple[bytes, Reading] | None:
        """Returns the text that a model wrote as ids, and the ends of the tokens; None if the bytes are not known.

        The space with which SentencePiece begins a text is not a part of the text. Incomplete characters at the end are
        not a part of the text either, and the tokens of these characters end after the text.

        Args:
          ids: the ids that the model wrote after `before`, without an end token.
          before: the text after which the model wrote.
        """
        array = np.asarray(ids, np.int32)
        if self.pieces is None:
            text = self.tokenizer.decode(ids, skip_special_tokens=False)
            found = self.encode(text, before)
            return (text.encode(), found) if found is not None and np.array_equal(found.ids, array) else None
        joined = self.join(ids)
        added = int(joined.startswith(b" ") and self._begins_with_space(before))
        text = joined[added:]
        whole = text.decode(errors="ignore").encode()
        if not text.startswith(whole) or len(text) - len(whole) > 3:
            return None  # bytes that are no text stand before the end
        lengths = np.cumsum([len(self.pieces[i]) for i in ids], dtype=np.int64) - added
        return whole, Reading(array, np.maximum(lengths, 0))

    @functools.lru_cache(maxsize=64)  # noqa: B019 the reader lives as long as the run
    def _begins_with_space(self, before: str) -> bool:
        """Returns True if the tokenizer puts a space between `before` and a text that has none."""
        [(_, ids)] = self.tokenizer.encode_pairs([(before, "a")])
        return not before.endswith(" ") and self.join(ids) == b" a"

    def _by_offsets(self, ids: Int[np.ndarray, " N"], text: bytes, before: str) -> Reading | None:
        """Returns the ends from the offsets of the library, which are characters of the text."""
        decoded = text.decode()
        [(_, encoded)] = self.tokenizer.encode_pairs([(before, decoded)])
        if encoded[: len(ids)] != ids.tolist():
            return None
        [ends] = self.tokenizer.token_ends([before + decoded])
        of_text = np.array(ends[len(ends) - len(encoded) :][: len(ids)], np.int64) - len(before)
        bytes_before = np.concatenate([[0], np.cumsum([len(character.encode()) for character in decoded])])
        # If a normalizer composed a character and an accent, the offset is that of the character.
        for i in reversed(range(len(decoded))):
            if unicodedata.combining(decoded[i]):
                bytes_before[i] = bytes_before[i + 1]
        return Reading(ids, np.maximum.accumulate(bytes_before[np.maximum(of_text, 0)]))


def begins_word(reader: ByteReader) -> Bool[np.ndarray, " V"]:
    """Returns True for each id that begins a word or ends the text: after such an id, the word before has ended.

    These are the ids whose text begins with a space, a tab or a line break, and the special tokens.
    """
    tokenizer = reader.tokenizer
    pieces = reader.pieces or [
        tokenizer.decode([i], skip_special_tokens=False).encode() for i in range(tokenizer.vocab_size)
    ]
    begins = [piece[:1] in (b" ", b"\t", b"\n", b"\r") for piece in pieces]
    special = set(tokenizer.end_ids) | {tokenizer.pad_id} | ({tokenizer.bos_id} - {None})
    return np.array([space or i in special or tokenizer.is_added(i) for i, space in enumerate(begins)])


def pieces_of(fields: Json, vocabulary: Mapping[str, int]) -> tuple[bytes, ...] | None:
    """Returns the bytes of each id of a tokenizer.json; None if the decoder does more than to join the tokens.

    Added tokens stand for their own text. A token of a byte-level tokenizer has one character for each byte. In other
    tokenizers "<0x0A>" is a byte, and a character such as "▁" stands for a space.

    Args:
      fields: the fields of tokenizer.json.
      vocabulary: the ids by token, added tokens included.
    """
    steps = list(_steps(fields.get("decoder")))
    kinds = [step.get("type") for step in steps]
    if not steps or not set(kinds) <= set(PLAIN_STEPS):
        return None
    if any(step["type"] == "Replace" and "String" not in step.get("pattern", {}) for step in steps):
        return None
    added = {token["content"] for token in fields.get("added_tokens") or ()}
    pieces = [b""] * (1 + max(vocabulary.values(), default=-1))
    for token, number in vocabulary.items():
        if token in added:
            pieces[number] = token.encode()
        elif "ByteLevel" in kinds:
            pieces[number] = _of_byte_level(token)
        elif "ByteFallback" in kinds and (match := BYTE_TOKEN.fullmatch(token)):
            pieces[number] = bytes([int(match[1], 16)])
        else:
            pieces[number] = functools.reduce(_replaced, steps, token).encode()
    return tuple(pieces)


def _steps(decoder: Json | None) -> Iterator[Json]:
    """Yields the steps of a decoder."""
    if decoder is None:
        return
    if decoder.get("type") != "Sequence":
        yield decoder
        return
    for step in decoder["decoders"]:
        yield from _steps(step)


def _replaced(token: str, step: Json) -> str:
    """Returns a token after one step of a decoder."""
    if step["type"] == "Metaspace":
        return token.replace(step.get("replacement", "▁"), " ")
    return token.replace(step["pattern"]["String"], step["content"]) if step["type"] == "Replace" else token


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """Returns the byte for each character of a byte-level vocabulary, as GPT-2 numbers them.

    Printable characters of Latin-1 stand for themselves. The other bytes have the characters from 256 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _of_byte_level(token: str) -> bytes:
    """Returns the bytes of a token, which is its own text if it has a character that stands for no byte."""
    table = _byte_of_character()
    return bytes(table[c] for c in token) if all(c in table for c in token) else token.encode()
