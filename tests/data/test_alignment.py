"""The bytes at which tokens end, and the spans of two tokenisations, on published cases and on random texts."""

import functools
import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from kd_jax.data import Tokenizer
from kd_jax.data.alignment import ByteReader, common_spans, pieces_of
from kd_jax.models import paths
from tests.helpers.folders import llama, save
from tests.helpers.paths import GOLDEN

STORED = json.loads((GOLDEN / "alignment.json").read_text())
CASES = [(STORED["texts"][text], *case) for text, *case in STORED["cases"]]
TEXTS = st.text(st.characters(exclude_categories=("Cs",)) | st.sampled_from(" \n▁aé🙂"), max_size=12)


@functools.cache
def byte_level():
    return ByteReader(Tokenizer.load(paths.folder("package:docstrings_teacher")))


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    return ByteReader(Tokenizer.load(llama(tmp_path_factory.mktemp("llama"))))


@pytest.fixture(scope="module")
def lowercase(tmp_path_factory):
    """A tokenizer of lower-case words, whose tokens do not give the bytes of the text."""
    words = ["[UNK]", "</s>", "a", "##b", "zu", "##rich", "."]
    made = tokenizers.Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    folder = save(tmp_path_factory.mktemp("lower"), made, tokenizer_config={"eos_token": "</s>"})
    return ByteReader(Tokenizer.load(folder))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0][:12]!r}-{case[1]}-{case[2]}")
def test_published_spans(case):
    *_, first_ends, second_ends, spans = case
    np.testing.assert_array_equal(common_spans(first_ends, second_ends), np.reshape(spans, (-1, 6)))
    swapped = common_spans(second_ends, first_ends)[:, [2, 3, 0, 1, 4, 5]]
    np.testing.assert_array_equal(swapped, np.reshape(spans, (-1, 6)))


def test_all_published_cases_are_here():
    assert len(CASES) == 80 and len(STORED["texts"]) == 20


@pytest.mark.parametrize("text", STORED["texts"])
def test_published_ends_of_a_byte_level_tokenizer(text):
    [ids, ends] = next(case[4::2][:2] for case in CASES if case[0] == text and case[2] == "docstrings_teacher")
    found = byte_level().encode(text)
    assert found.ids.tolist() == ids and found.ends.tolist() == ends


@given(TEXTS, TEXTS)
@settings(max_examples=60, deadline=None)
def test_ends_of_any_text_after_any_text(sentencepiece, before, text):
    for reader in (byte_level(), sentencepiece):
        found = reader.encode(text, before)
        assert found is not None and np.all(np.diff(found.ends) >= 0)
        assert (found.ends[-1] if len(found.ids) else 0) == len(text.encode())
        # The bytes of each prefix of the tokens end where the ends say.
        for count, end in enumerate(found.ends.tolist(), start=1):
            joined = reader.join(found.ids[:count].tolist())
            assert end == 0 or joined.endswith(text.encode()[:end])


@given(TEXTS)
@settings(max_examples=60, deadline=None)
def test_spans_are_the_finest_common_division(sentencepiece, text):
    first, second = byte_level().encode(text), sentencepiece.encode(text)
    spans = common_spans(first.ends, second.ends)
    common = sorted((set(first.ends.tolist()) & set(second.ends.tolist())) - {0})
    assert spans[:, 5].tolist() == common  # one span ends at each common boundary
    for side, reader, reading in ((0, byte_level(), first), (2, sentencepiece, second)):
        assert spans[:, side].tolist() == [0, *spans[:-1, side + 1].tolist()][: len(spans)]
        assert spans[-1:, side + 1].tolist() == [len(reading.ids)][: len(spans)]
        for span in spans.tolist():
            joined = reader.join(reading.ids[span[side] : span[side + 1]].tolist())
            of_text = text.encode()[span[4] : span[5]]
            assert joined == of_text or (span[side] == 0 and joined == b" " + of_text)


@given(st.lists(st.integers(0, 6)), st.lists(st.integers(0, 6)))
def test_spans_of_any_ends(first, second):
    first, second = np.cumsum(first), np.cumsum(second)
    spans = common_spans(first, second)
    assert spans[:, 5].tolist() == sorted((set(first.tolist()) & set(second.tolist())) - {0})
    for side, ends in ((1, first), (3, second)):  # of tokens that end at the same byte, the span has all
        assert spans[:, side].tolist() == [np.searchsorted(ends, cut, "right") for cut in spans[:, 5]]


def test_ends_that_decrease_are_refused():
    with pytest.raises(ValueError, match="never decrease"):
        common_spans([3, 2], [3])
    with pytest.raises(ValueError, match="at least 0"):
        common_spans([1], [-1, 1])


def test_an_emoji_of_several_tokens(sentencepiece):
    found = sentencepiece.encode("a🙂")
    assert found.ends.tolist() == [0, 1, 2, 3, 4, 5]  # the added space, the letter, and four bytes


def test_added_tokens_stand_for_their_text(tmp_path):
    made = tokenizers.Tokenizer.from_file(str(paths.folder("package:docstrings_teacher") / "tokenizer.json"))
    made.add_tokens([" é", "<tool>"])
    made.add_special_tokens(["<|end|>"])
    reader = ByteReader(Tokenizer.load(save(tmp_path, made, tokenizer_config={"eos_token": "<|end|>"})))
    found = reader.encode("x é<tool><|end|>y")
    assert found.ends.tolist() == [1, 4, 10, 17, 18]


def test_a_token_that_begins_before_the_text(sentencepiece):
    found = sentencepiece.encode("Romeo", before="Say ")  # "▁Romeo" is not made, because "▁R" merges first
    joined = sentencepiece.join(found.ids.tolist())
    assert joined == b" Romeo" and not found.is_apart and found.ends[-1] == 5
    assert sentencepiece.encode("Romeo").is_apart  # the space is added, and is not a part of the text before
    assert byte_level().encode("foo", before="bar\n").is_apart


def test_a_tokenizer_that_changes_the_text(lowercase):
    assert lowercase.pieces is None
    found = lowercase.encode("ab. Zürich")
    assert found.ids.tolist() == [2, 3, 6, 4, 5] and found.ends.tolist() == [1, 2, 3, 7, 11]
    text, reading = lowercase.written(found.ids.tolist())
    assert text == b"ab. zurich" and reading.ends.tolist() == [1, 2, 3, 6, 10]
    assert lowercase.written([3, 2]) is None  # the text of these tokens has other tokens


def test_text_that_a_model_wrote(sentencepiece):
    ids = sentencepiece.encode("a🙂").ids.tolist()
    text, reading = sentencepiece.written(ids)
    assert text == "a🙂".encode() and reading.ends.tolist() == [0, 1, 2, 3, 4, 5]
    text, reading = sentencepiece.written(ids[:4])  # the last character is not complete
    assert text == b"a" and reading.ends.tolist() == [0, 1, 2, 3]
    assert sentencepiece.written([ids[3], *ids]) is None  # a byte that begins no character
    # After a space of the text before, no space is added, and a written space is text.
    assert sentencepiece.written(ids[:2], before="x ")[0] == b" a"


def test_other_decoders_have_no_bytes_of_a_token():
    pattern = {"type": "Replace", "pattern": {"Regex": "x"}, "content": ""}
    for decoder in (None, {"type": "WordPiece"}, {"type": "Sequence", "decoders": [pattern]}):
        assert pieces_of({"decoder": decoder}, {"a": 0}) is None
    metaspace = {"decoder": {"type": "Metaspace", "replacement": "_"}, "added_tokens": [{"content": "_b"}]}
    assert pieces_of(metaspace, {"_a": 0, "_b": 2}) == (b" a", b"", b"_b")


def test_nfc_uses_the_offsets(tmp_path):
    made = tokenizers.Tokenizer.from_file(str(paths.folder("package:docstrings_teacher") / "tokenizer.json"))
    made.normalizer, made.post_processor = normalizers.NFC(), processors.ByteLevel(trim_offsets=False)
    made.add_special_tokens(["<|end|>"])
    reader = ByteReader(Tokenizer.load(save(tmp_path, made, tokenizer_config={"eos_token": "<|end|>"})))
    text = "cafe\u0301 x"
    found = reader.encode(text)
    assert found.ends[-1] == len(text.encode()) and 6 in found.ends.tolist()
