"""Conversations: the tokens of ten published chat templates, the counted turns, and prompts of all turns before an answer.

The expected tokens are from `apply_chat_template` of transformers, with the tokenizers of `folders`
(`tests/golden/README.md`).
"""

import json

import pytest

from kd_jax import data
from kd_jax.data import Template
from kd_jax.data.encoding import Encoder
from kd_jax.data.turns import Turns, answered
from tests.helpers import folders
from tests.helpers.paths import ROOT

CASES = json.loads((ROOT / "tests" / "golden" / "chat_templates.json").read_text())
EXPECTED = [(name, conversation) for name, of_one in CASES["expected"].items() for conversation in of_one]


def load(folder, name, template=""):
    """Loads the tokenizer of a chat template, with the template's end of a turn."""
    case = CASES["templates"][name]
    named = {"eos_token": case["eos_token"], "chat_template": template or case["template"]}
    if case["kind"] == "llama":
        folders.llama(folder / name, **named)
    elif not (folder / name).exists():
        folders.byte_level(folder / name, case["special"], case["added"], case["bos_token"] or "", **named)
    return data.with_template_end(data.Tokenizer.load(folder / name), "chat")


def row_of(messages, name="chat.jsonl:1", **columns):
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    return {
        "name": name, "prompt": messages[last - 1]["content"], "context": "", "response": messages[last]["content"],
        "messages": json.dumps(messages),
    } | columns  # fmt: skip


def turns(*contents):
    """Returns the turns of a user and of the assistant in alternation."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def tokenize(tokenizer, rows, **options):
    return data.tokenize(rows, tokenizer, **{"template": "chat", "max_length": 400, "max_prompt_length": 300} | options)


def counted(tokenizer, rows, index=0):
    """Returns the text of each part of a row that the loss counts."""
    ids, mask = rows[index].tolist(), [False, *rows.targets_counted(index)]
    parts, part = [], []
    for i, is_counted in zip([*ids, None], [*mask, False], strict=True):
        if is_counted:
            part.append(i)
        elif part:
            parts.append(tokenizer.decode(part, skip_special_tokens=False))
            part = []
    return parts


@pytest.mark.parametrize(("name", "conversation"), EXPECTED)
def test_tokens_are_those_of_transformers(name, conversation, tmp_path):
    tokenizer, messages = load(tmp_path, name), CASES["conversations"][conversation]
    expected, row = CASES["expected"][name][conversation], row_of(messages)
    if "error" in expected:
        with pytest.raises(ValueError, match=r"^chat.jsonl:1: the chat_template of .* failed on the conversation") as error:
            tokenize(tokenizer, [row])
        assert expected["error"] in str(error.value)
        return
    rows, _ = tokenize(tokenizer, [row], loss_on="all")
    length = len(rows[0])
    assert rows[0].tolist() == expected["whole"][:length]
    rest = tokenizer.decode(expected["whole"][length:], skip_special_tokens=False)
    assert rest.strip() in ("", tokenizer.eos_token), "only white space, and the end of the text, follow the last turn"
    (prompt,) = data.encode_prompts(
        [{**row, "response": ""}], tokenizer=tokenizer, template="chat", max_length=300, cut=False
    )
    assert prompt == expected["prompt"]
    last, _ = tokenize(tokenizer, [row])
    assert last[0].tolist() == rows[0].tolist()
    if name != "olmo" and tokenizer.bos_id is not None and name != "smollm2":
        assert rows[0].tolist().count(tokenizer.bos_id) == (0 if name in ("zephyr", "phi3") else 1)


@pytest.mark.parametrize("name", CASES["templates"])
def test_all_turns_or_the_last_turn_count_with_their_ends(name, tmp_path):
    tokenizer = load(tmp_path, name)
    row = row_of(CASES["conversations"]["several"])
    (last,) = counted(tokenizer, tokenize(tokenizer, [row])[0])
    parts = counted(tokenizer, tokenize(tokenizer, [row], loss_on="all")[0])
    end = tokenizer.backend.id_to_token(tokenizer.eos_id)
    lead = {"mistral": "", "zephyr": "\n"}.get(name, "")
    thinks = "<think>\n\n</think>\n\n" if name == "qwen3" else ""
    answers = ["Romeo.", "a\n\nb", "Say it"]
    assert [part.removeprefix(lead).strip(" ") for part in parts] == [
        *(answer + end for answer in answers[:2]), thinks + answers[2] + end,
    ]  # fmt: skip
    assert last == parts[-1] and tokenize(tokenizer, [row], loss_on="last")[0].tokens.tolist() == last_tokens(
        tokenizer, row
    )


def last_tokens(tokenizer, row):
    return tokenize(tokenizer, [row])[0].tokens.tolist()
