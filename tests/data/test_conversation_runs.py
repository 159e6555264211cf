"""Runs on files of conversations: off policy and on policy, with views, columns, caches of a teacher, and packing."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kd_jax import cache_teacher, metrics, train
from kd_jax.data import Tokenizer
from tests.helpers.paths import ROOT
from tests.helpers.runs import smoke

pytestmark = pytest.mark.usefixtures("one_device")
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}{% if message['role'] == 'assistant' %}"
    "{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
NOUNS = ("path", "name", "list", "value", "key", "file", "size", "text")


def conversation(i):
    """Returns a row with two turns of the assistant, a hint and a domain."""
    noun, other = NOUNS[i % 8], NOUNS[i // 8 % 8]
    turns = [
        {"role": "system", "content": "Write docstrings."},
        {"role": "user", "content": f"def get_{noun}_{i}(self): return self.{noun}"},
        {"role": "assistant", "content": f"Returns the {noun}."},
        {"role": "user", "content": f"def set_{other}(self, {other}): self.{other} = {other}"},
        {"role": "assistant", "content": f"Sets the {other}."},
    ]
    return {"messages": turns, "hint": f"It sets the {other}.", "domain": "even" if i % 2 == 0 else "odd"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a tokenizer that has a chat template, and the same conversations in two formats."""
    folder = tmp_path_factory.mktemp("conversations")
    tokenizer = folder / "tokenizer"
    Tokenizer.load(ROOT / "kd_jax" / "assets" / "docstrings_teacher").save(tokenizer)
    fields = json.loads((tokenizer / "tokenizer_config.json").read_text())
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(fields | {"chat_template": TEMPLATE}))
    rows = [conversation(i) for i in range(64)]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), folder / "chat.parquet")
    return folder


def config(files, method="forward_kl", file="chat.jsonl", **changes):
    options = dict(
        data__name="jsonl", data__template="chat", tokenizer__path=str(files / "tokenizer"), data__max_length=128,
        data__max_prompt_length=90, sampling__max_new_tokens=16, data__batch_size=8, data__eval_batch_size=8,
        data__eval_rows=8, eval_prompts=0,
    )  # fmt: skip
    made = smoke(method, files / "data", **options | changes)
    made.student.config.max_positions = 256
    made.data.options = {"path": str(files / file), "validation_fraction": 0.2}
    return made


def responses(run, batch):
    """Returns the texts of the counted parts of each row of a batch."""
    texts = [
        run.tokenizer.decode(t[m].tolist(), False) for t, m in zip(batch["targets"], batch["loss_mask"], strict=True)
    ]
    return [text.split("<|endoftext|>")[:-1] for text in texts]


def test_off_policy_all_turns_count_in_one_row_and_the_start_lines_say_so(files):
    run = train.build(config(files, data__loss_on="all"))
    for parts in responses(run, run.feed.next(0, None)):
        assert len(parts) == 2 and parts[0].startswith("Returns the ") and parts[1].startswith("Sets the ")
    assert run.remarks[0] == (
        "the rows are conversations in the field messages (format messages); the loss counts all turns of the assistant "
        "(data.loss_on='all')"
    )
    last = train.build(config(files))
    assert all(len(parts) == 1 and parts[0].startswith("Sets") for parts in responses(last, last.feed.next(0, None)))
    assert "the assistant's last turn" in last.remarks[0]
    held_out = next(last.eval_batches())
    assert all(len(parts) <= 1 for parts in responses(last, held_out))


def test_packed_rows_and_a_stream_of_conversations(files):
    run = train.build(config(files, data__loss_on="all", data__packing="rows", data__max_length=256))
    assert sum(map(len, responses(run, run.feed.next(0, None)))) >= 16
    run = train.build(config(files, data__packing="stream"))
    assert run.feed.next(0, None)["loss_mask"].all()


def test_on_policy_prompts_are_all_turns_before_an_answer(files):
    for loss_on, count in (("last", 1), ("all", 2)):
        run = train.build(config(files, "gkd", data__loss_on=loss_on))
        params = run.init_state().params
        kept = run.counts["train"]["kept"]
        assert run.counts["train"]["read"] == kept == count * 55, "nine of 64 conversations are held out"
        run.feed.next(0, params)
        batch = run.feed.next(1, params)
        texts = [
            run.tokenizer.decode(t[: m.argmax() + 1].tolist(), False)
            for t, m in zip(batch["tokens"], batch["loss_mask"], strict=True)
        ]
        assert all(
            text.startswith("<|system|>\nWrite docstrings.\n<|user|>\n") and text.endswith("<|assistant|>\n")
            for text in texts
        )
        assert {text.count("<|assistant|>") for text in texts} <= set(range(1, 3))
        if loss_on == "last":
            assert all(text.count("<|assistant|>") == 2 and "Returns the" in text for text in texts)
    assert "each turn of the assistant is a row" in run.remarks[0]


def test_views_and_conditions_read_the_columns_of_a_conversation(files):
    view = {"name": "template", "text": "{prompt}\nHint: {hint}"}
    made = config(files, teacher__view=view)
    made.objective.terms.distil.where = {"domain": ("odd",)}
    batch = train.build(made).feed.next(0, None)
    run = train.build(made)
    shown = run.tokenizer.decode(
        batch["teacher_view_teacher_tokens"][0][batch["teacher_view_teacher_mask"][0]].tolist(), False
    )
    assert shown.count("Hint: It sets the") == 1 and shown.index("Returns the") < shown.index("Hint: ")
    name = next(key for key in batch if key.startswith("where_"))
    assert 0 < batch[name].any(axis=1).sum() < len(batch[name])
    made.data.loss_on = "all"
    with pytest.raises(ValueError, match=r"teacher.view changes the prompt, .* data.loss_on='all'"):
        train.build(made)
    made.data.loss_on, made.teacher.view = "response", {**view, "text": "{prompt} {hynt}"}
    with pytest.raises(
        ValueError, match=r"chat.jsonl:1: the field 'hynt' is missing; .* teacher.view asks for this field"
    ):
        train.build(made)


def test_plain_text_needs_the_template_plain_and_no_answers(files):
    (files / "text.jsonl").write_text("".join(json.dumps({"text": f"Returns the {n}. " * 30}) + "\n" for n in NOUNS))
    with pytest.raises(
        ValueError, match=r"data.template='chat' writes a prompt, but the rows of data.name='jsonl' are plain"
    ):
        train.build(config(files, file="text.jsonl"))
    run = train.build(config(files, file="text.jsonl", data__template="plain", data__packing="stream"))
    batch = run.feed.next(0, None)
    assert np.array_equal(batch["loss_mask"], batch["mask"]) and "plain text in the field text" in run.remarks[0]
    with pytest.raises(ValueError, match="needs a dataset with prompts"):
        train.build(config(files, "gkd", file="text.jsonl", data__template="plain"))


def test_dropped_rows_are_shown(files):
    rows = [conversation(i) for i in range(64)]
    for row in rows[::3]:
        row["messages"][1]["content"] *= 3
    (files / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = train.build(config(files, file="long.jsonl", data__long_prompts="drop"))
    assert run.counts["train"]["prompts_dropped"] and run.counts["train"]["kept"]
    assert any("train, rows dropped for their prompts: for example long.jsonl:" in remark for remark in run.remarks)
    run = train.build(config(files, file="long.jsonl"))
    assert run.counts["train"]["prompts_cut"] and not run.counts["train"]["prompts_dropped"]
    assert any("train, prompts truncated: for example long.jsonl:" in remark for remark in run.remarks)


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["none", "rows"])
def test_a_cache_of_all_turns_gives_the_loss_of_the_teacher(files, packing, tmp_path):
    made = config(files, data__loss_on="all", data__packing=packing, steps=3)
    cache_teacher.write(made, str(tmp_path / "cache"), "hidden", part_rows=100, quiet=True)
    online = train.train(made, str(tmp_path / "online"), quiet=True)
    made.teacher.cache = str(tmp_path / "cache")
    cached = train.train(made, str(tmp_path / "cached"), quiet=True)
    assert cached["after"]["forward_kl"] == pytest.approx(online["after"]["forward_kl"], rel=1e-3)
    made.data.loss_on = "last"
    with pytest.raises(ValueError, match="data.loss_on: 'all' in the cache, 'last' now"):
        train.build(made)


@pytest.mark.slow
def test_a_teacher_answers_each_turn_of_the_assistant(files):
    run = train.build(
        config(files, "seqkd", data__loss_on="all", sampling__max_new_tokens=40, data__max_prompt_length=80)
    )
    assert run.counts["train"]["prompts"] == 2 * 55 and run.counts["train"]["kept"]
    batch = run.feed.next(0, None)
    assert all(
        len(parts) == 1 for parts, mask in zip(responses(run, batch), batch["loss_mask"], strict=True) if mask.any()
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "file", "loss_on"),
    [("forward_kl", "chat.jsonl", "all"), ("gkd", "chat.parquet", "all"), ("gkd", "chat.jsonl", "last")],
)
def test_the_loss_falls_on_conversations(files, method, file, loss_on, tmp_path):
    made = config(
        files,
        method,
        file,
        data__loss_on=loss_on,
        steps=30,
        eval_every=30,
        checkpoint_every=30,
        log_every=5,
        eval_prompts=4,
    )
    result = train.train(made, str(tmp_path / "run"), quiet=True)
    assert result["after"]["cross_entropy"] < 0.95 * result["before"]["cross_entropy"]
    assert result["after"]["forward_kl"] < result["before"]["forward_kl"]
    rows = json.loads((tmp_path / "run" / "rows.json").read_text())
    assert rows["counts"]["train"]["kept"] and "conversations" in rows["remarks"][0]
    losses = [line["loss"] for line in metrics.read(tmp_path / "run") if line["split"] == "train"]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
