"""Text to ids and back: a Hugging Face folder's tokenizer.json, read by the tokenizers library."""

import contextlib
import copy
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from kd_jax import untrusted
from kd_jax.data import limited, tokenizer_folder
from kd_jax.data.tokenizer_json import named_errors, read_fields

NAMING = ("tokenizer_config.json", "special_tokens_map.json")  # the files that name the end token


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

    def __init__(self, content: tokenizer_folder.Folder):
        """Makes a tokenizer of a folder's content.

        Raises:
          ValueError: as `tokenizer_folder.resolve`.
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
        """Reads tokenizer.json, and beside it the special tokens and the chat template.

        Raises:
          ValueError: as `tokenizer_folder.read` and `tokenizer_folder.resolve`.
        """
        return cls(tokenizer_folder.read(Path(folder).expanduser()))

    def with_ends(self, eos_id: int, others: Iterable[int] = ()) -> "Tokenizer":
        """Returns the same tokenizer with another trained end, and with more ends.

        Args:
          eos_id: the token that is written after a response.
          others: more tokens that end a response. Ids that the tokenizer does not have are ignored: no text contains them.
        """
        changed = copy.copy(self)
        changed.eos_id, changed.end_ids = eos_id, self._with_known(eos_id, (*self.end_ids, *others))
        return changed

    def _with_known(self, eos_id: int, others: Iterable[int]) -> tuple[int, ...]:
        return tuple(dict.fromkeys((eos_id, *(number for number in others if 0 <= number < self.vocab_size))))

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
        left = limited.without(self._content.files, set(gone))
        found = Tokenizer(dataclasses.replace(self._content, files=left))
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
        fields = read_fields(self.folder / "tokenizer.json", self._content.files["tokenizer.json"])
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

    def token_ends(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns where each token of each text ends, in characters."""
        with self._named("encode"):
            encoded = self._backend.encode_batch(list(texts), add_special_tokens=False)
        return [[end for _, end in encoding.offsets] for encoding in encoded]

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
        for name, content in (self._content.files | self._files_with_end()).items():
            (Path(folder) / name).write_bytes(content)

    def _files_with_end(self) -> dict[str, bytes]:
        """Returns the files in which `eos_id` has to be named as the end token, and is not."""
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
