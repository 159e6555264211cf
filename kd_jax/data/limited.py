"""Removal of a tokenizer's last added tokens, for two models whose tokenizers differ in a few of them.

Qwen2.5 has 151,665 ids. Qwen3 has the same ids and four more added tokens. A run with both models uses the common ids.
The other tokens must not be found in texts: one of the models has never seen their ids, or has no embedding for them.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from kd_jax.data.special_tokens import KINDS, model_tokens
from kd_jax.storage import untrusted

MOST = 1024  # the largest number of tokens that may be removed
SHARE = 100  # ids kept per removed token: tokenizers that differ in over 1 % are too different

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
    found = [(token, number, theirs.get(token)) for token, number in ours.items() if theirs.get(token) != number]
    found += [(token, None, number) for token, number in theirs.items() if token not in ours]
    return sorted(found, key=lambda row: (row[2] if row[1] is None else row[1], row[0]))


def tokens_beyond(vocabulary: Mapping[str, int], fields: dict[str, Any], size: int) -> list[str]:
    """Returns the tokens with an id of `size` or more, in the order of their ids.

    Args:
      vocabulary: the ids by token, added tokens included.
      fields: the fields of tokenizer.json.
      size: the number of ids that are kept.
    Raises:
      ValueError: one of these tokens is in the model's own vocabulary, or there are more than MOST of them, or more
        than 1 % of `size`.
    """
    found = sorted((i, token) for token, i in vocabulary.items() if i >= size)
    own = model_tokens(fields)
    for number, token in found:
        if token in own:
            raise ValueError(
                f"{untrusted.shown(token)} with id {number} is in the model's vocabulary; only added tokens can be left out"
            )
    most = min(MOST, size // SHARE)
    if len(found) > most:
        raise ValueError(
            f"{len(found)} added tokens have an id of {size} or more; at most {most} can be left out, which is 1 % of {size} and "
            f"at most {MOST}"
        )
    return [token for _, token in found]


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
        left = _without_listed(fields, tokens) if name == TOKENIZER else _without_named(fields, tokens)
        if name == ADDED:
            left = {token: number for token, number in fields.items() if token not in tokens}
        if left != fields:
            changed[name] = json.dumps(left, ensure_ascii=False, indent=None if name == TOKENIZER else 2).encode()
    return changed


def shown_difference(different: Sequence[tuple[str, int | None, int | None]], who: str) -> str:
    """Returns the number of differing tokens, and the first five of them with their ids.

    Example:
      >>> shown_difference([("b", 1, None)], "teacher")
      "1 token differs: 'b' has id 1 in the run's and no id in the teacher's"
    """
    as_id = lambda number: "no id" if number is None else f"id {number}"
    first = "; ".join(
        f"{untrusted.shown(token)} has {as_id(ours)} in the run's and {as_id(theirs)} in the {who}'s"
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
    return f"{noun} {', '.join(map(untrusted.shown, tokens[:SHOWN]))}{more}"


def _without_listed(fields: dict[str, Any], tokens: set[str]) -> dict[str, Any]:
    left = fields | {"added_tokens": [t for t in fields.get("added_tokens") or () if t["content"] not in tokens]}
    padding = fields.get("padding")
    if isinstance(padding, dict) and padding.get("pad_token") in tokens:
        left["padding"] = None
    return left


def _without_named(fields: dict[str, Any], tokens: set[str]) -> dict[str, Any]:
    """Removes the tokens wherever tokenizer_config.json or special_tokens_map.json names them."""
    goes = lambda token: (token.get("content") if isinstance(token, dict) else token) in tokens
    left: dict[str, Any] = {}
    for key, value in fields.items():
        if key in KINDS and value is not None and goes(value):
            left[key] = None  # a missing key would be filled with the default of the tokenizer's class
        elif key.endswith("_token") and isinstance(value, str | dict) and goes(value):
            continue
        elif key in ("additional_special_tokens", "extra_special_tokens") and isinstance(value, list):
            left[key] = [token for token in value if not goes(token)]
        elif key in ("extra_special_tokens", "model_specific_special_tokens", "added_tokens_decoder"):
            left[key] = {name: token for name, token in (value or {}).items() if not goes(token)}
        else:
            left[key] = value
    return left
