"""Tokenizers with unusual parts, which work in the process of `sandbox` under a time limit.

The parts of published tokenizers need time proportional to the text. No such bound is known for a regular expression in
general: one of 30 characters can take hours for a sentence. So the regular expressions in use are listed here by their
text. A tokenizer with any other one, or with an unusual number of steps or length of tokens, works in another process.
This costs a tenth of a second to start the process, and the time to send the ids back.

Two risks remain. The time limit is for one call, and a run makes many calls. The code of the tokenizers library itself
is trusted.
"""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from kd_jax.data import sandbox

MAX_STEPS = 100
PIECE = 64  # characters of a Unigram token; time grows with the number of tokens that begin at a position
ADDED = 10**7  # characters of the added tokens after normalisation, which happens when they are read
REGEXES = frozenset({
    # GPT-2 and models with its tokenizer
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    # Llama 3
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    # Qwen 2 and 3
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    # Qwen 3.5
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    # GPT-4o
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    # Mistral's Tekken
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    # DeepSeek 3
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    # Parts of several tokenizers
    r"\p{N}{1,3}", r"\p{N}", r"[0-9][0-9][0-9]", r"\d", r"\s+", " {2,}",
})  # fmt: skip


class Elsewhere:
    """The part of `tokenizers.Tokenizer` that kd_jax uses, run in the other process.

    Raises:
      ValueError: any call fails in the other process.
    """

    def __init__(self, content: bytes):
        self._content = content
        self._ids: dict[str, int] = self._call("get_vocab", True)
        self._tokens = {number: token for token, number in self._ids.items()}

    def _call(self, method: str, *arguments: Any) -> Any:
        return sandbox.tokenizer(self._content, method, *arguments)

    def get_vocab(self, with_added_tokens: bool) -> dict[str, int]:
        return self._ids

    def token_to_id(self, token: str) -> int | None:
        return self._ids.get(token)

    def id_to_token(self, number: int) -> str | None:
        return self._tokens.get(number)

    def encode_batch_fast(self, texts: list[str], add_special_tokens: bool) -> list[SimpleNamespace]:
        rows = self._call("encode_batch_fast", texts, False, add_special_tokens)
        return [SimpleNamespace(ids=ids) for ids in rows]

    def encode_batch(self, texts: list[str], add_special_tokens: bool) -> list[SimpleNamespace]:
        rows = self._call("encode_batch", texts, False, add_special_tokens)
        return [SimpleNamespace(ids=ids, offsets=offsets) for ids, offsets in rows]

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return self._call("decode", ids, skip_special_tokens)

    def to_str(self) -> str:
        return self._call("to_str")


def is_usual(steps: list[Any], pieces: list[str], added: int) -> bool:
    """Returns True if a tokenizer may work in this process.

    Args:
      steps: the fields normalizer, pre_tokenizer, post_processor and decoder of tokenizer.json.
      pieces: the tokens of a Unigram model; empty for other models.
      added: the number of characters that the added tokens may become.
    """
    found = list(_dicts(steps))
    regexes = {regex for step in found if isinstance(regex := step.get("Regex", ""), str) and "Regex" in step}
    return (
        regexes <= REGEXES
        and sum("type" in step for step in found) <= MAX_STEPS
        and max(map(len, pieces), default=0) <= PIECE
        and added <= ADDED
    )


def _dicts(document: Any) -> Iterator[dict[str, Any]]:
    left = [document]
    while left:
        node = left.pop()
        if isinstance(node, dict):
            yield node
            left += node.values()
        elif isinstance(node, list):
            left += node
