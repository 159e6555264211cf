"""Files of the user's own in all formats: what is recognised, how rows become prompts and responses, and bad input."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kd_jax import data
from kd_jax.data import jsonl, shards

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SHARE_GPT = [{"from": "gpt", "value": "Hi"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
FORMATS = {
    "messages": ({"messages": TURNS, "prompt": "ignored"}, "q", "", "a"),
    "conversations": ({"conversations": SHARE_GPT, "system": "Be brief."}, "q", "", "a"),
    "prompt_response": ({"prompt": "q", "response": "a", "text": "ignored"}, "q", "", "a"),
    "instruction": ({"instruction": "q", "input": "c", "output": "a"}, "q", "c", "a"),
    "text": ({"text": "a"}, "", "", "a"),
}


def numbered(row, count=12):
    """Returns rows that differ in their texts and have a hint."""
    texts = [json.dumps(row).replace('"q"', f'"q{i}"').replace('"a"', f'"a{i}"') for i in range(count)]
    return [json.loads(text) | {"hint": f"h{i}"} for i, text in enumerate(texts)]


def write(folder, kind, rows):
    """Writes the rows in a format, and returns the path of the file or folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    path = folder / {"folder": "shards", "saved": "saved", "saved_dict": "saved_dict"}.get(kind, f"rows.{kind}")
    if kind == "jsonl":
        path.write_text(lines)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=1))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=5)
    elif kind == "arrow":
        write_stream(path, rows)
    elif kind == "folder":
        for i, part in enumerate((rows[:7], rows[7:])):
            write(path / "data", "parquet", part).rename(path / "data" / f"train-0000{i}-of-00002.parquet")
        (path / "dataset_infos.json").write_text("{}")
    elif kind == "saved":
        path.mkdir()
        write_stream(path / "data-00000-of-00001.arrow", rows)
        (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
        (path / "dataset_info.json").write_text("{}")
    elif kind == "saved_dict":
        path.mkdir()
        (path / "dataset_dict.json").write_text(json.dumps({"splits": ["train"]}))
        write(path, "saved", rows).rename(path / "train")
    return path


def write_stream(path, rows):
    """Writes a file as `datasets.Dataset.save_to_disk` does: a stream of record batches."""
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=5)


KINDS = ("jsonl", "jsonl.gz", "json", "parquet", "arrow", "folder", "saved", "saved_dict")


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_is_recognised_in_every_kind_of_file(format, tmp_path):
    row, prompt, context, response = FORMATS[format]
    rows, found = numbered(row), {}
    for kind in KINDS:
        path = write(tmp_path / kind, kind, rows)
        assert jsonl.format_of(path=str(path)).name == format
        _, splits = jsonl.source(path=str(path), columns=("hint",), validation_fraction=0.2)
        assert set(splits) == {"train", "validation"}
        parts = {split: list(of_split()) for split, of_split in splits.items()}
        assert len(parts["train"]) + len(parts["validation"]) == 12 and parts["validation"]
        found[kind] = sorted((r for part in parts.values() for r in part), key=lambda r: int(r["hint"][1:]))
    for number, r in enumerate(found["jsonl"]):
        texts = [text and text + ("" if text == "c" else str(number)) for text in (prompt, context, response)]
        assert [r.get(name, "") for name in ("prompt", "context", "response", "hint")] == [*texts, f"h{number}"]
    for kind in KINDS:
        without_names = [{k: v for k, v in r.items() if k != "name"} for r in found[kind]]
        assert without_names == [{k: v for k, v in r.items() if k != "name"} for r in found["jsonl"]]


def test_a_conversation_is_built_and_read_back_with_its_turns_and_columns(tmp_path):
    turns = [
        {"role": "system", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}], "weight": None},
        *TURNS, {"role": "tool", "content": "4", "name": "sum"}, {"role": "assistant", "content": "b"},
        {"role": "user", "content": "left over"},
    ]  # fmt: skip
    path = write(tmp_path, "jsonl", [{"messages": turns, "hint": "h", "domain": 3}] * 2)
    options = dict(path=str(path), columns=("hint", "domain"), validation_fraction=0.0)
    (row, other) = data.load("jsonl", split="train", data_dir=str(tmp_path / "built"), **options)
    assert (row["name"], other["name"]) == ("rows.jsonl:1", "rows.jsonl:2")
    assert (row["prompt"], row["response"], row["context"], row["hint"], row["domain"]) == ("4", "b", "", "h", "3")
    messages = json.loads(row["messages"])
    assert messages[0] == {"role": "system", "content": "Be brief."} and messages[3]["name"] == "sum"
    assert data.columns("jsonl", **options) == ("name", "prompt", "context", "response", "hint", "domain")


def test_roles_of_share_gpt_and_its_system_message(tmp_path):
    path = write(tmp_path, "json", [{"conversations": SHARE_GPT, "system": "Be brief."}])
    (row,) = jsonl.source(path=str(path), validation_fraction=0.0)[1]["train"]()
    assert [m["role"] for m in json.loads(row["messages"])] == ["system", "assistant", "user", "assistant"]


def test_the_names_of_files_give_the_splits(tmp_path):
    rows = numbered(FORMATS["messages"][0])
    for name, part in {"train_sft-00000-of-00001": rows[:8], "test_sft-00000-of-00001": rows[8:]}.items():
        write(tmp_path, "parquet", part).rename(tmp_path / f"{name}.parquet")
    splits = jsonl.source(path=str(tmp_path))[1]
    assert {split: len(list(of_split())) for split, of_split in splits.items()} == {"train_sft": 8, "test_sft": 4}
    with pytest.raises(ValueError, match="has no split 'train'; the splits are test_sft, train_sft"):
        data.load("jsonl", split="train", path=str(tmp_path))
    (tmp_path / "valid.jsonl").write_text("{}")
    with pytest.raises(
        ValueError, match=r"files of several formats, .jsonl and .parquet, which may hold the same rows"
    ):
        jsonl.source(path=str(tmp_path))
    assert shards.splits_of(tmp_path / "valid.jsonl") == {"train": [tmp_path / "valid.jsonl"]}


def test_options_name_the_format_and_its_fields(tmp_path):
    path = str(write(tmp_path, "jsonl", [{"talk": SHARE_GPT, "messages": TURNS, "text": "t", "q": "x", "r": "y"}]))
    one = lambda **options: next(iter(jsonl.source(path=path, validation_fraction=0.0, **options)[1]["train"]()))
    assert one(messages_field="talk")["messages"].startswith('[{"role": "assistant", "content": "Hi"}')
    assert one(format="text") == {"prompt": "", "response": "t"}
    assert one(prompt_field="q", response_field="r") == {"prompt": "x", "response": "y"}
    with pytest.raises(ValueError, match=r"data.options.format='chat' must be one of auto, messages"):
        one(format="chat")
    with pytest.raises(ValueError, match=r"data.options.messages_field='talk' is not read in rows of .*format='text'"):
        one(format="text", messages_field="talk")


def test_a_large_array_is_read_element_by_element(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "CHUNK", 7)
    rows = [{"text": "é\n" + "x" * i, "n": [1, {"a": "]"}]} for i in range(30)]
    path = tmp_path / "rows.json"
    path.write_text("\n " + json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
    found = list(shards.rows(path))
    assert [row for _, row in found] == rows and found[1][0] == f"{path}:{12}"


GOOD = '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}'
MESSAGES = lambda *turns: json.dumps({"messages": list(turns)})
USER = {"role": "user", "content": "q"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (MESSAGES(USER), r"rows.jsonl:2: the conversation has no turn of the assistant; its turns are of the roles user"),
        (MESSAGES(TURNS[1]), r"rows.jsonl:2: no turn of a user or of a tool stands before the assistant's last turn"),
        (MESSAGES(USER, {"role": "assistant"}), r"rows.jsonl:2: turn 2 of the role 'assistant' has no content"),
        (MESSAGES({"role": "user", "content": 3}), r"rows.jsonl:2: turn 1 of the role 'user' has the content 3"),
        (MESSAGES({"content": "q"}), r"rows.jsonl:2: turn 1: the role is None; expected a text such as user"),
        (MESSAGES("q"), r"rows.jsonl:2: turn 1 is 'q'; expected an object with role and content"),
        (MESSAGES({"role": "user", "content": [{"type": "image"}]}), r"a part of the type 'image' in its content"),
        (MESSAGES({"from": "critic", "value": "q"}), r"turn 1: from is 'critic', which is no known role; the roles are human"),
        (MESSAGES(), r"rows.jsonl:2: the field 'messages' of .*messages_field='messages' is \[\], not a list of turns"),
        ('{"prompt": "q", "response": "a"}', r"rows.jsonl:2: the field 'messages' of .* is missing; .* must have one format"),
        ('["q"]', r"rows.jsonl:2: expected a JSON object, found list"),
    ],
)  # fmt: skip
def test_bad_conversations_are_named_with_file_and_line(line, message, tmp_path):
    (tmp_path / "rows.jsonl").write_text(f"{GOOD}\n{line}\n")
    with pytest.raises(ValueError, match=message):
        data.load("jsonl", split="train", data_dir=str(tmp_path / "built"), path=str(tmp_path / "rows.jsonl"))
    assert not list(tmp_path.rglob("*array_record*"))


def test_bad_files_are_named(tmp_path):
    load = lambda path, **options: data.load(
        "jsonl", split="train", data_dir=str(tmp_path / "built"), path=str(path), **options
    )
    path = write(tmp_path, "parquet", [{"question": "q", "reply": "a"}])
    with pytest.raises(
        ValueError, match=r"rows.parquet:1: the first row has the fields question, reply, which are of no known"
    ):
        load(path)
    path = write(
        tmp_path / "b", "parquet", [{"prompt": "q", "response": "a", "hint": None}, {"prompt": None, "response": "a"}]
    )
    with pytest.raises(
        ValueError, match=r"rows.parquet:2: the field 'prompt' is None, not a string.*prompt_field='prompt' asks"
    ):
        load(path)
    (tmp_path / "c.parquet").write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"c.parquet: cannot be read as Parquet \(.*\); the file may be incomplete"):
        load(tmp_path / "c.parquet")
    (tmp_path / "c.arrow").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="c.arrow: cannot be read as Arrow"):
        load(tmp_path / "c.arrow")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"the folder .*empty has no file of rows; such a file ends in .jsonl"):
        load(tmp_path / "empty")
    write(tmp_path / "none", "json", [])
    with pytest.raises(ValueError, match=r"rows.json.*no rows in any split: is its file empty"):
        load(tmp_path / "none" / "rows.json")
    for text, message in (
        ('[{"text": "a"}', "not valid JSON"), ('[{"text": "a"} {"text": "b"}]', "expected a comma"), ('[{"text": 1,}]', "not valid"),
        ('[{"text": "a"}] x', "text after the array"), ("[1]", "rows.json:1: expected a JSON object, found int"),
    ):  # fmt: skip
        (tmp_path / "rows.json").write_text(text)
        with pytest.raises(ValueError, match=f"rows.json:1: .*{message}|{message}"):
            load(tmp_path / "rows.json")


def test_a_missing_field_is_named_with_the_option_that_asks_for_it(tmp_path):
    path = str(write(tmp_path, "jsonl", [{"q": "a", "response": "b"}, {"q": "a"}]))
    rows = lambda **options: list(jsonl.source(path=path, validation_fraction=0.0, **options)[1]["train"]())
    with pytest.raises(
        ValueError, match=r":2: the field 'response' is missing; .* data.options.response_field='response' asks"
    ):
        rows(prompt_field="q")
    with pytest.raises(
        ValueError, match=r":1: the field 'hint' is missing; .* data.options.columns asks for this field"
    ):
        rows(prompt_field="q", columns=("hint",))
    path = str(write(tmp_path / "b", "jsonl", [{"instruction": "a", "output": "b"}, {"instruction": "a"}]))
    with pytest.raises(
        ValueError, match=r":2: the field 'output' is missing; .* data.options.format='instruction' asks"
    ):
        rows()


def test_a_null_in_a_column_of_a_parquet_file_is_empty(tmp_path):
    path = write(tmp_path, "parquet", [{"prompt": "q", "response": "a", "hint": hint} for hint in ("h", None)])
    rows = jsonl.source(path=str(path), columns=("hint",), validation_fraction=0.0)[1]["train"]()
    assert [row["hint"] for row in rows] == ["h", ""]
