"""Removal of a tokenizer's last added tokens, for two models whose tokenizers differ in a few added tokens.

Qwen2.5 has 151,665 ids. Qwen3 has the same ids and four more added tokens. A run with both models uses the common ids.
Encoded texts must not contain the other tokens, because one model has never seen them or has no embedding for them.
"""

import json
from collections.abc import Mapping, Sequence

from kd_jax.data.special_tokens import KINDS, Token, model_tokens
from kd_jax.storage import untrusted
from kd_jax.storage.files import Json

MOST = 1024  # the largest number of tokens that may be removed
SHARE = 100  # at most 1 token for 100 common ids may be removed: tokenizers that differ in over 1 % are too different
SHOWN = 5  # the largest number of tokens that a message names

TOKENIZER, ADDED = "tokenizer.json", "added_tokens.json"


def common_ids(ours: Mapping[str, int], theirs: Mapping[str, int]) -> int:
    """Returns the number of leading ids, from 0 on, that mean the same token in both vocabularies.

    An id that neither vocabulary uses counts as common.

    Args:
      ours: the ids of the first vocabulary, by token.
      theirs: the ids of the second vocabulary, by token.

    Example:
      >>> common_ids({"a": 0, "b": 1, "c": 2}, {"a": 0, "b": 1, "d": 2})
      2
    """
    both = ((ours, theirs), (theirs, ours))
    different = [i for one, other in both for token, i in one.items() if other.get(token) != i]
    return min(different, default=max(ours.values(), default=-1) + 1)


def differing_tokens(ours: Mapping[str, int], theirs: Mapping[str, int]) -> list[tuple[str, int | None, int | None]]:
    """Returns the tokens whose ids differ, or that only one vocabulary has, in the order of their ids.

    Args:
      ours: the ids of the first vocabulary, by token.
      theirs: the ids of the second vocabulary, by token.

    Returns:
      (token, id in `ours`, id in `theirs`) for each such token; an id is None if the vocabulary lacks the token.

    Example:
      >>> differing_tokens({"a": 0, "b": 1, "c": 2}, {"a": 0, "b": 2, "d": 3})
      [('b', 1, 2), ('c', 2, None), ('d', None, 3)]
    """
    differing = [(token, number, theirs.get(token)) for token, number in ours.items() if theirs.get(token) != number]
    differing += [(token, None, number) for token, number in theirs.items() if token not in ours]
    return sorted(differing, key=lambda row: (row[2] if row[1] is None else row[1], row[0]))


def tokens_beyond(vocabulary: Mapping[str, int], fields: Json, size: int) -> list[str]:
    """Returns the tokens with an id of `size` or more, in the order of their ids.

    Args:
      vocabulary: the ids by token, added tokens included.
      fields: the fields of tokenizer.json.
      size: the number of ids that remain.

    Raises:
      ValueError: one of these tokens is in the model's own vocabulary, or the number of these tokens is above MOST or
        above 1 % of `size`.
    """
    beyond = sorted((i, token) for token, i in vocabulary.items() if i >= size)
    vocabulary_of_model = model_tokens(fields)
    for number, token in beyond:
        if token in vocabulary_of_model:
            raise ValueError(
                f"{untrusted.printable(token)} with id {number} is in the model's vocabulary; only added tokens can be removed"
            )
    most = min(MOST, size // SHARE)
    if len(beyond) > most:
        raise ValueError(
            f"{len(beyond)} added tokens have an id of {size} or more; at most {most} can be removed, which is 1 % of {size} "
            f"and at most {MOST}"
        )
    return [token for _, token in beyond]


def without(files: dict[str, bytes], tokens: set[str]) -> dict[str, bytes]:
    """Returns a tokenizer's files without the given added tokens. Files that name none of the tokens keep their bytes.

    Args:
      files: the contents of the files by name, each valid as `Tokenizer.load` checks it.
      tokens: the texts of the tokens that are removed.
    """
    changed = dict(files)
    for name, content in files.items():
        if not name.endswith(".json"):
            continue
        fields = untrusted.parse_json(content, name)
        remaining = _without_listed(fields, tokens) if name == TOKENIZER else _without_named(fields, tokens)
        if name == ADDED:
            remaining = {token: number for token, number in fields.items() if token not in tokens}
        if remaining != fields:
            changed[name] = json.dumps(remaining, ensure_ascii=False, indent=None if name == TOKENIZER else 2).encode()
    return changed


def shown_difference(different: Sequence[tuple[str, int | None, int | None]], who: str) -> str:
    """Returns a phrase with the number of differing tokens, and with the first five tokens and the ids of each.

    Args:
      different: the tokens that differ, as `differing_tokens` returns them.
      who: the other owner of a vocabulary besides the run, such as "teacher".

    Example:
      >>> shown_difference([("b", 1, None)], "teacher")
      "1 token differs: 'b' has id 1 in the run's and no id in the teacher's"
    """
    as_id = lambda number: "no id" if number is None else f"id {number}"
    first = "; ".join(
        f"{untrusted.printable(token)} has {as_id(ours)} in the run's and {as_id(theirs)} in the {who}'s"
        for token, ours, theirs in different[:SHOWN]
    )
    count = "1 token differs" if len(different) == 1 else f"{len(different)} tokens differ"
    return f"{count}: {first}{'; ...' if len(different) > SHOWN else ''}"


def shown_tokens(tokens: Sequence[str]) -> str:
    """Returns a phrase that names at most five tokens.

    Example:
      >>> shown_tokens(["<a>", "<b>"])
      "the added tokens '<a>', '<b>'"
    """
    more = "" if len(tokens) <= SHOWN else f" and {len(tokens) - SHOWN} more"
    noun = "the added token" if len(tokens) == 1 else "the added tokens"
    return f"{noun} {', '.join(map(untrusted.printable, tokens[:SHOWN]))}{more}"


def _without_listed(fields: Json, tokens: set[str]) -> Json:
    """Removes the tokens from the added tokens and from the padding of tokenizer.json."""
    remaining = fields | {"added_tokens": [t for t in fields.get("added_tokens") or () if t["content"] not in tokens]}
    padding = fields.get("padding")
    if isinstance(padding, dict) and padding.get("pad_token") in tokens:
        remaining["padding"] = None
    return remaining


def _without_named(fields: Json, tokens: set[str]) -> Json:
    """Removes the tokens wherever tokenizer_config.json or special_tokens_map.json names them."""

    def is_removed(token: Token) -> bool:
        return (token.get("content") if isinstance(token, dict) else token) in tokens

    remaining: Json = {}
    for key, value in fields.items():
        if key in KINDS and value is not None and is_removed(value):
            remaining[key] = None  # a missing key would be filled with the default of the tokenizer's class
        elif key.endswith("_token") and isinstance(value, str | dict) and is_removed(value):
            continue
        elif key in ("additional_special_tokens", "extra_special_tokens") and isinstance(value, list):
            remaining[key] = [token for token in value if not is_removed(token)]
        elif key in ("extra_special_tokens", "model_specific_special_tokens", "added_tokens_decoder"):
            remaining[key] = {name: token for name, token in (value or {}).items() if not is_removed(token)}
        else:
            remaining[key] = value
    return remaining
