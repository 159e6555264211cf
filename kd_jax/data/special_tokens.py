"""Special and added tokens of a Hugging Face folder, resolved from its files as transformers 5.24 resolves them.

Four files can name such tokens, and they can disagree. The order is that of `PreTrainedTokenizerBase._from_pretrained`:

1. tokenizer_config.json names tokens.
2. If tokenizer_config.json has `added_tokens_decoder`, then special_tokens_map.json and added_tokens.json are not read.
   Otherwise special_tokens_map.json overrides tokenizer_config.json, and added_tokens.json adds tokens.
3. The defaults of the tokenizer's class fill the gaps.

Each token that is found in this way becomes an added token. Its id is its id in the vocabulary, or else the next free
id. Like the tokenizers library, transformers uses the ids in the files only to order the tokens.

The flags `add_bos_token` and `add_eos_token` in tokenizer_config.json have no effect. If there is a tokenizer.json,
transformers ignores these flags. Only the post-processor of tokenizer.json decides which tokens are put around a text.
"""

import dataclasses
from pathlib import Path
from typing import Any

from kd_jax.storage import untrusted

KINDS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
END = "<|endoftext|>"
# The tokens that a class of transformers uses if no file names them. A class that is not listed here has no defaults.
DEFAULTS: dict[str, dict[str, str | None]] = {
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "GPT2Tokenizer": {"bos_token": END, "eos_token": END, "unk_token": END, "pad_token": None},
    "Qwen2Tokenizer": {"eos_token": END, "pad_token": END, "unk_token": END},
    "GPTNeoXTokenizer": {"bos_token": END, "eos_token": END, "unk_token": END, "pad_token": "<|padding|>"},
}
CLASS_OF_MODEL = {"gpt2": "GPT2Tokenizer", "qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer"}

# A token is a text or, with flags of its own, an object of FLAGS and "content".
Token = str | dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Files:
    """The parsed files of a tokenizer's folder, each an empty object if the folder lacks the file.

    Attributes:
      folder: the folder, for messages.
      tokenizer: the content of tokenizer.json.
      config: the content of tokenizer_config.json.
      special_tokens_map: the content of special_tokens_map.json.
      added_tokens: the content of added_tokens.json: token -> id.
      model_type: the field model_type of config.json, or None.
    """

    folder: Path
    tokenizer: dict[str, Any]
    config: dict[str, Any]
    special_tokens_map: dict[str, Any]
    added_tokens: dict[str, Any]
    model_type: Any

    def where(self, kind: str) -> str:
        """Returns the path of the file that names the token of this kind."""
        in_map = "added_tokens_decoder" not in self.config and kind in self.special_tokens_map
        return str(self.folder / ("special_tokens_map.json" if in_map else "tokenizer_config.json"))


def resolve(files: Files) -> tuple[dict[str, str | None], list[dict[str, Any]]]:
    """Returns the named special tokens, and the tokens that transformers adds to those of tokenizer.json.

    A default of the tokenizer's class counts only if the vocabulary has the token. transformers would add a missing one
    with a new id, which the model has never seen.

    Returns:
      Two values. The first is a dict from "eos_token" and so on, and from the names of a model's own tokens such as
        "image_token", to the token's text. The text is None if a file says that there is no such token. A kind that no
        file names is missing. The second value is the list of tokens to append to `added_tokens` of tokenizer.json, in
        order, without ids.
    Raises:
      ValueError: an entry has the wrong type; the message names the file and the key.
    """
    where = str(files.folder / "tokenizer_config.json")
    named, specific, listed = dict(files.config), {}, _listed(files)
    if "additional_special_tokens" in named and not named.get("extra_special_tokens"):
        named["extra_special_tokens"] = named.pop("additional_special_tokens")
    _move_specific(named, specific)
    if "added_tokens_decoder" in named:
        by_id = _of_decoder(named["added_tokens_decoder"], f"{where}: added_tokens_decoder")
    else:
        _override(named, files.special_tokens_map)
        _move_specific(named, specific)
        special = {_content(named.get(kind)) for kind in KINDS} | {_content(token) for token in _extra(named, where)}
        by_id = _of_encoder(files.added_tokens, special, str(files.folder / "added_tokens.json")) | listed
    flags = {token["content"]: token for token in by_id.values()}

    kinds: dict[str, Token | None] = {}
    for kind in KINDS:
        if kind in named:
            token = _checked(named[kind], f"{files.where(kind)}: the {kind}")
            kinds[kind] = token if token is None else flags.get(_content(token), token)
    known = own_tokens(files.tokenizer) | set(flags)
    kinds |= {kind: token for kind, token in _defaults(files).items() if kind not in kinds and token in known}
    others = [_checked(token, f"{where}: the {kind}") for kind, token in specific.items()]
    extra = [_checked(token, f"{where}: extra_special_tokens") for token in _extra(named, where)]

    decoder = [by_id[number] for number in sorted(by_id)]
    added = _in_order(decoder, list(listed.values()), [*map(kinds.get, KINDS), *others], extra)
    own = dict(zip(specific, others, strict=True))
    texts = {kind: None if token is None else _content(token) for kind, token in (kinds | own).items()}
    return texts, [token for token in added if token not in listed.values()]


def own_tokens(tokenizer: dict[str, Any]) -> set[str]:
    """Returns the tokens of a tokenizer.json: the vocabulary of its model, and its added tokens."""
    added = tokenizer.get("added_tokens")
    return model_tokens(tokenizer) | {_content(token) for token in (added if isinstance(added, list) else ())}


def model_tokens(tokenizer: dict[str, Any]) -> set[str]:
    """Returns the tokens that the model of a tokenizer.json has in its vocabulary."""
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):  # a Unigram vocabulary: [token, score]
        vocabulary = [entry[0] for entry in vocabulary if isinstance(entry, list) and entry]
    return {token for token in vocabulary if isinstance(token, str)} if isinstance(vocabulary, dict | list) else set()


def _in_order(
    decoder: list[dict[str, Any]], listed: list[dict[str, Any]], named: list[Token | None], extra: list[Token | None]
) -> list[dict[str, Any]]:
    """Returns the tokens in the order in which transformers adds them; a named token becomes special."""
    names, found = {_content(token) for token in named}, list(decoder)
    encoder = {token["content"] for token in (*listed, *decoder)}
    for token in (*named, *extra):
        if token is not None and _content(token) not in encoder:
            whole = _whole({"content": token, "special": True} if isinstance(token, str) else token)
            if whole not in found:
                found.append(whole)
    return [token | {"special": token["special"] or token["content"] in names} for token in found]


def _move_specific(named: dict[str, Any], specific: dict[str, Any]) -> None:
    """Moves a model's own tokens from `named` to `specific`.

    These are tokens such as image_token, and extra special tokens that are given as an object.
    """
    for key in list(named):
        token = named[key]
        if (
            key.endswith("_token")
            and key not in KINDS
            and (isinstance(token, str) or (isinstance(token, dict) and "__type" in token))
        ):
            specific[key] = named.pop(key)
    for key in ("extra_special_tokens", "model_specific_special_tokens"):
        if isinstance(named.get(key), dict):
            specific |= named.pop(key)


def _override(named: dict[str, Any], special_tokens_map: dict[str, Any]) -> None:
    """Overrides the entries of tokenizer_config.json by those of special_tokens_map.json."""
    special = lambda token: token | {"special": True, "__type": "AddedToken"} if isinstance(token, dict) else token
    for key, value in special_tokens_map.items():
        if isinstance(value, list):
            old = named.get(key) if key == "extra_special_tokens" else None
            named[key] = [*(old if isinstance(old, list) else []), *map(special, value)]
        else:
            named[key] = value if key == "extra_special_tokens" else special(value)
    if "additional_special_tokens" in named and "extra_special_tokens" not in named:
        named["extra_special_tokens"] = named.pop("additional_special_tokens")


def _listed(files: Files) -> dict[int, dict[str, Any]]:
    """Returns id -> token for the added tokens that tokenizer.json lists."""
    where, found = f"{files.folder / 'tokenizer.json'}: added_tokens", files.tokenizer.get("added_tokens")
    if not isinstance(found, list | None):
        raise ValueError(f"{where} is {untrusted.shown(found)}; expected a list of tokens.")
    by_id = {}
    for token in found or ():
        whole = _token(token, where)
        by_id[_id(token.get("id"), f"{where}: {untrusted.shown(whole['content'])}")] = whole
    return by_id


def _of_decoder(found: Any, where: str) -> dict[int, dict[str, Any]]:
    if not isinstance(found, dict):
        raise ValueError(f"{where} is {untrusted.shown(found)}; expected an object of id and token.")
    by_id = {}
    for number, token in found.items():
        whole = _token(token, where)
        digits = number.isascii() and number.isdigit() and len(number) < 12
        by_id[_id(int(number) if digits else number, f"{where}: {untrusted.shown(whole['content'])}")] = whole
    return by_id


def _of_encoder(found: dict[str, Any], special: set[str], where: str) -> dict[int, dict[str, Any]]:
    return {
        _id(number, f"{where}: {untrusted.shown(content)}"): _whole({"content": content, "special": content in special})
        for content, number in found.items()
    }


def _defaults(files: Files) -> dict[str, str | None]:
    """Returns the default tokens of the class that AutoTokenizer chooses.

    If the class has no default padding token, the padding token of tokenizer.json is used.
    """
    named, registered = files.config.get("tokenizer_class"), ""
    named = named.removesuffix("Fast") if isinstance(named, str) else ""
    if isinstance(files.model_type, str):
        registered = CLASS_OF_MODEL.get(files.model_type, "")
    chosen = registered if files.model_type == "qwen2" else named or registered
    if files.model_type == "mistral" or (chosen == "LlamaTokenizer" and _has_byte_level(files.tokenizer)):
        chosen = ""
    padding = files.tokenizer.get("padding")
    pad = padding.get("pad_token") if isinstance(padding, dict) else None
    return {"pad_token": pad if isinstance(pad, str) else None} | DEFAULTS.get(chosen, {})


def _has_byte_level(tokenizer: dict[str, Any]) -> bool:
    left = [tokenizer.get("pre_tokenizer"), tokenizer.get("decoder")]
    while left:
        step = left.pop()
        if isinstance(step, dict):
            left += step.values()
        elif isinstance(step, list):
            left += step
        elif step == "ByteLevel":
            return True
    return False


def _extra(named: dict[str, Any], where: str) -> list[Any]:
    found = named.get("extra_special_tokens")
    if not isinstance(found, list | None):
        raise ValueError(f"{where}: extra_special_tokens is {untrusted.shown(found)}; expected a list of tokens.")
    return found or []


def _content(token: Any) -> str:
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else ""


def _checked(token: Any, where: str) -> Token | None:
    """Returns a token as a file names it. An empty text means that there is no token."""
    return (token or None) if isinstance(token, str | None) else _token(token, where)


def _token(token: Any, where: str) -> dict[str, Any]:
    if not isinstance(token, dict) or not isinstance(token.get("content"), str):
        raise ValueError(f"{where} is {untrusted.shown(token)}; expected a text, or an object with a text as content.")
    for flag in FLAGS:
        if not isinstance(token.get(flag), bool | None):
            raise ValueError(f"{where}: {flag} is {untrusted.shown(token[flag])}; expected true or false.")
    return _whole(token)


def _whole(token: dict[str, Any]) -> dict[str, Any]:
    """Returns the token with all its flags. A missing flag has the default of the tokenizers library."""
    flags = dict.fromkeys(FLAGS, False) | {"normalized": not token.get("special")}
    flags |= {flag: token[flag] for flag in FLAGS if token.get(flag) is not None}
    return {"content": token["content"]} | flags


def _id(number: Any, where: str) -> int:
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 2**32:
        raise ValueError(f"{where} has the id {untrusted.shown(number)}; expected a whole number.")
    return number
