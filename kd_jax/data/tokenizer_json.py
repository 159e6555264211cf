"""tokenizer.json, before and while the tokenizers library reads it: its panics, its ids, and what could blow a text up."""

import base64
import binascii
import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from kd_jax import untrusted
from kd_jax.data.tokenizer_elsewhere import Elsewhere, is_usual

STEPS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
MAX_GROWTH = 10_000  # of a text, by everything in a tokenizer together; in use are 2 or 3
MAX_WORD = 1_000  # characters; WordPiece's time goes with their square
MAX_TOKEN = 1_000  # characters, also of what marks a place in a word: of an unknown text, each may become one
HOLES = 65_536  # ids without a token
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@contextlib.contextmanager
def named_errors(what: str) -> Iterator[None]:
    """The library's errors as ValueErrors; a Rust panic arrives as an exception that is no Exception."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{what}: {untrusted.clip(str(error))}.") from error


def read_backend(path: Path, content: bytes) -> Any:
    """The library's tokenizer of a tokenizer.json, without padding and truncation, or, of an unusual one, `Elsewhere`.

    Args:
      path: for the messages.
      content: of the file.
    Raises:
      ValueError: what the library cannot read, ids far beyond the number of tokens, or what would make a text thousands of
        times as long.
    """
    fields = untrusted.parse_json(content, str(path))
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(fields).__name__}.")
    if "model" not in fields:
        raise ValueError(f"{path} has no field 'model': it is not a tokenizer's file.")
    if (times := growth(fields)) > MAX_GROWTH:
        raise ValueError(
            f"{path}: its normalizer, pre_tokenizer, post_processor and decoder can make a text {times} times as long; "
            f"at most {MAX_GROWTH} is accepted."
        )
    model = fields["model"] if isinstance(fields["model"], dict) else {}
    word = model.get("max_input_chars_per_word")
    if isinstance(word, int) and word > MAX_WORD:
        raise ValueError(f"{path}: max_input_chars_per_word is {word}; at most {MAX_WORD} is accepted.")
    tokens, added = _texts(model.get("vocab")), _texts(fields.get("added_tokens"))
    for text in (*_texts([model.get("continuing_subword_prefix"), model.get("end_of_word_suffix")]), *tokens, *added):
        if len(text) > MAX_TOKEN:
            raise ValueError(
                f"{path}: the token, prefix or suffix {untrusted.shown(text)} has {len(text)} characters; at most {MAX_TOKEN} "
                f"are accepted."
            )
    pieces = tokens if isinstance(model.get("vocab"), list) else []
    usual = is_usual([fields.get(step) for step in STEPS], pieces, times * sum(map(len, added)))
    with named_errors(f"{path} cannot be read as a tokenizer"):
        if usual:
            backend = tokenizers.Tokenizer.from_buffer(content)
            backend.no_padding()
            backend.no_truncation()
        else:
            backend = Elsewhere(content)
        ids = backend.get_vocab(with_added_tokens=True).values()
    if not ids:
        raise ValueError(f"{path}: its vocabulary is empty.")
    if max(ids) >= len(ids) + HOLES:
        raise ValueError(f"{path}: it has {len(ids)} tokens, and one of them has the id {max(ids)}.")
    return backend


def _texts(found: Any) -> list[str]:
    """Of a vocabulary, in whichever of its forms, or of added tokens; what is none of them the library refuses."""
    texts = []
    for entry in found if isinstance(found, dict | list) else ():
        if isinstance(entry, list) and entry:  # [token, score]
            entry = entry[0]
        elif isinstance(entry, dict):
            entry = entry.get("content")
        if isinstance(entry, str):
            texts.append(entry)
    return texts


def check_ids(backend: Any, ids: Iterable[Any], where: str) -> None:
    """Each must be a whole number below the largest id plus one."""
    size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
    for number in ids:
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < size:
            raise ValueError(f"{where} is {untrusted.shown(number)}; expected an id of tokenizer.json, below {size}.")


def growth(fields: dict[str, Any]) -> int:
    """How many times as long a text can become, from above: the product over all steps that write more than they read.

    Example:
      >>> growth({"normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "aaa"}, "model": {}})
      3
    """
    product = 1
    left = [fields.get(step) for step in STEPS]
    while left:
        found = left.pop()
        if isinstance(found, dict):
            product *= _factor(found)
            left += found.values()
        elif isinstance(found, list):
            left += found
        if product > 10**30:
            break
    return product


def _factor(step: dict[str, Any]) -> int:
    kind = step.get("type")
    if kind in ("Replace", "Prepend"):
        content = step.get("content", step.get("prepend"))
        return max(1, len(content)) if isinstance(content, str) else 1
    if kind in ("ByteLevel", "Metaspace"):
        return 2  # a byte as two, a blank before each word
    if kind == "BertNormalizer":
        return 3  # a blank before and after each Chinese character, and as often as it is called
    if kind == "Precompiled":
        return _longest(step.get("precompiled_charsmap"))
    if kind == "TemplateProcessing":
        parts = max(len(step[key]) if isinstance(step.get(key), list) else 1 for key in ("single", "pair"))
        tokens = step.get("special_tokens")
        lists = [t.get("ids") for t in tokens.values() if isinstance(t, dict)] if isinstance(tokens, dict) else []
        return max(1, parts) * max([1, *(len(ids) for ids in lists if isinstance(ids, list))])
    return 1


def _longest(charsmap: Any) -> int:
    """What one character can become: the map is the length of a trie, the trie, and the texts, each with a zero byte after it."""
    try:
        content = base64.b64decode(charsmap, validate=True)
    except (binascii.Error, TypeError, ValueError):
        return 1  # the library refuses it
    return max(map(len, content[4 + int.from_bytes(content[:4], "little") :].split(b"\0")), default=1) or 1


def named_tokens(files: Mapping[str, bytes]) -> dict[str, str]:
    """Returns the special tokens that transformers gives a chat template as variables, by the variables' names.

    Besides the usual names there are a model's own: keys that end in _token, and the names in extra_special_tokens.

    Args:
      files: the contents of tokenizer_config.json and special_tokens_map.json, as far as the folder has them. The second one
        counts where the first one has no added_tokens_decoder: older versions of transformers wrote both.
    """
    config = _object(files, "tokenizer_config.json")
    if "added_tokens_decoder" not in config:
        config = config | _object(files, "special_tokens_map.json")
    extra = config.get("extra_special_tokens")
    found = {name: token for name, token in config.items() if name in NAMED or name.endswith("_token")}
    found |= extra if isinstance(extra, dict) else {}
    tokens = {name: token.get("content") if isinstance(token, dict) else token for name, token in found.items()}
    return {name: token for name, token in tokens.items() if isinstance(token, str)}


def _object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    found = untrusted.parse_json(files[name], name) if name in files else {}
    return found if isinstance(found, dict) else {}
