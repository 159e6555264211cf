"""Rows of text as ids with the common kinds of tokenizers: the start of a response and the tokens around a prompt."""

import pytest

from kd_jax import data
from tests.helpers import folders


def row(prompt, response, context=""):
    return {"prompt": prompt, "context": context, "response": response}


def tokens(tokenizer, ids):
    """Returns the pieces of the ids."""
    names = {number: piece for piece, number in tokenizer.vocabulary().items()}
    return [names[number] for number in ids]


def tokenize(tokenizer, rows, template="plain", **options):
    return data.tokenize(rows, tokenizer, **{"template": template, "max_length": 64, "max_prompt_length": 32} | options)


def test_prompt_and_response_are_one_text(tmp_path):
    """The pieces equal those of LlamaTokenizerFast for the joined text: the response begins without "▁"."""
    tokenizer = data.Tokenizer.load(folders.llama(tmp_path / "t"))
    rows, _ = tokenize(tokenizer, [row("Say it:", "Romeo, Romeo")])
    prompt = ["<s>", "▁", "S", "a", "y", "▁", "i", "t", ":", "<0x0A>"]
    assert tokens(tokenizer, rows[0]) == [*prompt, "R", "om", "eo", ",", "▁R", "om", "eo", "</s>"]
    assert rows.prompt_lengths.tolist() == [len(prompt)]
    (alone,) = data.encode_prompts(
        [row("Say it:", "")], tokenizer=tokenizer, template="plain", max_length=32, cut=False
    )
    assert alone == rows[0][: len(prompt)].tolist(), "a model is asked with the ids that it was trained on"


@pytest.mark.parametrize("prompt", ["é", "a", "😀", ""])
@pytest.mark.parametrize("response", ["é😀", "a b", " a", "\n\na"])
def test_the_split_is_at_the_responses_first_character(prompt, response, tmp_path):
    tokenizer = data.Tokenizer.load(folders.llama(tmp_path / "t"))
    ((first, second),) = tokenizer.encode_pairs([(prompt, response)])
    assert first + second == tokenizer.encode(prompt + response)
    assert tokenizer.decode(first + second) == prompt + response
    assert tokenizer.decode(first).strip() == prompt


def test_a_token_with_characters_of_both_belongs_to_the_response(tmp_path):
    tokenizer = data.Tokenizer.load(folders.llama(tmp_path / "t"))
    ((first, second),) = tokenizer.encode_pairs([("e", "o"), ("a e", "oa")][1:])
    assert (tokens(tokenizer, first), tokens(tokenizer, second)) == (["▁", "a", "▁"], ["eo", "a"])


@pytest.mark.parametrize("template", ["plain", "alpaca"])
def test_no_end_stands_between_prompt_and_response(template, tmp_path):
    folder = folders.llama(tmp_path / "t", post="<s> $A </s>", add_eos_token=True)
    tokenizer = data.Tokenizer.load(folder)
    rows, _ = tokenize(tokenizer, [row("a", "b")], template, max_prompt_length=300, max_length=400)
    assert rows[0].tolist().count(tokenizer.eos_id) == 1 and rows[0][-1] == tokenizer.eos_id
    assert rows[0].tolist().count(tokenizer.bos_id) == 1 and rows[0][0] == tokenizer.bos_id
    (prompt,) = data.encode_prompts([row("a", "")], tokenizer=tokenizer, template=template, max_length=300, cut=False)
    assert prompt == rows[0][: rows.prompt_lengths[0]].tolist() and prompt[-1] != tokenizer.eos_id


def test_a_response_has_exactly_one_end(tmp_path):
    tokenizer = data.Tokenizer.load(folders.llama(tmp_path / "t"))
    rows, counts = tokenize(tokenizer, [row("a", "b"), row("a", "b</s>"), row("a", "b</s></s>"), row("a", "</s>")])
    assert len({tuple(rows[i]) for i in range(3)}) == 1
    assert (counts["kept"], counts["empty"]) == (3, 1)
    packed, _ = data.pack([row("", "b</s>"), row("", "b")], tokenizer, max_length=32)
    assert tokens(tokenizer, packed[0]) == ["▁", "b", "</s>", "▁", "b", "</s>"]


def test_a_bos_in_the_text_is_not_put_there_again(tmp_path):
    tokenizer = data.Tokenizer.load(folders.llama(tmp_path / "t"))
    rows, counts = tokenize(tokenizer, [row("<s>a", "b"), row("a", "b")])
    assert [rows[i].tolist().count(tokenizer.bos_id) for i in range(2)] == [1, 1]
    assert counts["own_prefix"] == 1


def test_the_users_text_is_truncated_and_never_the_template(tmp_path):
    tokenizer = folders.letters(tmp_path / "t")
    template = "{{ 'ab' + messages[0].content + 'yz' }}"
    tokenizer.chat_template = template
    source = [row("cdefgh", "k"), row("cd", "k", context="lmnop"), row("cd", "k")]
    rows, counts = tokenize(tokenizer, source, "chat", max_prompt_length=7, max_length=16, long_prompts="cut")
    assert [tokenizer.decode(rows[i][: rows.prompt_lengths[i]]).replace(" ", "") for i in range(3)] == [
        "abcdeyz", "abcdlyz", "abcdyz",
    ]  # fmt: skip
    assert counts["prompts_cut"] == 2 and counts["prompts_dropped"] == 0
    prompts = data.encode_prompts(source, tokenizer=tokenizer, template="chat", max_length=7, cut=True)
    assert prompts == [rows[i][: rows.prompt_lengths[i]].tolist() for i in range(3)]


def test_a_template_that_does_not_fit_is_an_error(tmp_path):
    tokenizer = folders.letters(tmp_path / "t")
    tokenizer.chat_template = "{{ 'ab' + messages[0].content + 'yz' }}"
    with pytest.raises(ValueError, match="the template chat writes 4 tokens around an empty prompt, and max_prompt_"):
        tokenize(tokenizer, [row("c", "d")], "chat", max_prompt_length=3, long_prompts="cut")


def test_ids_at_hand_are_not_encoded_again(tmp_path):
    """A model may draw other pieces, such as "R", "o", "m", than the tokenizer gives for the same text."""
    tokenizer = data.Tokenizer.load(folders.llama(tmp_path / "t"))
    ids = [tokenizer.vocabulary()[piece] for piece in ("▁", "R", "o", "m")]
    rows, counts = data.from_ids([([1, 5], [*ids, 2]), ([1, 5], ids)], tokenizer, max_length=16)
    assert rows[0].tolist() == rows[1].tolist() == [1, 5, *ids, 2]
    assert tokenizer.encode(tokenizer.decode(ids)) != ids and counts["kept"] == 2
