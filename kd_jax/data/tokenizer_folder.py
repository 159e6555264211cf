"""A tokenizer's folder: its files, and the special tokens that they and the model's configuration name together."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from kd_jax import untrusted
from kd_jax.data import special_tokens
from kd_jax.data.tokenizer_json import added_tokens, check_ids, named_errors, read_backend, read_fields, with_added

# The largest tokenizer.json in use, Gemma's, has 33 MB.
FILES = {
    "tokenizer.json": 128 * untrusted.MIB,
    "tokenizer_config.json": 8 * untrusted.MIB,
    "special_tokens_map.json": 8 * untrusted.MIB,
    "added_tokens.json": 8 * untrusted.MIB,
    "chat_template.jinja": untrusted.MIB,
}
CHAT_TEMPLATE = "chat_template.jinja"
TOKEN_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


@dataclasses.dataclass(frozen=True)
class Folder:
    """The content of a tokenizer's folder.

    Attributes:
      path: for messages.
      files: name -> content, of `FILES` those that the folder has.
      config, generation_config: of the model beside the tokenizer; empty where there is none.
    """

    path: Path
    files: dict[str, bytes]
    config: dict[str, Any]
    generation_config: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Special:
    """The special tokens of a folder.

    Attributes:
      bos_id: begins a text, or None.
      eos_id: ends a text.
      pad_id: fills rows; the end token where no file names a padding token.
      named: the tokens that a chat template reads, by its variables' names, such as pad_token.
      added: ids of added tokens, such as control tokens.
      ends: ids at which the model's configuration says that a text ends.
      chat_template: Jinja, or None.
    """

    bos_id: int | None
    eos_id: int
    pad_id: int
    named: dict[str, str]
    added: frozenset[int]
    ends: tuple[int, ...]
    chat_template: str | None


def read(path: Path) -> Folder:
    """Reads the files of a tokenizer's folder.

    Raises:
      ValueError: no such folder, no tokenizer.json, or a file that cannot be read.
    """
    untrusted.check_folder(path)
    if not (path / "tokenizer.json").exists():
        raise ValueError(f"{path} has no tokenizer.json; save the tokenizer there in its fast form.")
    files = {name: untrusted.read_bytes(path / name, limit) for name, limit in FILES.items() if (path / name).exists()}
    return Folder(path, files, _read(path / "config.json"), _read(path / "generation_config.json"))


def resolve(folder: Folder) -> tuple[Any, Special]:
    """Returns the tokenizers library's tokenizer, or an `Elsewhere`, and the special tokens.

    The special tokens are those that transformers finds (`special_tokens.resolve`). Where no file of the tokenizer names one,
    the model's config.json and generation_config.json do.

    Raises:
      ValueError: a tokenizer.json that cannot be read, no end token anywhere, or a special token for which the model has no id.
    """
    path = folder.path
    ids_of_model = folder.config | folder.generation_config
    fields = read_fields(path / "tokenizer.json", folder.files["tokenizer.json"])
    named, special_map, more = (_parsed(folder.files, path, name) for name in TOKEN_FILES)
    files = special_tokens.Files(path, fields, named, special_map, more, folder.config.get("model_type"))
    tokens, added = special_tokens.resolve(files)
    content = folder.files["tokenizer.json"]
    if added:
        fields = with_added(fields, added)
        content = json.dumps(fields).encode()
    backend = read_backend(path / "tokenizer.json", content, fields)
    _check_room(backend, files, tokens, folder.config)
    ids: dict[str, int | None] = {}
    for kind in ("bos", "eos", "pad"):
        token = tokens.get(f"{kind}_token")
        with named_errors(f"{files.where(f'{kind}_token')}: the {kind}_token"):
            number = backend.token_to_id(token) if token else None
        if f"{kind}_token" not in tokens or (kind == "eos" and not token):
            # As GPT-2's folder has it; a bos_token of null says that there is none.
            number = ids_of_model.get(f"{kind}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if number == -1 and kind == "pad":  # the first Llama folders write this for none
            number = None
        check_ids(backend, () if number is None else (number,), f"{path}: {kind}_token_id")
        ids[kind] = number
    bos_id, eos_id, pad_id = ids["bos"], ids["eos"], ids["pad"]
    if eos_id is None:
        raise ValueError(
            f"{path} names no end token: set eos_token in tokenizer_config.json or eos_token_id in config.json; "
            f"without one a response has no end."
        )
    own = {"bos_token": bos_id, "eos_token": eos_id}
    texts = {name: "" if number is None else backend.id_to_token(number) or "" for name, number in own.items()}
    return backend, Special(
        bos_id=bos_id,
        eos_id=eos_id,
        pad_id=eos_id if pad_id is None else pad_id,
        named={name: token for name, token in (tokens | texts).items() if token},
        added=frozenset(backend.token_to_id(token) for token in added_tokens(fields)),
        ends=_as_ids(ids_of_model.get("eos_token_id")),
        chat_template=_chat_template(folder, named),
    )


def _as_ids(found: Any) -> tuple[int, ...]:
    """Returns a field that has an id, a list of ids, or nothing, as a tuple."""
    found = found if isinstance(found, list) else [found]
    return tuple(number for number in found if isinstance(number, int) and not isinstance(number, bool))


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


def _chat_template(folder: Folder, named: dict[str, Any]) -> str | None:
    """Returns the template of chat_template.jinja, or else that of tokenizer_config.json."""
    if CHAT_TEMPLATE in folder.files:
        return untrusted.decoded(folder.files[CHAT_TEMPLATE], folder.path / CHAT_TEMPLATE)
    chat = named.get("chat_template")
    if isinstance(chat, list):  # several, by name
        chat = next(
            (entry.get("template") for entry in chat if isinstance(entry, dict) and entry.get("name") == "default"),
            None,
        )
    if chat is not None and not isinstance(chat, str):
        raise ValueError(
            f"{folder.path / 'tokenizer_config.json'}: the chat_template is no text: {untrusted.shown(chat)}."
        )
    return chat
