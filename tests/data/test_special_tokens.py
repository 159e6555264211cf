"""The special tokens of a folder, as transformers resolves them.

The expected numbers are from transformers 5.24.0 with tokenizers 0.23.3 for the same files. They come from
`AutoTokenizer.from_pretrained`: `eos_token_id` and the other ids, `get_vocab()`, and the ids of TEXT without special
tokens. Where transformers has no pad token, the expected id is the id of the end token. Two cases differ on purpose,
and a comment with DIFFERENT explains each.
"""

import json

import pytest

from kd_jax.data import Tokenizer
from tests.helpers.folders import config, token

WORDS = ["a", "b", "c", "<s>", "</s>", "<pad>", "<unk>"]
TEXT = "a </s> <|im_start|> bc<extra> <x> <y> <p> <end> <plain> <unk>"
END = "<|endoftext|>"


LISTED = [{"id": 3} | token("<s>"), {"id": 4} | token("</s>"), {"id": 7} | token("<extra>")]
POST = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [3], "tokens": ["<s>"]}},
}
PADDING = {
    "strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None, "pad_id": 5, "pad_type_id": 0,
    "pad_token": "<pad>",
}  # fmt: skip


def write(folder, config=None, special_map=None, added=None, model=None, words=None, **fields):
    """Writes a folder with a tokenizer of a few words and the given files."""
    folder.mkdir()
    base = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": LISTED, "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None,
        "model": words or {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(WORDS)}, "unk_token": "<unk>"},
    }  # fmt: skip
    files = {"tokenizer_config": config, "special_tokens_map": special_map, "added_tokens": added, "config": model}
    files["tokenizer"] = base | fields
    for name, content in files.items():
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


ENDS = {"eos_token": "</s>", "bos_token": "<s>", "pad_token": "<pad>"}
DECODER = {"4": token("</s>")}
TURNS = {"9": token("<|im_end|>"), "8": token("<|im_start|>")}
NONE = [0, 4, 6, 6, 7, 6, 6, 6, 6, 6, 6]  # TEXT if only the tokens of tokenizer.json exist
# name: (files, (eos, bos, pad), tokens from id 8 on, ids of TEXT)
CASES = {
    "special_tokens_map.json alone": (dict(special_map=ENDS), (4, 3, 5), "", NONE),
    "special_tokens_map.json overrides the config": (
        dict(config=config(eos_token="</s>", bos_token="<s>"), special_map={"eos_token": "<extra>", "bos_token": None}),
        (7, None, 7), "", NONE,
    ),
    "special_tokens_map.json is not read beside a decoder": (
        dict(config=config(eos_token="</s>", added_tokens_decoder=DECODER), special_map={"eos_token": "<extra>"}),
        (4, None, 4), "", NONE,
    ),
    "decoder with tokens that tokenizer.json lacks": (
        dict(config=config(eos_token="<|im_end|>", added_tokens_decoder=DECODER | TURNS)),
        (9, None, 9), "<|im_start|> <|im_end|>", [0, 4, 8, 6, 7, 6, 6, 6, 6, 6, 6],
    ),
    "decoder with ids that do not fit": (
        dict(config=config(eos_token="<|im_end|>", added_tokens_decoder={"20": token("<|im_end|>"), "2": token("<|im_start|>")})),
        (9, None, 9), "<|im_start|> <|im_end|>", [0, 4, 8, 6, 7, 6, 6, 6, 6, 6, 6],
    ),
    "decoder with a word of the vocabulary": (
        dict(config=config(eos_token="</s>", added_tokens_decoder={"1": token("b")})),
        (4, None, 4), "", [0, 4, 6, 1, 2, 7, 6, 6, 6, 6, 6, 6],
    ),
    "added_tokens.json": (
        dict(config=config(eos_token="<|im_end|>"), added={"<|im_end|>": 9, "<|im_start|>": 8, "<plain>": 10}),
        (9, None, 9), "<|im_start|> <|im_end|> <plain>", [0, 4, 8, 6, 7, 6, 6, 6, 6, 10, 6],
    ),
    "added_tokens.json is not read beside a decoder": (
        dict(config=config(eos_token="</s>", added_tokens_decoder=DECODER), added={"<|im_start|>": 8}), (4, None, 4), "", NONE,
    ),
    "objects in special_tokens_map.json": (
        dict(config=config(), special_map={"eos_token": token("</s>"), "pad_token": token("<p>", normalized=True, lstrip=True)}),
        (4, None, 8), "<p>", [0, 4, 6, 6, 7, 6, 6, 8, 6, 6, 6],
    ),
    "objects in the config": (
        dict(config=config(eos_token={"__type": "AddedToken", "content": "<end>", "normalized": True})),
        (8, None, 8), "<end>", [0, 4, 6, 6, 7, 6, 6, 6, 8, 6, 6],
    ),
    "tokens that the vocabulary lacks, in the order bos, eos, pad": (
        dict(config=config(eos_token="<end>", pad_token="<p>", bos_token="<x>")),
        (9, 8, 10), "<x> <end> <p>", [0, 4, 6, 6, 7, 8, 6, 10, 9, 6, 6],
    ),
    "tokens that the vocabulary has are matched in texts": (
        dict(config=config(eos_token="</s>", unk_token="b")), (4, None, 4), "", [0, 4, 6, 1, 2, 7, 6, 6, 6, 6, 6, 6],
    ),
    "additional_special_tokens": (
        dict(config=config(eos_token="</s>", additional_special_tokens=["<y>", "<x>", "</s>"])),
        (4, None, 4), "<y> <x>", [0, 4, 6, 6, 7, 9, 8, 6, 6, 6, 6],
    ),
    "additional_special_tokens in both": (
        dict(config=config(eos_token="</s>", additional_special_tokens=["<x>"]), special_map={"additional_special_tokens": ["<y>"]}),
        (4, None, 4), "<x>", [0, 4, 6, 6, 7, 8, 6, 6, 6, 6, 6],
    ),
    "additional_special_tokens in special_tokens_map.json": (
        dict(config=config(eos_token="</s>"), special_map={"additional_special_tokens": ["<y>"]}),
        (4, None, 4), "<y>", [0, 4, 6, 6, 7, 6, 8, 6, 6, 6, 6],
    ),
    "extra_special_tokens in both": (
        dict(config=config(**ENDS, extra_special_tokens=["<x>"]), special_map={"extra_special_tokens": ["<y>", {"content": "<p>"}]}),
        (4, 3, 5), "<x> <y> <p>", [0, 4, 6, 6, 7, 8, 9, 10, 6, 6, 6],
    ),
    "extra_special_tokens go before additional_special_tokens": (
        dict(config=config(eos_token="</s>", extra_special_tokens=["<x>"], additional_special_tokens=["<y>"])),
        (4, None, 4), "<x>", [0, 4, 6, 6, 7, 8, 6, 6, 6, 6, 6],
    ),
    "tokens of a model's own": (
        dict(config=config(eos_token="</s>", image_token="<x>", extra_special_tokens={"boi_token": "<y>"})),
        (4, None, 4), "<x> <y>", [0, 4, 6, 6, 7, 8, 9, 6, 6, 6, 6],
    ),
    "the padding of tokenizer.json": (dict(config=config(eos_token="</s>"), padding=PADDING), (4, None, 5), "", NONE),
    "no pad token in the config": (dict(config=config(eos_token="</s>", pad_token=None), padding=PADDING), (4, None, 4), "", NONE),
    # DIFFERENT: transformers raises a TypeError for an object without "__type" in tokenizer_config.json.
    "objects without a type": (dict(config=config(eos_token={"content": "</s>"})), (4, None, 4), "", NONE),
    # DIFFERENT: transformers adds [PAD] with id 8 as padding. No special token has this name, and no model has the id.
    "a padding of tokenizer.json that the vocabulary lacks": (
        dict(config=config(eos_token="</s>"), padding=PADDING | {"pad_token": "[PAD]"}), (4, None, 4), "", NONE,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_tokens_are_those_of_transformers(name, tmp_path):
    files, ids, new, row = CASES[name]
    folder = write(tmp_path / "t", **files)
    tokenizer = Tokenizer.load(folder)
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id) == ids
    assert sorted((i, token) for token, i in tokenizer.vocabulary().items() if i > 7) == list(enumerate(new.split(), 8))
    assert tokenizer.vocab_size == 8 + len(new.split()) and tokenizer.encode(TEXT) == row
    tokenizer.save(tmp_path / "u")
    again = Tokenizer.load(tmp_path / "u")
    assert again.encode(TEXT) == row and again.fingerprint() == tokenizer.fingerprint()
    for file in (tmp_path / "u").iterdir():  # the saved files equal the original files
        assert file.read_bytes() == (folder / file.name).read_bytes()
    assert {file.name for file in folder.iterdir()} == {file.name for file in (tmp_path / "u").iterdir()}


@pytest.mark.parametrize(
    "post, flags, expected",
    [
        (None, dict(add_bos_token=True, add_eos_token=True), [0]),
        (POST, dict(add_bos_token=False, add_eos_token=True), [3, 0]),
        (POST, {}, [3, 0]),
    ],
)
def test_the_post_processor_alone_decides_what_is_put_around_a_text(post, flags, expected, tmp_path):
    tokenizer = Tokenizer.load(write(tmp_path / "t", config(**ENDS, **flags), post_processor=post))
    assert tokenizer.encode("a", add_special_tokens=True) == expected


def test_special_tokens_are_not_decoded(tmp_path):
    # "<plain>" in added_tokens.json is not special. "</s>" becomes special because the config names this token.
    listed = [{"id": 4} | token("</s>", special=False, normalized=True)]
    tokenizer = Tokenizer.load(
        write(tmp_path / "t", config(eos_token="</s>"), added={"<plain>": 9}, added_tokens=listed)
    )
    assert tokenizer.decode([0, 4, 7]) == "a <plain>"


BPE = {
    "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
    "fuse_unk": False, "byte_fallback": False, "merges": [],
    "vocab": {word: i for i, word in enumerate(["a", "<s>", "</s>", "<|padding|>", END])},
}  # fmt: skip
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


# A selection from 216 combinations (6 model types, 9 classes, ByteLevel, padding), which all agreed with transformers.
@pytest.mark.parametrize(
    "model, named, bytes_, expected",
    [
        ("gpt2", None, True, (4, 4, 4)),
        ("gpt2", "PreTrainedTokenizerFast", True, None),
        ("qwen2", "PreTrainedTokenizerFast", True, (4, None, 4)),
        ("qwen3", "PreTrainedTokenizerFast", True, None),
        ("qwen3", None, True, (4, None, 4)),
        ("llama", None, False, None),
        ("llama", "LlamaTokenizerFast", False, (2, 1, 2)),
        ("llama", "LlamaTokenizerFast", True, None),
        ("mistral", "LlamaTokenizer", False, None),
        (None, "LlamaTokenizer", False, (2, 1, 2)),
        (None, "GPTNeoXTokenizer", True, (4, 4, 3)),
    ],
)
def test_defaults_are_those_of_the_class_in_transformers(model, named, bytes_, expected, tmp_path):
    folder = write(
        tmp_path / "t",
        {"tokenizer_class": named} if named else {},
        model={"model_type": model, "vocab_size": 9} if model else None,
        words=BPE,
        added_tokens=[],
        pre_tokenizer=BYTES if bytes_ else None,
    )
    if expected is None:
        with pytest.raises(ValueError, match="names no end token"):
            Tokenizer.load(folder)
    else:
        tokenizer = Tokenizer.load(folder)
        assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id) == expected


def test_a_new_token_must_fit_into_the_model(tmp_path):
    named = config(eos_token="<end>")
    assert Tokenizer.load(write(tmp_path / "a", named, model={"vocab_size": 9})).eos_id == 8
    for name, model in {"b": {"vocab_size": 8}, "c": {"eos_token_id": 4}}.items():
        with pytest.raises(
            ValueError,
            match=r"[bc]/tokenizer_config.json: the eos_token '<end>' is not in the vocabulary of tokenizer.json. It would get "
            r"the id 8, and config.json's vocab_size is (8|None)",
        ):
            Tokenizer.load(write(tmp_path / name, named, model=model))
    with pytest.raises(ValueError, match=r"d/special_tokens_map.json: the pad_token '<p>' is not in the vocabulary"):
        Tokenizer.load(write(tmp_path / "d", config(**ENDS), {"pad_token": "<p>"}, model={"vocab_size": 8}))


def test_the_fingerprint_covers_the_tokens_of_all_files(tmp_path):
    prints = [
        Tokenizer.load(write(tmp_path / str(number), config(eos_token="</s>"), **files)).fingerprint()
        for number, files in enumerate(
            [{}, dict(added={"<x>": 8}), dict(special_map={"eos_token": "<s>"}), dict(special_map={"cls_token": "b"})]
        )
    ]
    assert len(set(prints)) == 4


def test_an_unusual_tokenizer_has_the_added_tokens_too(tmp_path):
    split = {"type": "Split", "pattern": {"Regex": "[ ;]"}, "behavior": "Removed", "invert": False}
    named = config(eos_token="<end>", added_tokens_decoder={"8": token("<x>")})
    tokenizer = Tokenizer.load(write(tmp_path / "t", named, pre_tokenizer=split))
    assert tokenizer.encode("a;<x> b<end>") == [0, 8, 1, 9] and tokenizer.eos_id == 9


@pytest.mark.parametrize(
    "files, message",
    [
        (dict(config=config(eos_token=3)), r"tokenizer_config.json: the eos_token is 3; expected a text"),
        (dict(special_map={"eos_token": ["</s>"]}), r"special_tokens_map.json: the eos_token is \['</s>'\]; expected"),
        (dict(config=config(added_tokens_decoder=[])), r"added_tokens_decoder is \[\]; expected an object"),
        (dict(config=config(added_tokens_decoder={"x": token("<x>")})), r"added_tokens_decoder: '<x>' has the id 'x'"),
        (dict(config=config(added_tokens_decoder={"8": "<x>"})), r"added_tokens_decoder is '<x>'; expected"),
        (dict(added={"<x>": -1}), r"added_tokens.json: '<x>' has the id -1; expected a whole number"),
        (dict(config=config(extra_special_tokens="<x>")), r"extra_special_tokens is '<x>'; expected a list"),
        (dict(config=config(extra_special_tokens=[7])), r"extra_special_tokens is 7; expected a text"),
        (dict(config=config(eos_token=token("</s>", lstrip=1))), r"the eos_token: lstrip is 1; expected true or false"),
        (dict(config=config(extra_special_tokens=["u" * 1001])), r"tokenizer.json: the token, .* has 1001 characters"),
        (dict(special_map=[]), r"special_tokens_map.json: expected a JSON object, found list"),
    ],
)
def test_entries_of_the_wrong_type_are_named(files, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Tokenizer.load(write(tmp_path / "t", **files))
