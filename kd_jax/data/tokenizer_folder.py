"""A tokenizer's folder: its files, and the special tokens that these files and the model's configuration name."""

import dataclasses
import json
from pathlib import Path

import tokenizers

from kd_jax.data import special_tokens
from kd_jax.data.tokenizer_json import added_tokens, check_ids, named_errors, read_backend, read_fields, with_added
from kd_jax.storage import untrusted
from kd_jax.storage.files import Json

# The files of a tokenizer and their largest sizes in bytes. The largest tokenizer.json in use, Gemma's, has 33 MB.
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
      path: the path, for messages.
      files: the contents by name, for the files of `FILES` that the folder has.
      config, generation_config: the configuration files of the model in the same folder; empty if they are missing.
    """

    path: Path
    files: dict[str, bytes]
    config: Json
    generation_config: Json


@dataclasses.dataclass(frozen=True)
class Special:
    """The special tokens of a folder.

    Attributes:
      bos_id: the token that begins a text, or None.
      eos_id: the token that ends a text.
      pad_id: the token that fills rows; the end token if no file names a padding token.
      named: the tokens that a chat template reads, by the template's variable names, such as pad_token.
      added: the ids of added tokens, such as control tokens.
      ends: the ids that end a text according to the model's configuration.
      chat_template: the Jinja chat template, or None.
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
      ValueError: the folder or its tokenizer.json does not exist, or a file cannot be read.
    """
    untrusted.check_folder(path)
    if not (path / "tokenizer.json").exists():
        raise ValueError(f"{path} has no tokenizer.json; save the tokenizer to this folder in the fast form.")
    files = {name: untrusted.read_bytes(path / name, limit) for name, limit in FILES.items() if (path / name).exists()}
    return Folder(path, files, _read(path / "config.json"), _read(path / "generation_config.json"))


def resolve(folder: Folder) -> tuple[tokenizers.Tokenizer, Special]:
    """Returns the tokenizer of the tokenizers library, and the special tokens.

    The special tokens are those that transformers finds (`special_tokens.resolve`). If no file of the tokenizer names a
    special token, the model's config.json and generation_config.json are used.

    Raises:
      ValueError: tokenizer.json cannot be read, no file names an end token, or the model has no id for a special token.
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
            # GPT-2's folder names special tokens only by id. A bos_token of null means that there is no such token.
            number = ids_of_model.get(f"{kind}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if number == -1 and kind == "pad":  # the first Llama folders write -1 if there is no padding token
            number = None
        check_ids(backend, () if number is None else (number,), f"{path}: {kind}_token_id")
        ids[kind] = number
    bos_id, eos_id, pad_id = ids["bos"], ids["eos"], ids["pad"]
    if eos_id is None:
        raise ValueError(
            f"{path} names no end token: set eos_token in tokenizer_config.json or eos_token_id in config.json; "
            f"without one a response has no end."
        )
    ids_by_name = {"bos_token": bos_id, "eos_token": eos_id}
    texts = {name: "" if number is None else backend.id_to_token(number) or "" for name, number in ids_by_name.items()}
    added_ids = (backend.token_to_id(token) for token in added_tokens(fields))
    return backend, Special(
        bos_id=bos_id,
        eos_id=eos_id,
        pad_id=eos_id if pad_id is None else pad_id,
        named={name: token for name, token in (tokens | texts).items() if token},
        added=frozenset(number for number in added_ids if number is not None),
        ends=_as_ids(ids_of_model.get("eos_token_id")),
        chat_template=_chat_template(folder, named),
    )


def _as_ids(field: object) -> tuple[int, ...]:
    """Returns a field that is an id, a list of ids, or None, as a tuple of ids."""
    numbers = field if isinstance(field, list) else [field]
    return tuple(number for number in numbers if isinstance(number, int) and not isinstance(number, bool))


def _read(path: Path) -> Json:
    return untrusted.read_json(path, FILES["tokenizer_config.json"]) if path.exists() else {}


def _parsed(files: dict[str, bytes], folder: Path, name: str) -> Json:
    content = untrusted.parse_json(files.get(name, b"{}"), str(folder / name))
    if not isinstance(content, dict):
        raise ValueError(f"{folder / name}: expected a JSON object, found {type(content).__name__}.")
    return content


def _check_room(
    backend: tokenizers.Tokenizer, files: special_tokens.Files, tokens: dict[str, str | None], model: Json
) -> None:
    """Checks that the model in the same folder has an id for each special token that tokenizer.json lacks.

    Without a config.json there is no model to check. The code that loads a model compares the sizes.
    """
    known, size = special_tokens.own_tokens(files.tokenizer), model.get("vocab_size")
    for kind in ("bos_token", "eos_token", "pad_token"):
        token = tokens.get(kind)
        if not model or token is None or token in known:
            continue
        with named_errors(f"{files.where(kind)}: the {kind}"):
            number = backend.token_to_id(token)
        if not isinstance(size, int) or number is None or number >= size:
            raise ValueError(
                f"{files.where(kind)}: the {kind} {untrusted.printable(token)} is not in the vocabulary of tokenizer.json. It would "
                f"get the id {number}, and config.json's vocab_size is {untrusted.printable(size)}: name a token that the model has."
            )


def _chat_template(folder: Folder, named: Json) -> str | None:
    """Returns the template of chat_template.jinja, or else the template of tokenizer_config.json."""
    if CHAT_TEMPLATE in folder.files:
        return untrusted.decoded(folder.files[CHAT_TEMPLATE], folder.path / CHAT_TEMPLATE)
    chat = named.get("chat_template")
    if isinstance(chat, list):  # several templates, by name
        chat = next(
            (entry.get("template") for entry in chat if isinstance(entry, dict) and entry.get("name") == "default"),
            None,
        )
    if chat is not None and not isinstance(chat, str):
        raise ValueError(
            f"{folder.path / 'tokenizer_config.json'}: the chat_template must be a text, not {untrusted.printable(chat)}."
        )
    return chat
