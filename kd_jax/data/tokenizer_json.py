"""Checks of tokenizer.json before and while the tokenizers library reads it.

The checks cover panics of the library, ids out of range, and settings with which a text becomes extremely long or slow.

No check limits the time of a regular expression. A regular expression of 30 characters can take hours for a sentence,
and a call into the library cannot be stopped. The code of the library is trusted.
"""

import base64
import binascii
import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import tokenizers

from kd_jax.storage import untrusted
from kd_jax.storage.files import Json

STEPS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
MAX_GROWTH = 10_000  # the growth factor of a text by all parts of a tokenizer; tokenizers in use have 2 or 3
MAX_WORD = 1_000  # characters; the time of WordPiece grows with their square
MAX_TOKEN = 1_000  # characters, also of prefixes and suffixes; each unknown character may become such a token
MAX_STEPS = 100  # steps of all parts of a tokenizer; each step reads the whole text
MAX_PIECE = 256  # characters of a Unigram token; time grows with the number of tokens that begin at a position
MAX_ADDED = 10**7  # characters of the added tokens after normalisation, which happens when they are read
HOLES = 65_536  # the largest number of ids without a token


@contextlib.contextmanager
def named_errors(what: str) -> Iterator[None]:
    """Turns the library's errors into ValueErrors that begin with `what`.

    A panic of Rust arrives as an exception that is not a subclass of Exception.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{what}: {untrusted.clip(str(error))}.") from error


def read_fields(path: Path, content: bytes) -> Json:
    """Returns the fields of a tokenizer.json.

    Raises:
      ValueError: the content is not a JSON object, or has no field "model".
    """
    fields = untrusted.parse_json(content, str(path))
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(fields).__name__}.")
    if "model" not in fields:
        raise ValueError(f"{path} has no field 'model': it is not a tokenizer's file.")
    return fields


def with_added(fields: Json, tokens: list[Json]) -> Json:
    """Returns the fields with more added tokens, after the existing ones.

    The library reads added tokens in order, and gives a token that the vocabulary lacks the next free id. The file must
    have an id for each token, but the library ignores this id.
    """
    return fields | {"added_tokens": [*(fields.get("added_tokens") or ()), *({"id": 0} | token for token in tokens)]}


def read_backend(path: Path, content: bytes, fields: Json) -> tokenizers.Tokenizer:
    """Returns the library's tokenizer for a tokenizer.json, without padding and truncation.

    Args:
      path: the path, for messages.
      content: the content of the file, with the tokens of `with_added` if there are any.
      fields: the fields of the content, as `read_fields` returns them.

    Raises:
      ValueError: the library cannot read the content, an id is far larger than the number of tokens, or a text could
        become thousands of times as long or need far more time than usual.
    """
    _check_sizes(path, fields)
    with named_errors(f"{path} cannot be read as a tokenizer"):
        backend = tokenizers.Tokenizer.from_buffer(content)
        backend.no_padding()
        backend.no_truncation()
        ids = backend.get_vocab(with_added_tokens=True).values()
    if not ids:
        raise ValueError(f"{path}: the vocabulary is empty; expected at least one token.")
    if max(ids) >= len(ids) + HOLES:
        raise ValueError(
            f"{path}: there are {len(ids)} tokens, and one of them has the id {max(ids)}; expected ids below "
            f"{len(ids) + HOLES}."
        )
    return backend


def _check_sizes(path: Path, fields: Json) -> None:
    """Checks the sizes on which the time and the memory of the tokenizers library depend."""
    model = fields["model"] if isinstance(fields["model"], dict) else {}
    tokens, added = _texts(model.get("vocab")), _texts(fields.get("added_tokens"))
    parts, times, word = list(_parts(fields)), growth(fields), model.get("max_input_chars_per_word")
    if times > MAX_GROWTH:
        raise ValueError(
            f"{path}: normalizer, pre_tokenizer, post_processor and decoder can make a text {times} times as long; "
            f"at most {MAX_GROWTH} is accepted."
        )
    if (steps := sum("type" in part for part in parts)) > MAX_STEPS:
        raise ValueError(
            f"{path}: normalizer, pre_tokenizer, post_processor and decoder have {steps} steps; at most {MAX_STEPS} are accepted."
        )
    if isinstance(word, int) and word > MAX_WORD:
        raise ValueError(f"{path}: max_input_chars_per_word is {word}; at most {MAX_WORD} is accepted.")
    for text in (*_texts([model.get("continuing_subword_prefix"), model.get("end_of_word_suffix")]), *tokens, *added):
        if len(text) > MAX_TOKEN:
            raise ValueError(
                f"{path}: the token, prefix or suffix {untrusted.printable(text)} has {len(text)} characters; at most {MAX_TOKEN} "
                f"are accepted."
            )
    longest = max(tokens if isinstance(model.get("vocab"), list) else (), key=len, default="")
    if len(longest) > MAX_PIECE:
        raise ValueError(
            f"{path}: the Unigram token {untrusted.printable(longest)} has {len(longest)} characters; at most {MAX_PIECE} are "
            f"accepted."
        )
    if (length := times * sum(map(len, added))) > MAX_ADDED:
        raise ValueError(
            f"{path}: the normalizer can make the added tokens {length} characters long; at most {MAX_ADDED} are accepted."
        )


def added_tokens(fields: Json) -> list[str]:
    """Returns the added tokens among the fields of a tokenizer.json."""
    return _texts(fields.get("added_tokens"))


def _texts(entries: object) -> list[str]:
    """Returns the texts of a vocabulary, in any of its forms, or of added tokens.

    Entries of other types are omitted, because the library refuses them.
    """
    texts = []
    for entry in entries if isinstance(entries, dict | list) else ():
        if isinstance(entry, list) and entry:  # [token, score]
            entry = entry[0]
        elif isinstance(entry, dict):
            entry = entry.get("content")
        if isinstance(entry, str):
            texts.append(entry)
    return texts


def check_ids(backend: tokenizers.Tokenizer, ids: Iterable[object], where: str) -> None:
    """Checks that each id is a whole number, at least 0 and at most the largest id of the tokenizer.

    Raises:
      ValueError: an id is invalid; the message begins with `where`.
    """
    size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
    for number in ids:
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < size:
            raise ValueError(
                f"{where} is {untrusted.printable(number)}; expected an id of tokenizer.json, below {size}."
            )


def growth(fields: Json) -> int:
    """Returns an upper bound on the factor by which a text can grow.

    The bound is the product over all steps that write more than they read.

    Example:
      >>> growth({"normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "aaa"}, "model": {}})
      3
    """
    product = 1
    for part in _parts(fields):
        product *= _factor(part)
        if product > 10**30:
            break
    return product


def _parts(fields: Json) -> Iterator[Json]:
    """Yields all objects in the steps of a tokenizer.json."""
    values = [fields.get(step) for step in STEPS]
    while values:
        value = values.pop()
        if isinstance(value, dict):
            yield value
            values += value.values()
        elif isinstance(value, list):
            values += value


def _factor(step: Json) -> int:
    """Returns an upper bound on the factor by which one step can make a text longer."""
    kind = step.get("type")
    if kind in ("Replace", "Prepend"):
        content = step.get("content", step.get("prepend"))
        return max(1, len(content)) if isinstance(content, str) else 1
    if kind in ("ByteLevel", "Metaspace"):
        return 2  # two bytes in place of one, or a blank before each word
    if kind == "BertNormalizer":
        return 3  # a blank before and after each Chinese character, at each call
    if kind == "Precompiled":
        return _longest(step.get("precompiled_charsmap"))
    if kind == "TemplateProcessing":
        parts = max(len(step[key]) if isinstance(step.get(key), list) else 1 for key in ("single", "pair"))
        tokens = step.get("special_tokens")
        lists = [t.get("ids") for t in tokens.values() if isinstance(t, dict)] if isinstance(tokens, dict) else []
        return max(1, parts) * max([1, *(len(ids) for ids in lists if isinstance(ids, list))])
    return 1


def _longest(charsmap: object) -> int:
    """Returns the length in bytes of the longest text that one character can become.

    The map is the length of a trie, the trie, and the texts, each followed by a zero byte.
    """
    try:
        content = base64.b64decode(charsmap if isinstance(charsmap, str) else "", validate=True)
    except (binascii.Error, ValueError):
        return 1  # the library refuses such a map
    return max(map(len, content[4 + int.from_bytes(content[:4], "little") :].split(b"\0")), default=1) or 1
