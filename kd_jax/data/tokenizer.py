"""Text to ids and back: a Hugging Face folder's tokenizer.json, read by the tokenizers library."""

import contextlib
import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from kd_jax import untrusted
from kd_jax.data import limited, special_tokens
from kd_jax.data.tokenizer_json import added_tokens, check_ids, named_errors, read_backend, read_fields, with_added

# The largest tokenizer.json in use, Gemma's, has 33 MB.
FILES = {
    "tokenizer.json": 128 * untrusted.MIB,
    "tokenizer_config.json": 8 * untrusted.MIB,
    "special_tokens_map.json": 8 * untrusted.MIB,
    "added_tokens.json": 8 * untrusted.MIB,
    "chat_template.jinja": untrusted.MIB,
}
TOKEN_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
NAMING = TOKEN_FILES[:2]  # the files that name the end token


class Tokenizer:
    """A tokenizer and its special ids.

    Attributes:
      vocab_size: the largest id plus one.
      eos_id: the end token that is written after a response, so that a model learns it.
      end_ids: every token that ends a response; the first one is `eos_id`.
      bos_id: begins a text, or None.
      eos_token, bos_token: the folder's end and first token as text, "" for none.
      special_tokens: the special tokens that the folder names, by the names that a chat template reads, such as pad_token.
      pad_id: fills rows; the folder's end token where the folder names no padding.
      prefix_ids: the tokens that the post-processor puts before a text, such as a bos. What it puts after a text is never used:
        an end token there would stand between a prompt and its response.
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
        own = {"bos_token": self.bos_token, "eos_token": self.eos_token}
        self.special_tokens = settings["named"] | {name: token for name, token in own.items() if token}
        self.pad_id = self.eos_id if settings["pad_id"] is None else settings["pad_id"]
        self._added = {backend.token_to_id(token) for token in settings["added"]}
        self.end_ids: tuple[int, ...] = (self.eos_id,)
        self.prefix_ids = self._find_prefix()

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Reads tokenizer.json, and beside it the special tokens and the chat template.

        The special tokens are those that transformers finds (`special_tokens.resolve`). Where no file of the tokenizer names
        one, the model's config.json and generation_config.json do.

        Raises:
          ValueError: no such folder, no tokenizer.json, one that cannot be read, no end token anywhere, or a special token for which
            the model has no id.
        """
        folder = Path(folder).expanduser()
        untrusted.check_folder(folder)
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
        settings: dict[str, Any] = {"added": added_tokens(fields), "named": {k: v for k, v in tokens.items() if v}}
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
        return tokenizer.with_ends(tokenizer.eos_id, _as_ids(ids.get("eos_token_id")))

    def with_ends(self, eos_id: int, others: Iterable[int] = ()) -> "Tokenizer":
        """Returns the same tokenizer with another trained end, and with more ends.

        Args:
          eos_id: the token that is written after a response.
          others: more tokens that end a response. Ids that the tokenizer does not have are ignored: no text contains them.
        """
        changed = copy.copy(self)
        known = [number for number in (*self.end_ids, *others) if 0 <= number < self.vocab_size]
        changed.eos_id, changed.end_ids = eos_id, tuple(dict.fromkeys((eos_id, *known)))
        return changed

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
        return found.with_ends(self.eos_id, self.end_ids)

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
        self._check_known(rows)
        return rows

    def _check_known(self, rows: Iterable[list[int]]) -> None:
        if (largest := max((max(ids) for ids in rows if ids), default=0)) >= self.vocab_size:
            raise ValueError(
                f"{self.folder}: tokenizer.json gives the id {largest}, and its tokens have ids below {self.vocab_size}."
            )

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """Returns the ids of prompts and of the responses that follow them, each pair encoded as one text.

        Encoded apart, a response would begin as a text begins: SentencePiece-like tokenizers put a "▁" there. The text is split
        before the token that holds the response's first character, so that a token with characters of both belongs to the
        response. No special token is added.

        Args:
          pairs: (rendered prompt, response).

        Raises:
          ValueError: as in `encode_batch`.
        """
        with self._named("encode"):
            encoded = self._backend.encode_batch([prompt + text for prompt, text in pairs], add_special_tokens=False)
        self._check_known(encoding.ids for encoding in encoded)
        rows = []
        for (prompt, _), encoding in zip(pairs, encoded, strict=True):
            begin = len(prompt)
            split = next((i for i, (_, end) in enumerate(encoding.offsets) if end > begin), len(encoding.ids))
            rows.append((encoding.ids[:split], encoding.ids[split:]))
        return rows

    def encode_offsets(self, text: str) -> list[tuple[int, int]]:
        """Returns where each token of a text begins and ends, in characters."""
        with self._named("encode"):
            return self._backend.encode_batch([text], add_special_tokens=False)[0].offsets

    def begins_with_prefix(self, ids: Sequence[int]) -> bool:
        """Whether a text has, as text, the tokens that the post-processor would put before it."""
        return bool(self.prefix_ids) and tuple(ids[: len(self.prefix_ids)]) == self.prefix_ids

    def strip_ends(self, ids: Sequence[int]) -> list[int]:
        """Returns a response without the end tokens after it."""
        length = len(ids)
        while length and ids[length - 1] in self.end_ids:
            length -= 1
        return list(ids[:length])

    def with_prefix(self, ids: list[int]) -> list[int]:
        """Returns a text's ids with `prefix_ids` before them, unless the text begins with these tokens itself."""
        return ids if self.begins_with_prefix(ids) else [*self.prefix_ids, *ids]

    def _find_prefix(self) -> tuple[int, ...]:
        """Returns what the post-processor puts before the first of these texts that has a token."""
        for text in ("a", "0", " ", "."):
            bare, whole = (self.encode(text, special) for special in (False, True))
            if bare:
                starts = (i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare)
                return tuple(whole[: next(starts, 0)])
        return ()

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ids."""
        with self._named("decode"):
            return self._backend.decode([int(token) for token in ids], skip_special_tokens=skip_special_tokens)

    def _named(self, what: str) -> contextlib.AbstractContextManager[None]:
        return named_errors(f"{self.folder}: tokenizer.json cannot {what} this")

    def fingerprint(self) -> str:
        """A hash of all that decides the ids of a row: the tokenizer itself, its first token and the end that is trained."""
        what = self._backend.to_str() + str((self.bos_id, self.eos_id))
        return hashlib.sha256(what.encode()).hexdigest()[:12]

    def shown(self, number: int) -> str:
        """Returns an id and its token, as a message can quote them."""
        with self._named("name"):
            return f"{number} ({untrusted.shown(self._backend.id_to_token(number))})"

    def is_added(self, number: int) -> bool:
        """Whether an id is that of an added token, such as a control token, and not of the model's own vocabulary."""
        return number in self._added

    def vocabulary(self) -> dict[str, int]:
        """Token -> id, added tokens included."""
        return self._backend.get_vocab(with_added_tokens=True)

    def save(self, folder: str | Path) -> None:
        """Writes the files that it was loaded from. They are unchanged, unless they name another end token than `eos_id`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, content in (self._files | self._files_with_end()).items():
            (Path(folder) / name).write_bytes(content)

    def _files_with_end(self) -> dict[str, bytes]:
        """Returns the files in which `eos_id` has to be named as the end token, and is not."""
        with self._named("name the end token of"):
            token = self._backend.id_to_token(self.eos_id)
        if token == self.eos_token:
            return {}
        named = {"tokenizer_config.json": b"{}"} | {name: self._files[name] for name in NAMING if name in self._files}
        changed = {name: json.loads(content) for name, content in named.items()}
        for fields in changed.values():
            before = fields.get("eos_token")
            fields["eos_token"] = before | {"content": token} if isinstance(before, dict) else token
        return {name: (json.dumps(fields, indent=2) + "\n").encode() for name, fields in changed.items()}


def _as_ids(found: Any) -> list[int]:
    """Returns a field that has an id, a list of ids, or nothing, as a list."""
    found = found if isinstance(found, list) else [found]
    return [number for number in found if isinstance(number, int) and not isinstance(number, bool)]


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
