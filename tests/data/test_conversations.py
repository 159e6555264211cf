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
        with pytest.raises(
            ValueError, match=r"^chat.jsonl:1: the chat_template of .* failed on the conversation"
        ) as error:
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


def test_generation_marks_decide_the_counted_tokens(tmp_path):
    marked = CASES["marked"]
    tokenizer = load(tmp_path, "chatml", marked["template"])
    for conversation, expected in marked["expected"].items():
        rows, _ = tokenize(tokenizer, [row_of(CASES["conversations"][conversation])], loss_on="all")
        length = len(rows[0])
        assert rows[0].tolist() == expected["whole"][:length] and "1" not in expected["mask"][length:]
        assert "".join(str(int(is_counted)) for is_counted in rows.targets_counted(0)) == expected["mask"][1:length]
    several = row_of(CASES["conversations"]["several"])
    assert counted(tokenizer, tokenize(tokenizer, [several])[0]) == ["Say it<|im_end|>\n"]
    assert counted(tokenizer, tokenize(tokenizer, [several], loss_on="all")[0]) == [
        "Romeo.<|im_end|>\n", "a\n\nb<|im_end|>\n", "Say it<|im_end|>\n",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["chatml", "gemma", "mistral"])
def test_special_tokens_in_a_users_text_are_text(name, tmp_path):
    tokenizer = load(tmp_path, name)
    end = tokenizer.backend.id_to_token(tokenizer.eos_id)
    said = f"a{end}b {end}"
    row = row_of(turns(said, "ok"))
    for rows in (tokenize(tokenizer, [row]), tokenize(tokenizer, [{**row, "messages": ""}])):
        ids, length = rows[0][0].tolist(), int(rows[0].prompt_lengths[0])
        honest = tokenize(tokenizer, [row_of(turns("ab ", "ok"))])[0][0].tolist()
        assert ids.count(tokenizer.eos_id) == honest.count(tokenizer.eos_id), "no end of a turn is added"
        assert said in tokenizer.decode(ids[:length], skip_special_tokens=False)
        assert counted(tokenizer, rows[0])[0].strip() == f"ok{end}"
    several = row_of(turns(said, "yes", said, "ok"))
    parts = counted(tokenizer, tokenize(tokenizer, [several], loss_on="all")[0])
    assert [part.strip() for part in parts] == [f"yes{end}", f"ok{end}"]


def test_a_special_token_as_text_has_the_tokens_of_a_tokenizer_without_it(tmp_path):
    tokenizer = load(tmp_path, "chatml")
    bare = data.Tokenizer.load(folders.byte_level(tmp_path / "bare", ["<|endoftext|>"], eos_token="<|endoftext|>"))
    said = "x <|im_start|>us\ufdd0er"
    ids = tokenize(tokenizer, [row_of(turns(said, "ok"))])[0][0].tolist()
    start = tokenizer.encode("<|im_start|>user\n")
    expected = bare.encode(said.replace("\ufdd0", "\ufffd"))
    assert ids[: len(start) + len(expected)] == start + expected


@pytest.mark.parametrize(
    ("name", "messages", "message"),
    [
        ("gemma", turns("a", "b")[:1] * 2 + turns("a", "b")[1:], "Conversation roles must alternate user/assistant"),
        ("zephyr", [{"role": "critic", "content": "Hm."}, *turns("a", "b")], "does not write a turn of the role 'critic'"),
        ("mistral", [{"role": "system", "content": "Hm."}, *turns("a", "b")], "roles must alternate"),
    ],
)  # fmt: skip
def test_a_conversation_that_the_template_refuses_is_named_with_its_line(name, messages, message, tmp_path):
    with pytest.raises(
        ValueError, match=r"^shard.parquet:7: the chat_template of .* failed .* begins 'a': .*"
    ) as error:
        tokenize(load(tmp_path, name), [row_of(messages, "shard.parquet:7")])
    assert message in str(error.value)


def test_other_templates_write_only_one_exchange(tmp_path):
    tokenizer = load(tmp_path, "chatml")
    one, other = ({**row_of(turns("a", "b")), "messages": messages} for messages in (json.dumps(turns("a", "b")), ""))
    rows = tokenize(tokenizer, [one, other], template="plain")[0]
    assert rows[0].tolist() == rows[1].tolist()
    with pytest.raises(
        ValueError, match=r"chat.jsonl:1: the row is a conversation .* data.template='plain' cannot write"
    ):
        tokenize(tokenizer, [row_of(turns("a", "b", "c", "d"))], template="plain")


def test_long_conversations_are_dropped_truncated_and_shown(tmp_path):
    tokenizer = load(tmp_path, "chatml")
    rows = [
        row_of(turns("a" * 9, "b" * 9, "c" * 9, "d"), "x:1"),
        row_of(turns("a", "b"), "x:2"),
        row_of(turns("a" * 50, ""), "x:3"),
    ]
    sizes = dict(max_length=60, max_prompt_length=30)
    dropped, counts = tokenize(tokenizer, rows, **sizes)
    assert (counts["prompts_dropped"], counts["empty"], counts["kept"]) == (1, 1, 1)
    assert dropped.examples == {"prompts_dropped": "x:1, 'ccccccccc'", "empty": f"x:3, {'a' * 50!r}"}
    shorter, counts = tokenize(tokenizer, rows[:2], long_prompts="cut", **sizes)
    assert (counts["prompts_cut"], counts["kept"]) == (1, 2)
    assert tokenizer.decode(shorter[0].tolist(), False).startswith(
        "<|im_start|>user\nccccccccc<|im_end|>\n<|im_start|>assist"
    )
    whole, counts = tokenize(tokenizer, rows[:1], loss_on="all", max_length=45, max_prompt_length=30)
    assert counts["responses_cut"] == 1 and len(whole[0]) == 36 and len(counted(tokenizer, whole)) == 1
    with pytest.raises(ValueError, match="no row is left"):
        tokenize(tokenizer, rows[:1], loss_on="all", long_responses="drop", max_length=45, max_prompt_length=30)


def test_a_batch_has_several_counted_parts_also_when_packed(tmp_path):
    tokenizer = load(tmp_path, "chatml")
    source = [row_of(turns("q", "one", "q", "two")), row_of(turns("q", "three"))]
    rows, _ = tokenize(tokenizer, source, loss_on="all")
    for packed in (rows, data.pack_rows(rows, max_length=400)):
        batch = next(
            iter(data.batches(packed, batch_size=len(packed), max_length=400, seed=0, shuffle=False, pad_id=0))
        )
        texts = [
            tokenizer.decode(t[m].tolist(), False) for t, m in zip(batch["targets"], batch["loss_mask"], strict=True)
        ]
        assert sorted("".join(texts).split("<|im_end|>")) == ["", "one", "three", "two"]


def test_the_system_message_of_the_config_and_what_the_template_adds(tmp_path):
    added = lambda name, **options: Turns(Template("chat", **options), load(tmp_path, name)).added()
    assert "You are Qwen, created by Alibaba Cloud." in added("qwen2.5") and "named SmolLM" in added("smollm2")
    assert [added(name) for name in ("qwen3", "llama3", "mistral", "gemma", "phi3", "zephyr", "chatml", "olmo")] == [
        ""
    ] * 8
    assert added("qwen2.5", system="Be brief.") == ""
    tokenizer = load(tmp_path, "chatml")
    own = [{"role": "system", "content": "Mine."}, *turns("a", "b")]
    rows, _ = tokenize(tokenizer, [row_of(turns("a", "b")), row_of(own)], template=Template("chat", system="Be brief."))
    texts = [tokenizer.decode(rows[i].tolist(), False) for i in range(2)]
    assert texts[0].startswith("<|im_start|>system\nBe brief.<|im_end|>") and "Be brief." not in texts[1]


def test_only_turns_with_a_prompt_are_answered():
    roles = ("system", "assistant", "user", "assistant", "tool", "assistant", "user")
    assert answered([{"role": role} for role in roles]) == [3, 5]


def test_a_changed_prompt_replaces_the_last_one(tmp_path):
    tokenizer = load(tmp_path, "chatml")
    row = row_of(turns("first", "yes", "second", "no"))
    (one,) = Encoder(tokenizer, "chat").rows([{**row, "prompt": "HINT"}])
    text = tokenizer.decode(one.prompt, False)
    assert "first" in text and "HINT" in text and "second" not in text
    assert tokenizer.decode(one.response, False) == "no<|im_end|>"
