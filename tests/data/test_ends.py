"""The tokens that end a response: the trained one, all that stop a text, and those in an exported student's files."""

import json
import shutil

import jax
import numpy as np
import pytest

from kd_jax import data, models, train
from kd_jax.models import folder
from tests.helpers.runs import smoke

pytestmark = pytest.mark.usefixtures("one_device")

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
END, IM_END = 0, 1  # <|endoftext|> and <|im_end|>


def change(path, **fields):
    """Sets fields of a JSON file and creates the file if it does not exist."""
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | fields))


def chat_teacher(target, eos_token="<|im_end|>", **generation):
    """Copies the packaged teacher, adds a chat template and renames the padding token to <|im_end|>."""
    shutil.copytree(folder("package:docstrings_teacher"), target)
    text = (target / "tokenizer.json").read_text()
    (target / "tokenizer.json").write_text(text.replace("<|pad|>", "<|im_end|>"))
    named = {"eos_token": eos_token, "pad_token": "<|endoftext|>", "bos_token": None, "chat_template": CHATML}
    (target / "tokenizer_config.json").write_text(json.dumps(named))
    if generation:
        change(target / "generation_config.json", **generation)
    return target


def rows_file(path, count=60):
    rows = [{"prompt": f"Say {i}", "response": "yes"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chat_config(tmp_path, data_dir, method, **changes):
    changes = dict(data__name="jsonl", data__template="chat", tokenizer__path="", mesh__data=1) | changes
    config = smoke(method, data_dir, **changes)
    config.data.options = dict(path=rows_file(tmp_path / "rows.jsonl"))
    return config


@pytest.mark.slow
@pytest.mark.parametrize("eos_token", ["<|im_end|>", "<|endoftext|>"])
def test_an_exported_student_stops_at_the_end_that_was_trained(eos_token, tmp_path, data_dir):
    """The student's initial folder ends texts with <|endoftext|>, and the chat template ends texts with <|im_end|>."""
    teacher = chat_teacher(tmp_path / "teacher", eos_token)
    config = chat_config(tmp_path, data_dir, "sft", teacher__path=str(teacher), steps=80, eval_every=80)
    config.learning_rate.init_value = 3e-2
    start = models.from_config(models.ModelConfig(vocab_size=4096, **config.student.config, eos_id=END))
    tokenizer = data.Tokenizer.load(teacher).with_ends(END)
    models.save_pretrained(tmp_path / "start", start, start.init(jax.random.key(0)), tokenizer)
    config.student.update({"init": "pretrained", "path": str(tmp_path / "start")})
    train.train(config, str(tmp_path / "run"), quiet=True)

    exported = tmp_path / "run" / "student"
    for name in ("config.json", "generation_config.json"):
        assert json.loads((exported / name).read_text())["eos_token_id"] == [IM_END, END]
    assert json.loads((exported / "tokenizer_config.json").read_text())["eos_token"] == "<|im_end|>"
    model, params = models.load_pretrained(exported)
    tokenizer = data.Tokenizer.load(exported)
    assert (tokenizer.eos_id, tokenizer.end_ids) == (IM_END, (IM_END, END))
    prompt = tokenizer.encode(data.make_render("chat", tokenizer)("Say 3", ""))
    prompts, mask = models.left_pad([prompt], 0)
    write = lambda ends: models.generate(
        model, params, prompts, mask, max_new_tokens=8, key=jax.random.key(0), temperature=0, eos_id=ends, pad_id=0
    )
    tokens, written, _ = write(model.config.eos_id)
    answer = tokens[0][written[0]].tolist()
    assert tokenizer.decode(tokenizer.strip_ends(answer)) == "yes" and answer[-1] == IM_END
    assert write(END)[1].sum() == 8, "the end that the student's folder named does not stop this text"


def test_the_trained_end_is_the_templates(tmp_path):
    tokenizer = data.Tokenizer.load(chat_teacher(tmp_path / "t", "<|endoftext|>"))
    assert data.with_template_end(tokenizer, "plain").end_ids == (END,)
    assert data.with_template_end(tokenizer, "chat").end_ids == (IM_END, END)
    for template in (
        CHATML.replace("<|im_end|>", ""),
        CHATML.replace("<|im_end|>", " and"),
        "{{ raise_exception('') }}",
    ):
        tokenizer.chat_template = template
        assert data.with_template_end(tokenizer, "chat").end_ids == (END,)


def test_every_named_end_ends_a_response(tmp_path, data_dir):
    """The second end token is an ordinary word, which the packaged teacher writes often."""
    source = data.Tokenizer.load(folder("package:docstrings_teacher"))
    the = source.vocabulary()["Ġthe"]
    teacher = tmp_path / "teacher"
    shutil.copytree(folder("package:docstrings_teacher"), teacher)
    change(teacher / "generation_config.json", eos_token_id=[END, the])
    changes = dict(teacher__path=str(teacher), tokenizer__path="", sampling__max_new_tokens=12, data__max_length=64)
    run = train.build(smoke("distillm2", data_dir, **changes))
    assert run.tokenizer.end_ids == (END, the) and run.models.student.config.eos_id == (END, the)
    state = run.init_state()
    batch = run.feed.next(0, state.params)
    stopped = 0
    for targets, counted in zip(batch["targets"], batch["loss_mask"], strict=True):
        response = targets[counted].tolist()
        assert not {END, the} & set(response[:-1])
        stopped += response[-1] == the
    assert stopped > 0 and run.feed.report["finished"] >= 0

    run = train.build(smoke("seqkd", tmp_path, data__data_dir=str(tmp_path), prefixes__num_rows=40, **changes))
    (path,) = tmp_path.glob("kd_jax_responses/*/responses.jsonl")
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert written and not any({END, the} & set(line["response_ids"]) for line in written)
    batch = run.feed.next(0, None)
    last = [targets[counted][-1] for targets, counted in zip(batch["targets"], batch["loss_mask"], strict=True)]
    assert set(last) == {END}, "the rows end with the token that is trained"


def test_rows_of_a_teachers_text_have_the_ids_that_were_drawn(tmp_path, data_dir):
    changes = dict(data__data_dir=str(tmp_path), prefixes__num_rows=40, sampling__max_new_tokens=12)
    run = train.build(smoke("seqkd", tmp_path, **changes))
    (path,) = tmp_path.glob("kd_jax_responses/*/responses.jsonl")
    written = [json.loads(line) for line in path.read_text().splitlines()]
    expected = {tuple([*line["prompt_ids"], *line["response_ids"], END]) for line in written}
    batch = run.feed.next(0, None)
    for tokens, targets, mask in zip(batch["tokens"], batch["targets"], batch["mask"], strict=True):
        assert (tokens[0], *targets[mask].tolist()) in expected
    assert written[0]["response"] == run.tokenizer.decode(written[0]["response_ids"])


def test_responses_that_never_end_are_not_kept(tmp_path):
    """The teacher's folder first names a wrong end token and then the right one."""
    teacher = tmp_path / "teacher"
    shutil.copytree(folder("package:docstrings_teacher"), teacher)
    named = json.loads((teacher / "tokenizer_config.json").read_text())
    change(teacher / "tokenizer_config.json", eos_token="<|pad|>")
    change(teacher / "generation_config.json", eos_token_id=IM_END)
    changes = dict(data__data_dir=str(tmp_path), prefixes__num_rows=16, sampling__max_new_tokens=12)
    config = smoke("seqkd", tmp_path, teacher__path=str(teacher), tokenizer__path="", **changes)
    with pytest.raises(
        ValueError,
        match=r"none of the teacher's 16 responses ended .* end tokens in the teacher's folder, which are 1 \('<\|pad\|>'\)",
    ):
        train.build(config)
    assert not list(tmp_path.glob("kd_jax_responses/*/responses*"))
    change(teacher / "tokenizer_config.json", **named)
    change(teacher / "generation_config.json", eos_token_id=END)
    assert train.build(config).counts["train"]["kept"] > 0


@pytest.mark.slow
def test_a_teacher_of_another_tokenizer_writes_text(tmp_path, data_dir):
    """Sequence-level distillation compares only text, so the two tokenizers may differ."""
    teacher = chat_teacher(tmp_path / "teacher", "<|endoftext|>")
    other = json.loads((teacher / "tokenizer.json").read_text())
    vocabulary = other["model"]["vocab"]
    names = sorted(vocabulary, key=vocabulary.get)
    for name, other_name in ((names[300], names[400]), (names[301], names[401])):
        vocabulary[name], vocabulary[other_name] = vocabulary[other_name], vocabulary[name]
    swapped = tmp_path / "swapped"
    swapped.mkdir()
    (swapped / "tokenizer.json").write_text(json.dumps(other))
    shutil.copy(teacher / "tokenizer_config.json", swapped)
    config = smoke("seqkd", tmp_path, data__data_dir=str(tmp_path), prefixes__num_rows=40, sampling__max_new_tokens=12)
    start = models.from_config(models.ModelConfig(vocab_size=4096, **config.student.config, eos_id=END))
    models.save_pretrained(tmp_path / "start", start, start.init(jax.random.key(0)), data.Tokenizer.load(swapped))
    config.student.update({"init": "pretrained", "path": str(tmp_path / "start")})
    config.tokenizer.path = ""
    result = train.train(config, str(tmp_path / "run"), quiet=True)
    assert np.isfinite(result["after"]["cross_entropy"]) and "forward_kl" not in result["after"]
    (path,) = tmp_path.glob("kd_jax_responses/*/responses.jsonl")
    run = train.build(config)
    assert run.tokenizer.vocabulary() == vocabulary and run.models.teacher is None and run.models.writer is not None
    texts = {json.loads(line)["response"] for line in path.read_text().splitlines()}
    batch = run.feed.next(0, None)
    for targets, counted in zip(batch["targets"], batch["loss_mask"], strict=True):
        assert run.tokenizer.decode(targets[counted].tolist()) in texts
    start = {"student__init": "pretrained", "student__path": str(tmp_path / "start"), "tokenizer__path": ""}
    with pytest.raises(ValueError, match="the student's tokenizer"):
        train.build(smoke("forward_kl", data_dir, **start))
