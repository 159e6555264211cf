"""Special and added tokens of a Hugging Face folder, resolved from its files as transformers 5.24 resolves them.

Four files can name such tokens, and they can disagree. The order is that of `PreTrainedTokenizerBase._from_pretrained`:

1. tokenizer_config.json names tokens.
2. If tokenizer_config.json has `added_tokens_decoder`, then special_tokens_map.json and added_tokens.json are not read.
   Otherwise special_tokens_map.json overrides tokenizer_config.json, and added_tokens.json adds tokens.
3. The defaults of the tokenizer's class fill the gaps.

Each token that is found in this way becomes an added token. A token of the vocabulary keeps the id of the vocabulary;
any other token has the next free id. Like the tokenizers library, transformers uses the ids in the files only to order
the tokens.

The flags `add_bos_token` and `add_eos_token` in tokenizer_config.json have no effect. If there is a tokenizer.json,
transformers ignores these flags. Only the post-processor of tokenizer.json decides which tokens are put around a text.
"""

import dataclasses
from pathlib import Path

from kd_jax.storage import untrusted
from kd_jax.storage.files import Json

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

Token = str | Json  # a text, or an object with the text as "content" and with some of FLAGS


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
    tokenizer: Json
    config: Json
    special_tokens_map: Json
    added_tokens: Json
    model_type: object

    def where(self, kind: str) -> str:
        """Returns the path of the file that names the token of this kind."""
        in_map = "added_tokens_decoder" not in self.config and kind in self.special_tokens_map
        return str(self.folder / ("special_tokens_map.json" if in_map else "tokenizer_config.json"))


def resolve(files: Files) -> tuple[dict[str, str | None], list[Json]]:
    """Returns the named special tokens, and the tokens that transformers adds to those of tokenizer.json.

    A default of the tokenizer's class is used only if the vocabulary has the token. transformers would add a missing
    token with a new id, which the model has never seen.

    Returns:
      Two values. The first is a dict from a token's name, such as "eos_token" or a model's own "image_token", to the
        token's text. The text is None if a file says that there is no such token. A name that no file has is missing.
        The second value is the list of tokens to append to `added_tokens` of tokenizer.json, in order, without ids.

    Raises:
      ValueError: an entry has the wrong type; the message names the file and the key.
    """
    where = str(files.folder / "tokenizer_config.json")
    named, listed = dict(files.config), _listed(files)
    specific: Json = {}
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
    own_tokens_of_model = dict(zip(specific, others, strict=True))
    texts = {name: None if token is None else _content(token) for name, token in (kinds | own_tokens_of_model).items()}
    return texts, [token for token in added if token not in listed.values()]


def own_tokens(tokenizer: Json) -> set[str]:
    """Returns the tokens of a tokenizer.json: the vocabulary of its model, and its added tokens."""
    added = tokenizer.get("added_tokens")
    return model_tokens(tokenizer) | {_content(token) for token in (added if isinstance(added, list) else ())}


def model_tokens(tokenizer: Json) -> set[str]:
    """Returns the tokens that the model of a tokenizer.json has in its vocabulary."""
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):  # a Unigram vocabulary: [token, score]
        vocabulary = [entry[0] for entry in vocabulary if isinstance(entry, list) and entry]
    return {token for token in vocabulary if isinstance(token, str)} if isinstance(vocabulary, dict | list) else set()


def _in_order(
    decoder: list[Json], listed: list[Json], named: list[Token | None], extra: list[Token | None]
) -> list[Json]:
    """Returns the tokens in the order in which transformers adds them. A named token becomes special."""
    named_texts, added = {_content(token) for token in named}, list(decoder)
    known_texts = {token["content"] for token in (*listed, *decoder)}
    for token in (*named, *extra):
        if token is not None and _content(token) not in known_texts:
            flagged = _with_flags({"content": token, "special": True} if isinstance(token, str) else token)
            if flagged not in added:
                added.append(flagged)
    return [token | {"special": token["special"] or token["content"] in named_texts} for token in added]


def _move_specific(named: Json, specific: Json) -> None:
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


def _override(named: Json, special_tokens_map: Json) -> None:
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


def _listed(files: Files) -> dict[int, Json]:
    """Returns id -> token for the added tokens that tokenizer.json lists."""
    where, tokens = f"{files.folder / 'tokenizer.json'}: added_tokens", files.tokenizer.get("added_tokens")
    if not isinstance(tokens, list | None):
        raise ValueError(f"{where} is {untrusted.printable(tokens)}; expected a list of tokens.")
    by_id = {}
    for token in tokens or ():
        flagged = _token(token, where)
        by_id[_id(token.get("id"), f"{where}: {untrusted.printable(flagged['content'])}")] = flagged
    return by_id


def _of_decoder(decoder: object, where: str) -> dict[int, Json]:
    """Returns id -> token for `added_tokens_decoder` of tokenizer_config.json."""
    if not isinstance(decoder, dict):
        raise ValueError(f"{where} is {untrusted.printable(decoder)}; expected an object from ids to tokens.")
    by_id = {}
    for number, token in decoder.items():
        flagged = _token(token, where)
        digits = number.isascii() and number.isdigit() and len(number) < 12
        by_id[_id(int(number) if digits else number, f"{where}: {untrusted.printable(flagged['content'])}")] = flagged
    return by_id


def _of_encoder(encoder: Json, special: set[str], where: str) -> dict[int, Json]:
    """Returns id -> token for the content of added_tokens.json."""
    return {
        _id(number, f"{where}: {untrusted.printable(text)}"): _with_flags({"content": text, "special": text in special})
        for text, number in encoder.items()
    }


def _defaults(files: Files) -> dict[str, str | None]:
    """Returns the default tokens of the class that AutoTokenizer chooses.

    If the class has no default padding token, the padding token of tokenizer.json is used.
    """
    named, model_type = files.config.get("tokenizer_class"), files.model_type
    named = named.removesuffix("Fast") if isinstance(named, str) else ""
    registered = CLASS_OF_MODEL.get(model_type, "") if isinstance(model_type, str) else ""
    chosen = registered if model_type == "qwen2" else named or registered
    if model_type == "mistral" or (chosen == "LlamaTokenizer" and _has_byte_level(files.tokenizer)):
        chosen = ""
    padding = files.tokenizer.get("padding")
    pad = padding.get("pad_token") if isinstance(padding, dict) else None
    return {"pad_token": pad if isinstance(pad, str) else None} | DEFAULTS.get(chosen, {})


def _has_byte_level(tokenizer: Json) -> bool:
    """Returns True if the pre-tokenizer or the decoder of a tokenizer.json has a ByteLevel step."""
    steps = [tokenizer.get("pre_tokenizer"), tokenizer.get("decoder")]
    while steps:
        step = steps.pop()
        if isinstance(step, dict):
            steps += step.values()
        elif isinstance(step, list):
            steps += step
        elif step == "ByteLevel":
            return True
    return False


def _extra(named: Json, where: str) -> list[object]:
    """Returns the list of extra special tokens, whose entries are not checked yet."""
    tokens = named.get("extra_special_tokens")
    if not isinstance(tokens, list | None):
        raise ValueError(f"{where}: extra_special_tokens is {untrusted.printable(tokens)}; expected a list of tokens.")
    return tokens or []


def _content(token: object) -> str:
    """Returns the text of a token, or "" for a value that is no token."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else ""


def _checked(token: object, where: str) -> Token | None:
    """Returns a token as a file names it. An empty text means that there is no token."""
    return (token or None) if isinstance(token, str | None) else _token(token, where)


def _token(token: object, where: str) -> Json:
    """Checks a token that a file gives as an object, and returns the token with all its flags."""
    if not isinstance(token, dict) or not isinstance(token.get("content"), str):
        raise ValueError(
            f"{where} is {untrusted.printable(token)}; expected a text, or an object with a text as content."
        )
    for flag in FLAGS:
        if not isinstance(token.get(flag), bool | None):
            raise ValueError(f"{where}: {flag} is {untrusted.printable(token[flag])}; expected true or false.")
    return _with_flags(token)


def _with_flags(token: Json) -> Json:
    """Returns the token with all flags. A missing flag has the default of the tokenizers library."""
    flags = dict.fromkeys(FLAGS, False) | {"normalized": not token.get("special")}
    flags |= {flag: token[flag] for flag in FLAGS if token.get(flag) is not None}
    return {"content": token["content"]} | flags


def _id(number: object, where: str) -> int:
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 2**32:
        raise ValueError(f"{where} has the id {untrusted.printable(number)}; expected a whole number below 2**32.")
    return number
