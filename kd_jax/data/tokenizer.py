"""Text to ids and back: a Hugging Face folder's tokenizer.json, read by the tokenizers library."""

import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_jax import untrusted
from kd_jax.data.tokenizer_json import check_ids, named_errors, read_backend

# The largest tokenizer.json in use, Gemma's, has 33 MB.
FILES = {
    "tokenizer.json": 128 * untrusted.MIB,
    "tokenizer_config.json": 8 * untrusted.MIB,
    "special_tokens_map.json": 8 * untrusted.MIB,
    "chat_template.jinja": untrusted.MIB,
}


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

        Raises:
          ValueError: no such folder, no tokenizer.json, one that cannot be read, or no end token anywhere.
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
        backend = read_backend(path, files["tokenizer.json"])
        where = folder / "tokenizer_config.json"
        named = _read(where)
        ids = _read(folder / "config.json") | _read(folder / "generation_config.json")
        settings: dict[str, Any] = {}
        for kind in ("bos", "eos", "pad"):
            token = _special_token(named, kind, where)
            with named_errors(f"{where}: the {kind}_token"):
                number = backend.token_to_id(token) if token else None
            if token and number is None:
                raise ValueError(
                    f"{where}: the {kind}_token {untrusted.shown(token)} is not in the vocabulary of tokenizer.json."
                )
            if f"{kind}_token" not in named or (kind == "eos" and not token):
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
        return cls(backend, folder, settings, _chat_template(folder, named), files)

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


def _special_token(named: dict[str, Any], kind: str, where: Path) -> str | None:
    token = named.get(f"{kind}_token")
    token = token.get("content") if isinstance(token, dict) else token
    if token is not None and not isinstance(token, str):
        raise ValueError(f"{where}: the {kind}_token is {untrusted.shown(token)}; expected a text.")
    return token


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
