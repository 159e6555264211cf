"""The tokenizer of a Hugging Face folder: its tokenizer.json, read by the tokenizers library."""

import contextlib
import copy
import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers

from kd_jax.data import limited, tokenizer_folder
from kd_jax.data.tokenizer_json import named_errors, read_fields
from kd_jax.storage import hub, untrusted
from kd_jax.storage.checksum import digest
from kd_jax.storage.files import Json

NAMING = ("tokenizer_config.json", "special_tokens_map.json")  # the files that can name the end token


class Tokenizer:
    """A tokenizer and its special ids.

    Attributes:
      vocab_size: the largest id plus one.
      eos_id: the end token that is written after a response, so that a model learns it.
      end_ids: all tokens that end a response; the first one is `eos_id`.
      bos_id: the token that begins a text, or None.
      eos_token, bos_token: the folder's end token and first token as text; "" for none.
      special_tokens: the special tokens that the folder names, by the variable names of a chat template, such as
        pad_token.
      pad_id: the token that fills rows; the folder's end token if the folder names no padding token.
      prefix_ids: the tokens that the post-processor puts before a text, such as a bos. Tokens after a text are never
        used, because an end token would stand between a prompt and its response.
      chat_template: the Jinja chat template, or None.
      folder: the folder from which the tokenizer was loaded.
    """

    def __init__(self, content: tokenizer_folder.Folder):
        """Makes a tokenizer from a folder's content.

        Raises:
          ValueError: the content is invalid, as in `tokenizer_folder.resolve`.
        """
        self._content, self.folder = content, content.path
        self._backend, special = tokenizer_folder.resolve(content)
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        self.eos_id, self.bos_id, self.pad_id = special.eos_id, special.bos_id, special.pad_id
        self.chat_template, self.special_tokens, self._added = special.chat_template, special.named, special.added
        self.eos_token, self.bos_token = (special.named.get(name, "") for name in ("eos_token", "bos_token"))
        self.end_ids = self._with_known(self.eos_id, special.ends)
        self.prefix_ids = self._find_prefix()

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Reads tokenizer.json, the special tokens and the chat template of a folder, or of an address hf://ORG/NAME.

        Raises:
          ValueError: the folder is invalid, as in `tokenizer_folder.read` and `tokenizer_folder.resolve`.
        """
        return cls(tokenizer_folder.read(hub.model(folder, weights=False)))

    def with_ends(self, eos_id: int, others: Iterable[int] = ()) -> "Tokenizer":
        """Returns a copy of the tokenizer with another trained end token, and with more end tokens.

        Args:
          eos_id: the token that is written after a response.
          others: more tokens that end a response. Ids that the tokenizer does not have are ignored, since no text
            contains them.
        """
        changed = copy.copy(self)
        changed.eos_id, changed.end_ids = eos_id, self._with_known(eos_id, (*self.end_ids, *others))
        return changed

    def _with_known(self, eos_id: int, others: Iterable[int]) -> tuple[int, ...]:
        return tuple(dict.fromkeys((eos_id, *(number for number in others if 0 <= number < self.vocab_size))))

    def limited(self, size: int) -> "Tokenizer":
        """Returns this tokenizer without the added tokens of id `size` or more. No text then contains these tokens.

        Args:
          size: the number of ids that remain.

        Raises:
          ValueError: a token with such an id is not an added token, or is the end, first or padding token. Or there are
            too many such tokens (`limited.tokens_beyond`), or other tokens would change their ids.
        """
        if size >= self.vocab_size:
            return self
        removed = self.tokens_beyond(size)
        for kind in ("eos", "bos", "pad"):
            number = getattr(self, f"{kind}_id")
            if number is not None and number >= size:
                token = untrusted.printable(self._backend.id_to_token(number))
                raise ValueError(
                    f"{self.folder}: the {kind}_token {token} has the id {number}; it must be below {size}."
                )
        files = limited.without(self._content.files, set(removed))
        smaller = Tokenizer(dataclasses.replace(self._content, files=files))
        if smaller.vocabulary() != {token: i for token, i in self.vocabulary().items() if i < size}:
            raise ValueError(
                f"{self.folder}: without the last {len(removed)} added tokens, other tokens change their ids."
            )
        smaller.encode("", add_special_tokens=True)  # refuses a post-processor that uses a removed id
        return smaller.with_ends(self.eos_id, self.end_ids)

    def tokens_beyond(self, size: int) -> list[str]:
        """Returns the added tokens of id `size` or more.

        Raises:
          ValueError: the tokens cannot be removed, as in `limited.tokens_beyond`.
        """
        if size >= self.vocab_size:
            return []
        fields = read_fields(self.folder / "tokenizer.json", self._content.files["tokenizer.json"])
        with named_errors(str(self.folder)):
            return limited.tokens_beyond(self.vocabulary(), fields, size)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Returns the ids of a text.

        Args:
          text: the text.
          add_special_tokens: True to add the special tokens of the tokenizer's post-processor.
        """
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = False) -> list[list[int]]:
        """Returns the ids of many texts, which are encoded on all cores.

        Args:
          texts: the texts.
          add_special_tokens: the argument of `encode`.

        Raises:
          ValueError: the tokenizer fails on a text, or returns an id that is outside its vocabulary.
        """
        with self._named("encode"):
            encoded = self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        rows = [encoding.ids for encoding in encoded]
        self._check_known(rows)
        return rows

    def _check_known(self, rows: Iterable[list[int]]) -> None:
        if (largest := max((max(ids) for ids in rows if ids), default=0)) >= self.vocab_size:
            raise ValueError(
                f"{self.folder}: tokenizer.json gives the id {largest}; expected ids below {self.vocab_size}."
            )

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """Returns the ids of prompts and of their responses. Each pair is encoded as one text.

        A response that is encoded alone would begin as a text begins: tokenizers such as SentencePiece would add a "▁".
        The text is split before the token that holds the response's first character. So a token with characters of
        prompt and response belongs to the response. No special token is added.

        Args:
          pairs: the pairs of (rendered prompt, response).

        Raises:
          ValueError: the tokenizer fails, as in `encode_batch`.
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

    def encode_offsets(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Returns the ids of each text, and for each id its first character and the one after its last character."""
        with self._named("encode"):
            encoded = self._backend.encode_batch(list(texts), add_special_tokens=False)
        self._check_known(encoding.ids for encoding in encoded)
        return [(encoding.ids, encoding.offsets) for encoding in encoded]

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """The tokenizer of the tokenizers library."""
        return self._backend

    def token_ends(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the end position of each token of each text, in characters."""
        with self._named("encode"):
            encoded = self._backend.encode_batch(list(texts), add_special_tokens=False)
        return [[end for _, end in encoding.offsets] for encoding in encoded]

    def begins_with_prefix(self, ids: Sequence[int]) -> bool:
        """Returns True if the ids of a text already begin with `prefix_ids`."""
        return bool(self.prefix_ids) and tuple(ids[: len(self.prefix_ids)]) == self.prefix_ids

    def strip_ends(self, ids: Sequence[int]) -> list[int]:
        """Returns a response without the end tokens after it."""
        length = len(ids)
        while length and ids[length - 1] in self.end_ids:
            length -= 1
        return list(ids[:length])

    def with_prefix(self, ids: list[int]) -> list[int]:
        """Returns a text's ids with `prefix_ids` before them, unless the text already begins with these tokens."""
        return ids if self.begins_with_prefix(ids) else [*self.prefix_ids, *ids]

    def _find_prefix(self) -> tuple[int, ...]:
        """Returns the tokens that the post-processor puts before a text.

        The function uses the first of a few test texts that has a token.
        """
        for text in ("a", "0", " ", "."):
            bare, with_special = (self.encode(text, special) for special in (False, True))
            if bare:
                last = len(with_special) - len(bare)
                starts = (i for i in range(last + 1) if with_special[i : i + len(bare)] == bare)
                return tuple(with_special[: next(starts, 0)])
        return ()

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Returns the text of ids.

        Args:
          ids: the token ids.
          skip_special_tokens: True to omit special tokens from the text.
        """
        with self._named("decode"):
            return self._backend.decode([int(token) for token in ids], skip_special_tokens=skip_special_tokens)

    def _named(self, action: str) -> contextlib.AbstractContextManager[None]:
        return named_errors(f"{self.folder}: tokenizer.json cannot {action} this")

    def fingerprint(self) -> str:
        """Returns a hash of everything that decides the ids of a row.

        The hash covers the tokenizer of the library, the first token and the trained end token.
        """
        return digest(self._backend.to_str() + str((self.bos_id, self.eos_id)))[:12]

    def describe_id(self, number: int) -> str:
        """Returns an id and its token, in a form that a message can quote."""
        with self._named("name"):
            return f"{number} ({untrusted.printable(self._backend.id_to_token(number))})"

    def is_added(self, number: int) -> bool:
        """Returns True if an id belongs to an added token, such as a control token.

        The ids of the model's own vocabulary give False.
        """
        return number in self._added

    def vocabulary(self) -> dict[str, int]:
        """Returns the ids by token, added tokens included."""
        return self._backend.get_vocab(with_added_tokens=True)

    def fields(self) -> Json:
        """Returns the fields of tokenizer.json, as the library writes them."""
        return json.loads(self._backend.to_str())

    def save(self, folder: str | Path) -> None:
        """Writes the files from which the tokenizer was loaded.

        The files are unchanged if they name `eos_id` as the end token.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, content in (self._content.files | self._files_with_end()).items():
            (Path(folder) / name).write_bytes(content)

    def _files_with_end(self) -> dict[str, bytes]:
        """Returns the changed files that name `eos_id` as the end token; {} if the folder already names this token."""
        with self._named("name the end token of"):
            token = self._backend.id_to_token(self.eos_id)
        if token == self.eos_token:
            return {}
        named = {"tokenizer_config.json": b"{}"} | {
            name: content for name, content in self._content.files.items() if name in NAMING
        }
        changed = {name: json.loads(content) for name, content in named.items()}
        for fields in changed.values():
            before = fields.get("eos_token")
            fields["eos_token"] = before | {"content": token} if isinstance(before, dict) else token
        return {name: (json.dumps(fields, indent=2) + "\n").encode() for name, fields in changed.items()}
