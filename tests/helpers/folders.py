"""Folders with tiny tokenizers of the common kinds."""

import json
import string

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from kd_jax.data import Tokenizer


def save(folder, tokenizer, **files):
    """Writes the folder of a tokenizer. `files` maps names without '.json' to the contents of further files."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def letters(folder):
    """Loads a tokenizer of letters with ids 10 to 35, an end token 0, a bos 1 before each text and a padding token 99."""
    ids = {"<end>": 0, "<bos>": 1, "<pad>": 99} | {
        letter: i for i, letter in enumerate(string.ascii_lowercase, start=10)
    }
    made = tokenizers.Tokenizer(models.BPE(ids, []))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["<end>", "<bos>", "<pad>"])
    made.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    named = {"eos_token": "<end>", "bos_token": "<bos>", "pad_token": "<pad>"}
    named["chat_template"] = "{{ messages[0].content }}"
    return Tokenizer.load(save(folder, made, tokenizer_config=named))


def llama(folder, post="<s> $A", **named):
    """Writes a tokenizer like Llama 2's: "▁" stands before each text and for each space, and bytes are the fallback."""
    pieces = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *string.ascii_letters, *",.:", "▁R", "om", "eo", "Romeo", "▁Romeo", "▁Say", "▁it"]
    merges = [("▁", "R"), ("o", "m"), ("e", "o")]
    made = tokenizers.Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True)
    )
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    if post:
        made.post_processor = processors.TemplateProcessing(single=post, special_tokens=[("<s>", 1), ("</s>", 2)])
    return save(folder, made, tokenizer_config={"eos_token": "</s>", "bos_token": "<s>"} | named)


def token(content, special=True, **flags):
    """Returns an entry of `added_tokens`."""
    others = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
    return {"content": content, "special": special} | others | flags


def config(**more):
    """Returns the contents of a tokenizer_config.json."""
    return {"tokenizer_class": "PreTrainedTokenizerFast", **more}


def byte_level(folder, special, added=(), bos="", **named):
    """Writes a tokenizer like GPT-2's with few merges, and with added tokens. `bos` is put before each text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [
        ("i", "t"),
        ("R", "o"),
        ("m", "e"),
        ("Ro", "me"),
        ("Ġ", "i"),
        ("Ċ", "Ċ"),
        ("l", "l"),
        ("e", "r"),
        ("u", "s"),
    ]
    pieces = [*alphabet, *("".join(pair) for pair in merges)]
    made = tokenizers.Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(special))
    made.add_tokens(list(added))
    if bos:
        made.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, made.token_to_id(bos))]
        )
    return save(folder, made, tokenizer_config={"bos_token": bos or None} | named)
