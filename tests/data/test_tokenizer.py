"""The tokenizer of a Hugging Face folder: ids, special tokens from all files that name them, and errors."""

import json
import time

import pytest
import tokenizers

from kd_jax.data import Tokenizer
from kd_jax.data.limited import differing_tokens
from kd_jax.data.shared import check_same_tokenizer

WORDS = ["a", "b", "c", "<s>", "</s>", "<pad>"]


def write(folder, config=None, model=None, generation=None, template=None, post=False):
    """Writes a folder with a tokenizer of a few words and the given further files."""
    folder.mkdir(exist_ok=True)
    words = tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>", "<extra>"])
    if post:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 3)]
        )
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in {
        "tokenizer_config.json": config, "config.json": model, "generation_config.json": generation,
    }.items():  # fmt: skip
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def test_special_tokens_are_strings_or_dicts(tmp_path):
    config = {"eos_token": "</s>", "bos_token": {"content": "<s>", "special": True}, "pad_token": "<pad>"}
    tokenizer = Tokenizer.load(write(tmp_path / "t", config))
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id) == (4, 3, 5)
    assert (tokenizer.eos_token, tokenizer.bos_token) == ("</s>", "<s>")
    assert tokenizer.vocab_size == 7  # <extra> is an added token beyond the words


def test_special_tokens_fall_back_as_in_gpt2(tmp_path):
    tokenizer = Tokenizer.load(write(tmp_path / "t", {"model_max_length": 4}, {"eos_token_id": 4, "bos_token_id": 4}))
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id) == (4, 4, 4)
    # generation_config.json overrides config.json and may name several end tokens.
    tokenizer = Tokenizer.load(write(tmp_path / "u", None, {"eos_token_id": 0}, {"eos_token_id": [4, 0]}))
    assert tokenizer.eos_id == 4 and tokenizer.bos_id is None and tokenizer.bos_token == ""


def test_a_bos_token_of_null_is_none_whatever_the_model_says(tmp_path):
    config = {"eos_token": "</s>", "bos_token": None, "pad_token": None}
    tokenizer = Tokenizer.load(write(tmp_path / "t", config, {"bos_token_id": 3, "pad_token_id": 5}))
    assert tokenizer.bos_id is None and tokenizer.pad_id == tokenizer.eos_id


def test_encode_and_decode(tmp_path):
    tokenizer = Tokenizer.load(write(tmp_path / "t", {"eos_token": "</s>"}, post=True))
    assert tokenizer.encode("a b c a") == [0, 1, 2, 0]  # the settings for truncation and padding are ignored
    assert tokenizer.encode("b", add_special_tokens=True) == [3, 1]
    assert tokenizer.encode_batch(["a", "b c"], add_special_tokens=True) == [[3, 0], [3, 1, 2]]
    assert tokenizer.decode([3, 1, 2, 4]) == "b c"
    assert tokenizer.decode([1, 4], skip_special_tokens=False) == "b </s>"


@pytest.mark.parametrize(
    "config, file, expected",
    [
        ({}, None, None),
        ({"chat_template": "of the config"}, None, "of the config"),
        ({"chat_template": "of the config"}, "of the file", "of the file"),
        ({"chat_template": [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]}, None, "d"),
    ],
)
def test_chat_template(tmp_path, config, file, expected):
    assert (
        Tokenizer.load(write(tmp_path / "t", {"eos_token": "</s>"} | config, template=file)).chat_template == expected
    )


def test_save_writes_the_files_unchanged(tmp_path):
    folder = write(tmp_path / "t", {"eos_token": "</s>", "unknown": [1]}, template="x")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    tokenizer = Tokenizer.load(folder)
    tokenizer.save(folder)
    for path in folder.iterdir():
        path.unlink()
    tokenizer.save(tmp_path / "new" / "folder")  # works without the original files
    assert {path.name: path.read_bytes() for path in (tmp_path / "new" / "folder").iterdir()} == before
    assert Tokenizer.load(tmp_path / "new" / "folder").vocabulary() == tokenizer.vocabulary()


def test_errors_name_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"^the folder .*/t does not exist\.$"):
        Tokenizer.load(tmp_path / "t")
    (tmp_path / "t").mkdir()
    with pytest.raises(ValueError, match=r"t has no tokenizer\.json"):
        Tokenizer.load(tmp_path / "t")
    with pytest.raises(ValueError, match=r"t names no end token: set eos_token in tokenizer_config.json"):
        Tokenizer.load(write(tmp_path / "t", {"bos_token": "<s>"}))
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: the eos_token '<end>' is not in the vocabulary"):
        Tokenizer.load(write(tmp_path / "t", {"eos_token": "<end>"}, {"eos_token_id": 4}))
    (tmp_path / "t" / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: not valid JSON"):
        Tokenizer.load(tmp_path / "t")
    (tmp_path / "t" / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json has no field 'model'"):
        Tokenizer.load(tmp_path / "t")
    (tmp_path / "t" / "tokenizer.json").write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer\.json: expected a JSON object, found list"):
        Tokenizer.load(tmp_path / "t")


def changed(folder, **fields):
    """Writes a folder whose tokenizer.json has the given fields. The fields in `model` go to the tokenizer's model."""
    write(folder, {"eos_token": "</s>"})
    found = json.loads((folder / "tokenizer.json").read_text())
    found["model"] |= fields.pop("model", {})
    (folder / "tokenizer.json").write_text(json.dumps(found | fields))
    return folder


def split(regex):
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Removed", "invert": False}


@pytest.mark.parametrize(
    ("field", "message"),
    [
        (dict(normalizer={"type": "Sequence", "normalizers": [{"type": "NFKC"}] * 99}), "have 101 steps; at most 100"),
        (
            dict(model={"type": "Unigram", "unk_id": 0, "vocab": [["</s>", 0.0], ["a" * 257, -1.0]]}),
            "the Unigram token 'aaa.*' has 257 characters; at most 256",
        ),
        (
            dict(
                normalizer={"type": "Replace", "pattern": {"String": "a"}, "content": "b" * 5000},
                added_tokens=[{"id": 9, "content": f"{i:0999}"} for i in range(3)],
            ),
            "can make the added tokens 15005000 characters long; at most 10000000",
        ),
    ],
)
def test_sizes_on_which_time_depends_have_limits(field, message, tmp_path):
    with pytest.raises(ValueError, match=rf"t/tokenizer.json: .*{message}"):
        Tokenizer.load(changed(tmp_path / "t", **field))


def test_a_regex_of_its_own_gives_what_the_library_gives(tmp_path):
    folder = changed(tmp_path / "t", pre_tokenizer=split("[ ;]"))
    ours, theirs = Tokenizer.load(folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs.no_padding()
    theirs.no_truncation()
    texts = ["a;b c", "", "</s> x\ud7ff🙂"]
    assert ours.encode_batch(texts) == [theirs.encode(text, add_special_tokens=False).ids for text in texts]
    assert ours.decode([0, 4, 1], skip_special_tokens=False) == "a </s> b" and ours.decode([0, 4]) == "a"
    assert ours.vocabulary() == theirs.get_vocab() and ours.vocab_size == 7 and ours.eos_token == "</s>"
    other = Tokenizer.load(changed(tmp_path / "u", pre_tokenizer=split("[ :]")))
    assert ours.fingerprint() != other.fingerprint() == Tokenizer.load(tmp_path / "u").fingerprint()
    changed(tmp_path / "v", pre_tokenizer=split("("))
    with pytest.raises(ValueError, match=r"v/tokenizer.json cannot be read as a tokenizer: .*end pattern"):
        Tokenizer.load(tmp_path / "v")


@pytest.mark.parametrize(
    "field",
    [
        dict(model={"type": "BPE", "merges": [], "continuing_subword_prefix": "u" * 1001}),
        dict(model={"type": "BPE", "merges": [], "end_of_word_suffix": "u" * 1001}),
        dict(model={"vocab": {"</s>": 0, "u" * 1001: 1}, "unk_token": "u" * 1001}),
        dict(added_tokens=[{"id": 9, "content": "u" * 1001}]),
    ],
)  # fmt: skip
def test_what_a_character_may_become_has_a_limit(field, tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer.json: the token, prefix or suffix 'uu.*uu' has 1001 characters"):
        Tokenizer.load(changed(tmp_path / "t", **field))


def test_large_vocabularies_are_compared_in_linear_time_and_five_tokens_are_named(tmp_path, monkeypatch):
    size = 150_000
    theirs = {**{f"w{i}": i for i in range(size)}, "</s>": size}
    ours = theirs | {f"w{i}": 10 + (i - 9) % 7 for i in range(10, 17)}  # seven tokens exchange their ids
    start = time.process_time()
    found = differing_tokens(ours, theirs)
    assert time.process_time() - start < 1
    assert found == [("w16", 10, 16), *((f"w{i}", i + 1, i) for i in range(10, 16))]

    for name, words in {"ours": ours, "theirs": theirs}.items():
        (tmp_path / name).mkdir()
        words = tokenizers.models.WordLevel(words, unk_token="w0")
        tokenizers.Tokenizer(words).save(str(tmp_path / name / "tokenizer.json"))
        (tmp_path / name / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    tokenizer, calls, vocabulary = Tokenizer.load(tmp_path / "ours"), [], Tokenizer.vocabulary
    monkeypatch.setattr(Tokenizer, "vocabulary", lambda self: calls.append(1) or vocabulary(self))
    with pytest.raises(ValueError) as caught:
        check_same_tokenizer(tmp_path / "theirs", tokenizer, "student")
    message = str(caught.value)
    assert len(calls) == 3  # each call builds a dictionary of the whole vocabulary
    assert "7 tokens differ" in message and message.count(f"{size + 1} ids") == 2
    assert "'w13' has id 14 in the run's and id 13 in the student's; ..." in message and "'w14'" not in message
    check_same_tokenizer(tmp_path / "ours", tokenizer, "student")


def test_a_token_that_one_side_lacks_differs():
    assert differing_tokens({"a": 0, "b": 1}, {"a": 0}) == [("b", 1, None)]
    assert differing_tokens({"a": 0}, {"a": 0, "b": 1}) == [("b", None, 1)]
    assert differing_tokens({"a": 0}, {"a": 0}) == []


def test_special_tokens_by_the_names_that_transformers_gives_a_template(tmp_path):
    """The result equals `special_tokens_map` of transformers 5.24 for the same folder."""
    config = {
        "bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>"}, "unk_token": None,
        "add_bos_token": True, "boi_token": "<boi>", "extra_special_tokens": {"image_token": "<img>"},
    }  # fmt: skip
    older = {"pad_token": {"content": "<pad>"}, "bos_token": "<pad>"}
    expected = {"bos_token": "<s>", "eos_token": "</s>", "boi_token": "<boi>", "image_token": "<img>"}
    folder = write(tmp_path / "t", config | {"added_tokens_decoder": {}})
    (folder / "special_tokens_map.json").write_text(json.dumps(older))
    assert Tokenizer.load(folder).special_tokens == expected
    folder = write(tmp_path / "u", config | {"bos_token": None})
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "<pad>"}}))
    assert Tokenizer.load(folder).special_tokens == {k: v for k, v in expected.items() if k != "bos_token"} | {
        "pad_token": "<pad>"
    }
