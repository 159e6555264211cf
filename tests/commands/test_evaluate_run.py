"""Settings that an evaluation takes from the student's run, and the message about rows that are too long."""

import json
import shutil

import pytest

from kd_jax import data, evaluate, models, train
from kd_jax.evaluate import __main__ as command
from kd_jax.evaluate import of_run
from kd_jax.evaluate.arguments import parse
from kd_jax.run import summary
from tests.helpers.runs import smoke

pytestmark = pytest.mark.usefixtures("one_device")
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    "{% if enable_thinking is defined and enable_thinking is false %}<none>{% endif %}"
)


@pytest.fixture(scope="module")
def chat_run(tmp_path_factory, data_dir):
    """A finished run on the rows of a file, with a chat template that has an option and a system message."""
    folder = tmp_path_factory.mktemp("chat")
    shutil.copytree(
        models.folder("package:docstrings_teacher"), folder / "tokenizer", ignore=lambda _, names: {"model.safetensors"}
    )
    (folder / "tokenizer" / "chat_template.jinja").write_text(CHAT)
    rows = [{"question": f"x + {i}", "answer": f"Add {i}."} for i in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = smoke(
        "sft", data_dir, steps=1, tokenizer__path=str(folder / "tokenizer"), data__name="jsonl", data__template="chat",
        data__system="Be brief.", data__max_prompt_length=28, sampling__max_new_tokens=7, sampling__temperature=0.5,
        sampling__top_p=0.9,
    )  # fmt: skip
    options = {"path": str(folder / "rows.jsonl"), "prompt_field": "question", "response_field": "answer"}
    config.data.options = options | {"validation_fraction": 0.2}
    config.data.template_options.enable_thinking = False
    train.train(config, str(folder / "run"), quiet=True)
    return folder


def arguments(**flags):
    return parse([f"--{name}={value}" for name, value in flags.items()])


def test_a_runs_settings_are_the_defaults_of_its_evaluation(chat_run, tmp_path, capsys):
    found = command.run(arguments(model=chat_run / "run", out=tmp_path / "out", seeds="1", batch_size=8))
    used = found["arguments"]
    assert (used["data"], used["split"], used["max_prompt_length"], used["max_new_tokens"]) == (
        "jsonl",
        "validation",
        28,
        7,
    )
    assert (used["template"], used["template_options"], used["system"]) == (
        "chat",
        {"enable_thinking": False},
        "Be brief.",
    )
    assert (used["temperature"], used["top_p"]) == (1.0, 1.0), "the papers', and not what the run drew at"
    lines = [json.loads(line) for line in (tmp_path / "out" / "generations.jsonl").read_text().splitlines()]
    asked = {line["prompt"] for line in lines}
    written = [json.loads(line) for line in (chat_run / "run" / "generations.jsonl").read_text().splitlines()]
    assert asked == {line["prompt"] for line in written}, "the run's own held-out prompts, word for word"
    assert all(prompt.startswith("<system>Be brief.<user>x + ") and prompt.endswith("<none>") for prompt in asked)
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if line.startswith("from the run of ")]
    assert '--template=chat --template_options={"enable_thinking": false} --system="Be brief."' in line
    assert "--split=validation" in line and "--max_prompt_length=28 --max_new_tokens=7" in line
    assert f"jsonl: {len(lines)} rows read, {len(lines)} kept" in printed


def test_a_flag_wins_and_the_exported_folder_is_the_run(chat_run):
    student = str(chat_run / "run" / "student")
    args, (line,) = of_run.filled(arguments(model=student, out="x", system="Be kind.", max_new_tokens=3))
    assert (args.system, args.max_new_tokens, args.max_prompt_length) == ("Be kind.", 3, 28)
    assert (
        args.template_options == {"enable_thinking": False} and "--system" not in line and "max_new_tokens" not in line
    )
    args, _ = of_run.filled(arguments(model=student, out="x", template="plain", data="rows.jsonl"))
    assert of_run.template_of(args) == data.Template("plain") and args.split == "test" and args.data_options == {}
    args, _ = of_run.filled(arguments(model=student, out="x", data="vicuna"))
    assert of_run.template_of(args) == data.Template("plain"), "its prompts have Alpaca's already"
    args, lines = of_run.filled(arguments(model="package:docstrings_teacher", out="x", data="dolly", teacher=student))
    assert of_run.template_of(args) == data.Template("plain") and args.max_new_tokens == 256
    assert "the teacher, " in lines[0] and 'the template chat template_options={"enable_thinking": false}' in lines[0]


def test_an_older_run_lacks_newer_keys(chat_run, tmp_path):
    shutil.copytree(chat_run / "run" / "student", tmp_path / "run" / "student")
    config = json.loads((chat_run / "run" / "config.json").read_text())
    del config["data"]["system"], config["data"]["template_options"], config["sampling"]["max_new_tokens"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    args, _ = of_run.filled(arguments(model=tmp_path / "run", out="x"))
    assert of_run.template_of(args) == data.Template("chat") and args.max_new_tokens == 256
    assert args.max_prompt_length == 28


@pytest.mark.parametrize(
    ("change", "flags", "message"),
    [
        (None, {}, "--data is missing, and .* is not the work directory of a run"),
        ({"name": "text"}, {}, "--data is missing, and the rows of the run's dataset, text, have no prompts"),
        (
            {},
            {"template": "alpaca", "system": "Be brief."},
            "data.system='Be brief.' .* the template alpaca does not read this key",
        ),
    ],
)
def test_what_a_run_cannot_give_is_named(chat_run, tmp_path, change, flags, message):
    shutil.copytree(chat_run / "run" / "student", tmp_path / "run" / "student")
    if change is not None:
        config = json.loads((chat_run / "run" / "config.json").read_text())
        config["data"] |= change
        (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        command.run(arguments(model=tmp_path / "run", out=tmp_path / "out", **flags))
    assert not (tmp_path / "out").exists()


def test_a_run_that_has_not_finished_is_named(chat_run, tmp_path):
    (tmp_path / "config.json").write_text((chat_run / "run" / "config.json").read_text())
    with pytest.raises(ValueError, match="a run that has not finished, because the folder student is missing"):
        of_run.model_folder(str(tmp_path), "--model")


def test_rows_that_are_too_long_are_counted_in_words_with_what_to_change(chat_run, tmp_path, data_dir, capsys):
    rows = [{"question": f"Add {'one and ' * (i % 10)}{i}", "answer": f"Add {i}."} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = smoke("sft", data_dir, steps=1, data__name="jsonl", data__max_prompt_length=10, data__eval_rows=0)
    options = {"path": str(tmp_path / "rows.jsonl"), "prompt_field": "question", "response_field": "answer"}
    config.data.options = options | {"validation_path": str(tmp_path / "rows.jsonl")}
    run = train.build(config)
    tokenizer = data.Tokenizer.load(models.folder("package:docstrings_teacher"))
    lengths = sorted(len(tokenizer.encode(row["question"] + "\n", add_special_tokens=True)) for row in rows)
    too_long = sum(length > 10 for length in lengths)
    assert 4 < too_long < 40
    line = summary.of(run, run.init_state())
    share = f"{too_long / 40:.0%}".replace("%", " %")
    assert f"train: 40 rows read, {too_long} prompts truncated ({share})" in line and "{" not in line
    warned = [text for text in summary.too_long(run) if "prompt" in text.partition("that is")[0]]
    assert [split in text for text, split in zip(warned, ("of validation", "of train"), strict=True)] == [True, True]
    for text in warned:
        assert f"{share} of the 40 rows" in text and "Raise data.max_prompt_length=10" in text
        assert f"Nine of ten prompts have at most {lengths[35]} tokens." in text
    flags = dict(model="package:docstrings_teacher", data=tmp_path / "rows.jsonl", prompt_field="question")
    flags |= dict(reference_field="answer", seeds="", max_prompt_length=10, max_new_tokens=8, batch_size=8)
    found = command.run(arguments(out=tmp_path / "out", **flags))
    assert found["prompts"]["prompts_cut"] == too_long
    printed = capsys.readouterr().out
    assert f"{too_long} prompts truncated ({share})" in printed and "Raise --max_prompt_length=10." in printed
    assert evaluate.rouge_tokens([]) == {"papers": 0, "unicode": 0}
