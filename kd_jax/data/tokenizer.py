"""Text to ids and back: a Hugging Face folder's tokenizer.json, read by the tokenizers library."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


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
        backend: tokenizers.Tokenizer,
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
          ValueError: no tokenizer.json, one that cannot be read, or no end token anywhere.
        """
        folder = Path(folder).expanduser()
        path = folder / "tokenizer.json"
        if not path.exists():
            raise ValueError(f"{folder} has no tokenizer.json; save the tokenizer there in its fast form.")
        if "model" not in _read(path):
            raise ValueError(f"{path} has no field 'model': it is not a tokenizer's file.")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises no narrower one
            raise ValueError(f"{path} cannot be read as a tokenizer: {error}.") from error
        backend.no_padding()
        backend.no_truncation()
        named = _read(folder / "tokenizer_config.json")
        ids = _read(folder / "config.json") | _read(folder / "generation_config.json")
        settings: dict[str, Any] = {}
        for kind in ("bos", "eos", "pad"):
            token = named.get(f"{kind}_token")
            token = token["content"] if isinstance(token, dict) else token
            number = backend.token_to_id(token) if token else None
            if token and number is None:
                where = folder / "tokenizer_config.json"
                raise ValueError(f"{where}: the {kind}_token {token!r} is not in the vocabulary of tokenizer.json.")
            if f"{kind}_token" not in named or (kind == "eos" and not token):
                number = ids.get(
                    f"{kind}_token_id"
                )  # as GPT-2's folder has it; a bos_token of null says that there is none
            number = number[0] if isinstance(number, list) else number
            settings |= {
                f"{kind}_id": number,
                f"{kind}_token": "" if number is None else backend.id_to_token(number) or "",
            }
        if settings["eos_id"] is None:
            raise ValueError(
                f"{folder} names no end token: set eos_token in tokenizer_config.json or eos_token_id in config.json; "
                f"without one a response has no end."
            )
        template = folder / "chat_template.jinja"
        chat = template.read_text() if template.exists() else named.get("chat_template")
        if isinstance(chat, list):  # several, by name
            chat = next((entry["template"] for entry in chat if entry["name"] == "default"), None)
        files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).exists()}
        return cls(backend, folder, settings, chat, files)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Ids of a text; special tokens are what the tokenizer's own post-processor adds."""
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = False) -> list[list[int]]:
        """Ids of many texts, on all cores."""
        return [e.ids for e in self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ids."""
        return self._backend.decode([int(token) for token in ids], skip_special_tokens=skip_special_tokens)

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


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a JSON object.")
    return content
