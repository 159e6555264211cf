"""Tokenizers that are made of something else than published ones are: they work in `sandbox`'s process, which has a time limit.

What published ones are made of needs time that goes with the text. Of a regular expression in general nobody can say: one of 30
characters takes hours over a sentence. So those that are in use are known here by their text, and any other one, and steps or
tokens of unusual numbers and lengths, cost the start of a process, a tenth of a second, and the ids' way from there.

What remains: the limit is a call's, and a run makes many; and the tokenizers library's own code is trusted.
"""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from kd_jax.data import sandbox

MAX_STEPS = 100
PIECE = 64  # characters of a token of Unigram's, whose time goes with the number of tokens that begin at a place
ADDED = 10**7  # characters that the added tokens become, which are normalised when they are read
REGEXES = frozenset({
    # GPT-2, and what has its tokenizer
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
    # Parts of several
    r"\p{N}{1,3}", r"\p{N}", r"[0-9][0-9][0-9]", r"\d", r"\s+", " {2,}",
})  # fmt: skip


class Elsewhere:
    """What kd_jax uses of a `tokenizers.Tokenizer`, in the other process.

    Raises:
      ValueError: from here on, whatever goes wrong there.
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
    """Whether a tokenizer may work in this process.

    Args:
      steps: what stands in its file for normalizer, pre_tokenizer, post_processor and decoder.
      pieces: the tokens of a Unigram model; none for another one.
      added: characters that its added tokens may become.
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
