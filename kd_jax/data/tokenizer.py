"""Text to ids and back: a Hugging Face folder's tokenizer.json, read by the tokenizers library."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from kd_jax import untrusted
from kd_jax.data import limited, special_tokens
from kd_jax.data.tokenizer_json import check_ids, named_errors, read_backend, read_fields, with_added

# The largest tokenizer.json in use, Gemma's, has 33 MB.
FILES = {
    "tokenizer.json": 128 * untrusted.MIB,
    "tokenizer_config.json": 8 * untrusted.MIB,
    "special_tokens_map.json": 8 * untrusted.MIB,
    "added_tokens.json": 8 * untrusted.MIB,
    "chat_template.jinja": untrusted.MIB,
}
TOKEN_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


class Tokenizer:
    """A tokenizer and its special ids.

    Attributes:
      vocab_size: the largest id plus one.
      eos_id: ends a response.
      bos_id: begins a text, or None.
      eos_token, bos_token: the two as text, "" for none.
      pad_id: fills rows; the end token where the folder names none.
      chat_template: Jinja, or None.
      folder: where it was loaded from.
    """

    _models: tuple[dict[str, Any], ...]  # config.json and generation_config.json beside it

    def __init__(
        self,
        backend: Any,
        folder: Path,
        settings: dict[str, Any],
        chat_template: str | None,
        files: dict[str, bytes],
    ):
        self._backend, self.folder, self.chat_template, self._files = backend, folder, chat_template, files
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.eos_token, self.bos_token = settings["eos_token"], settings["bos_token"]
        self.eos_id, self.bos_id = settings["eos_id"], settings["bos_id"]
        self.pad_id = self.eos_id if settings["pad_id"] is None else settings["pad_id"]

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Reads tokenizer.json, and beside it the special tokens and the chat template.

        The special tokens are those that transformers finds (`special_tokens.resolve`). Where no file of the tokenizer names
        one, the model's config.json and generation_config.json do.

        Raises:
          ValueError: no tokenizer.json, one that cannot be read, no end token anywhere, or a special token for which the
            model has no id.
        """
        folder = Path(folder).expanduser()
        path = folder / "tokenizer.json"
        if not path.exists():
            raise ValueError(f"{folder} has no tokenizer.json; save the tokenizer there in its fast form.")
        files = {
            name: untrusted.read_bytes(folder / name, limit)
            for name, limit in FILES.items()
            if (folder / name).exists()
        }
        models = tuple(_read(folder / name) for name in ("config.json", "generation_config.json"))
        return cls._of(folder, files, models, partial(_chat_template, folder))

    @classmethod
    def _of(
        cls,
        folder: Path,
        files: dict[str, bytes],
        models: tuple[dict[str, Any], ...],
        chat_template: Callable[[dict[str, Any]], str | None],
    ) -> "Tokenizer":
        """Makes a tokenizer of its files' content.

        Args:
          folder: for the messages.
          files: name -> content.
          models: config.json and generation_config.json beside them.
          chat_template: tokenizer_config.json -> the template.
        """
        model, ids = models[0], models[0] | models[1]
        fields = read_fields(folder / "tokenizer.json", files["tokenizer.json"])
        named, special_map, more = (_parsed(files, folder, name) for name in TOKEN_FILES)
        found = special_tokens.Files(folder, fields, named, special_map, more, model.get("model_type"))
        tokens, added = special_tokens.resolve(found)
        content = files["tokenizer.json"]
        if added:
            fields = with_added(fields, added)
            content = json.dumps(fields).encode()
        backend = read_backend(folder / "tokenizer.json", content, fields)
        _check_room(backend, found, tokens, model)
        settings: dict[str, Any] = {}
        for kind in ("bos", "eos", "pad"):
            token = tokens.get(f"{kind}_token")
            with named_errors(f"{found.where(f'{kind}_token')}: the {kind}_token"):
                number = backend.token_to_id(token) if token else None
            if f"{kind}_token" not in tokens or (kind == "eos" and not token):
                # As GPT-2's folder has it; a bos_token of null says that there is none.
                number = ids.get(f"{kind}_token_id")
            number = number[0] if isinstance(number, list) and number else number
            if number == -1 and kind == "pad":  # what the first Llama folders write for none
                number = None
            check_ids(backend, () if number is None else (number,), f"{folder}: {kind}_token_id")
            settings |= {
                f"{kind}_id": number,
                f"{kind}_token": "" if number is None else backend.id_to_token(number) or "",
            }
        if settings["eos_id"] is None:
            raise ValueError(
                f"{folder} names no end token: set eos_token in tokenizer_config.json or eos_token_id in config.json; "
                f"without one a response has no end."
            )
        tokenizer = cls(backend, folder, settings, chat_template(named), files)
        tokenizer._models = models
        return tokenizer

    def limited(self, size: int) -> "Tokenizer":
        """Returns this tokenizer without its added tokens of id `size` or more, which it then finds in no text.

        Args:
          size: ids that stay.
        Raises:
          ValueError: what has such an id is no added token, or not rare (`limited.tokens_beyond`), or ends, begins or pads a
            text.
        """
        if size >= self.vocab_size:
            return self
        gone = self.tokens_beyond(size)
        for kind in ("eos", "bos", "pad"):
            number = getattr(self, f"{kind}_id")
            if number is not None and number >= size:
                token = untrusted.shown(self._backend.id_to_token(number))
                raise ValueError(
                    f"{self.folder}: the {kind}_token {token} has the id {number}; it must be below {size}."
                )
        left = limited.without(self._files, set(gone))
        found = self._of(self.folder, left, self._models, lambda named: self.chat_template)
        if found.vocabulary() != {token: i for token, i in self.vocabulary().items() if i < size}:
            raise ValueError(
                f"{self.folder}: without its {len(gone)} last added tokens, other tokens change their ids."
            )
        found.encode("", add_special_tokens=True)  # refuses a post-processor with an id that is gone
        return found

    def tokens_beyond(self, size: int) -> list[str]:
        """Returns the added tokens of id `size` or more.

        Raises:
          ValueError: as `limited.tokens_beyond`.
        """
        if size >= self.vocab_size:
            return []
        fields = read_fields(self.folder / "tokenizer.json", self._files["tokenizer.json"])
        with named_errors(str(self.folder)):
            return limited.tokens_beyond(self.vocabulary(), fields, size)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Ids of a text; special tokens are what the tokenizer's own post-processor adds."""
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = False) -> list[list[int]]:
        """Ids of many texts, on all cores.

        Raises:
          ValueError: the tokenizer fails on a text, or gives an id that is none of its own.
        """
        with self._named("encode"):
            encoded = self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        rows = [encoding.ids for encoding in encoded]
        if (largest := max((max(ids) for ids in rows if ids), default=0)) >= self.vocab_size:
            raise ValueError(
                f"{self.folder}: tokenizer.json gives the id {largest}, and its tokens have ids below {self.vocab_size}."
            )
        return rows

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ids."""
        with self._named("decode"):
            return self._backend.decode([int(token) for token in ids], skip_special_tokens=skip_special_tokens)

    def _named(self, what: str) -> contextlib.AbstractContextManager[None]:
        return named_errors(f"{self.folder}: tokenizer.json cannot {what} this")

    def fingerprint(self) -> str:
        """Of all that decides the ids of a text: the tokenizer itself, its first and its end token."""
        what = self._backend.to_str() + str((self.bos_id, self.eos_id))
        return hashlib.sha256(what.encode()).hexdigest()[:12]

    def vocabulary(self) -> dict[str, int]:
        """Token -> id, added tokens included."""
        return self._backend.get_vocab(with_added_tokens=True)

    def save(self, folder: str | Path) -> None:
        """Writes the files it was loaded from, unchanged, so that what opens the one folder opens the other."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            (Path(folder) / name).write_bytes(content)


def differing_tokens(ours: Mapping[str, int], theirs: Mapping[str, int]) -> list[tuple[str, int | None, int | None]]:
    """Tokens that two vocabularies number differently, or that only one of them has, in the order of their ids.

    Args:
      ours: token -> id.
      theirs: token -> id.
    Returns:
      (token, its id in `ours`, its id in `theirs`) for each such token; None where the vocabulary lacks the token.

    Example:
      >>> differing_tokens({"a": 0, "b": 1, "c": 2}, {"a": 0, "b": 2, "d": 3})
      [('b', 1, 2), ('c', 2, None), ('d', None, 3)]
    """
    found = [(token, number, theirs.get(token)) for token, number in ours.items() if theirs.get(token) != number]
    found += [(token, None, number) for token, number in theirs.items() if token not in ours]
    return sorted(found, key=lambda row: (row[2] if row[1] is None else row[1], row[0]))


def _read(path: Path) -> dict[str, Any]:
    return untrusted.read_json(path, FILES["tokenizer_config.json"]) if path.exists() else {}


def _parsed(files: dict[str, bytes], folder: Path, name: str) -> dict[str, Any]:
    found = untrusted.parse_json(files.get(name, b"{}"), str(folder / name))
    if not isinstance(found, dict):
        raise ValueError(f"{folder / name}: expected a JSON object, found {type(found).__name__}.")
    return found


def _check_room(
    backend: Any, files: special_tokens.Files, tokens: dict[str, str | None], model: dict[str, Any]
) -> None:
    """Checks that the model beside the tokenizer has an id for a special token that tokenizer.json lacks.

    Without a config.json there is no model to check; what loads one compares the sizes.
    """
    own, size = special_tokens.own_tokens(files.tokenizer), model.get("vocab_size")
    for kind in ("bos_token", "eos_token", "pad_token"):
        token = tokens.get(kind)
        if not model or token is None or token in own:
            continue
        with named_errors(f"{files.where(kind)}: the {kind}"):
            number = backend.token_to_id(token)
        if not isinstance(size, int) or number is None or number >= size:
            raise ValueError(
                f"{files.where(kind)}: the {kind} {untrusted.shown(token)} is not in the vocabulary of tokenizer.json. It would "
                f"get the id {number}, and config.json's vocab_size is {untrusted.shown(size)}: name a token that the model has."
            )


def _chat_template(folder: Path, named: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.exists():
        return untrusted.read_text(file, FILES[file.name])
    chat = named.get("chat_template")
    if isinstance(chat, list):  # several, by name
        chat = next(
            (entry.get("template") for entry in chat if isinstance(entry, dict) and entry.get("name") == "default"),
            None,
        )
    if chat is not None and not isinstance(chat, str):
        raise ValueError(f"{folder / 'tokenizer_config.json'}: the chat_template is no text: {untrusted.shown(chat)}.")
    return chat
