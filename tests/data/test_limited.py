"""Two tokenizers that differ in a few added tokens: the run uses the ids that both tokenizers have."""

import json

import jax
import numpy as np
import pytest

from kd_jax import metrics, models, train
from kd_jax.data import Tokenizer
from kd_jax.data.limited import common_ids, without
from kd_jax.data.shared import check_same_tokenizer, fit_tokenizer
from tests.helpers.folders import config, token
from tests.helpers.runs import smoke

WORDS = ["<unk>", "</s>", *(f"w{i}" for i in range(498))]
TOOLS = ["<tool>", "</tool>", "<think>", "</think>"]


def write(folder, added=(), words=WORDS, special_map=None, more=None, **named):
    """Writes the folder of a tokenizer with the words and, after them, the added tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = [{"id": i} | token(text) for i, text in enumerate(["</s>", *added], len(words))]
    fields = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": listed, "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(words)}, "unk_token": "<unk>"},
    }  # fmt: skip
    files = {"tokenizer": fields | (more or {}), "tokenizer_config": config(eos_token="</s>") | named}
    for name, content in (files | ({"special_tokens_map": special_map} if special_map else {})).items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_common_ids_count_from_0():
    assert common_ids({"a": 0, "b": 1}, {"a": 0, "b": 1}) == 2
    assert common_ids({"a": 0, "b": 1, "c": 2, "d": 3}, {"a": 0, "b": 1, "c": 3, "d": 2}) == 2
    assert common_ids({"a": 0, "b": 5}, {"a": 0, "c": 7}) == 5
    assert common_ids({"a": 1}, {"b": 1}) == 1


@pytest.mark.parametrize("number", [0, 1, 4])
@pytest.mark.parametrize("side", ["run", "model"])
def test_more_added_tokens_on_one_side_are_left_out(number, side, tmp_path, capsys):
    more, plain = write(tmp_path / "more", TOOLS[:number]), write(tmp_path / "plain")
    run, model = (more, plain) if side == "run" else (plain, more)
    tokenizer = Tokenizer.load(run)
    found = check_same_tokenizer(model, tokenizer, "student")
    text = "w3 <tool> w4 </think>"
    assert found.vocab_size == 500 and found.encode(text) == [5, 0, 6, 0] and found.eos_id == 1
    assert found.vocabulary() == {word: i for i, word in enumerate(WORDS)}
    line = capsys.readouterr().out
    if not number:
        assert line == "" and found is tokenizer
    else:
        sizes = (500, 500 + number) if side == "run" else (500 + number, 500)
        assert line.count("\n") == 1 and f"{model}, {sizes[0]} ids) and the run's ({sizes[1]} ids)" in line
        tokens = ", ".join(map(repr, TOOLS[:number]))
        assert (
            f"have the first 500 ids in common. The run does not use the added token{'s' * (number > 1)} {tokens}."
            in line
        )
    if side == "run":
        assert tokenizer.encode(text) == [5, 500 if number else 0, 6, 503 if number == 4 else 0]
        assert (found.fingerprint() == tokenizer.fingerprint()) == (not number)


def test_conflicting_added_tokens_are_left_out_on_both_sides(tmp_path, capsys):
    run = Tokenizer.load(write(tmp_path / "run", ["<both>", "<x>", "<y>"]))
    model = write(tmp_path / "model", ["<both>", "<y>", "<x>", "<z>"])
    found = check_same_tokenizer(model, run, "teacher")
    assert found.vocab_size == 501 and found.encode("<both> <x> <y> <z>") == [500, 0, 0, 0]
    assert "The run does not use the added tokens '<x>', '<y>', '<z>'." in capsys.readouterr().out


@pytest.mark.parametrize(
    "run, model, message",
    [
        (dict(words=[*WORDS, "w498"]), {}, r"1 token differs: 'w498' has id 500.* 'w498' with id 500 is in the model's"),
        ({}, dict(words=[*WORDS, "w498"]), r"1 token differs.*'w498' with id 500 is in the model's vocabulary"),
        (dict(words=[*WORDS[:-2], "w497", "w496"]), {}, r"2 tokens differ.*'w496' with id 498 is in the model's vocabulary"),
        (dict(added=[f"<{i}>" for i in range(6)]), {}, r"6 added tokens have an id of 500 or more; at most 5 can be removed"),
        (dict(added=["<end>"], eos_token="<end>"), {}, r"the eos_token '<end>' has the id 500; it must be below 500"),
        (dict(added=["<p>"], pad_token="<p>"), {}, r"the pad_token '<p>' has the id 500; it must be below 500"),
    ],
)  # fmt: skip
def test_what_cannot_be_left_out_is_refused(run, model, message, tmp_path):
    tokenizer = Tokenizer.load(write(tmp_path / "run", **run))
    with pytest.raises(ValueError, match=message):
        check_same_tokenizer(write(tmp_path / "model", **model), tokenizer, "student")


def test_a_post_processor_with_a_token_that_goes_is_refused(tmp_path):
    post = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<x>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<x>": {"id": "<x>", "ids": [500], "tokens": ["<x>"]}},
    }  # fmt: skip
    tokenizer = Tokenizer.load(write(tmp_path / "t", ["<x>"], more={"post_processor": post}))
    with pytest.raises(ValueError, match=r"tokenizer.json gives the id 500; expected ids below 500"):
        tokenizer.limited(500)


def test_no_file_names_a_token_that_is_left_out(tmp_path):
    padding = {
        "strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None, "pad_id": 501, "pad_type_id": 0,
        "pad_token": "<b>",
    }  # fmt: skip
    # Only one file has cls_token, and <b> is in six places.
    folder = write(
        tmp_path / "t", ["<a>", "<b>"], cls_token="<c>", sep_token="<b>", image_token="<b>", pad_token=None,
        extra_special_tokens=["<a>", {"__type": "AddedToken"} | token("<b>")], more={"padding": padding},
        special_map={"mask_token": token("<b>"), "additional_special_tokens": ["<b>", "<d>"]},
    )  # fmt: skip
    (folder / "added_tokens.json").write_text(json.dumps({"<b>": 501, "<a>": 500}))
    (folder / "chat_template.jinja").write_text("<b>")
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.encode("<a> <b> <c> <d>") == [500, 501, 502, 0]
    limited = tokenizer.limited(501)
    assert limited.encode("<a> <b> <c> <d>") == [500, 0, 0, 0] and limited.vocab_size == 501
    assert tokenizer.limited(503) is tokenizer
    limited.save(tmp_path / "saved")
    saved = {path.name: path.read_text() for path in (tmp_path / "saved").iterdir()}
    assert saved.pop("chat_template.jinja") == "<b>" and limited.chat_template == "<b>"
    assert "<b>" not in "".join(saved.values()) and "<c>" not in "".join(saved.values())
    assert json.loads(saved["special_tokens_map.json"])["mask_token"] is None
    again = Tokenizer.load(tmp_path / "saved")
    assert again.vocabulary() == limited.vocabulary() and again.fingerprint() == limited.fingerprint()
    assert (
        without(limited._content.files, {"<b>"}) == limited._content.files
    )  # files without the removed tokens are unchanged


def test_a_model_with_fewer_ids_than_its_tokenizer_limits_it(tmp_path, capsys):
    tokenizer = Tokenizer.load(write(tmp_path / "t", ["<image>"]))
    assert fit_tokenizer("m", 501, tokenizer, "teacher") is tokenizer
    assert capsys.readouterr().out == ""
    assert fit_tokenizer("m", 500, tokenizer, "teacher").vocab_size == 500
    expected = "The teacher (m) has 500 ids and the tokenizer 501. The run does not use the added token '<image>'.\n"
    assert capsys.readouterr().out == expected
    with pytest.raises(ValueError, match=r"output of 499 ids, fewer than the tokenizer's 501: .* 'w497' with id 499"):
        fit_tokenizer("m", 499, tokenizer, "teacher")


def student_folder(folder, more):
    """Saves a random model with the packaged tokenizer and the added tokens `more`."""
    own = Tokenizer.load(models.folder("package:docstrings_teacher"))
    size = own.vocab_size + len(more)
    sizes = models.ModelConfig(
        family="llama", vocab_size=size, hidden_size=8, num_layers=1, num_heads=2, eos_id=own.eos_id
    )
    model = models.from_config(sizes)
    models.save_pretrained(folder, model, model.init(jax.random.key(0)), own)
    fields = json.loads((folder / "tokenizer.json").read_text())
    fields["added_tokens"] += [{"id": own.vocab_size + i} | token(text) for i, text in enumerate(more)]
    (folder / "tokenizer.json").write_text(json.dumps(fields))
    return str(folder)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_run_of_two_such_models_trains_and_exports_the_common_tokenizer(side, tmp_path, data_dir, one_device, capsys):
    path = student_folder(tmp_path / "other", TOOLS)
    plain = student_folder(tmp_path / "plain", [])
    both = (plain, path) if side == "student" else (path, plain)
    changes = dict(teacher__path=both[0], student__init="pretrained", student__path=both[1])
    run = train.build(smoke("forward_kl", data_dir, data__eval_rows=8, data__eval_batch_size=8, **changes))
    assert (
        "The run does not use the added tokens '<tool>', '</tool>', '<think>', '</think>'." in capsys.readouterr().out
    )
    state = run.init_state()
    state, sums = run.train_step(state, run.models.teacher_params, run.batch(0, state.params))
    assert np.isfinite(metrics.averages(jax.device_get(sums))["loss"])
    models.save_pretrained(tmp_path / "student", run.models.student, state.params, run.tokenizer)
    exported = Tokenizer.load(tmp_path / "student")
    assert exported.vocab_size == run.tokenizer.vocab_size == 4096 and len(exported.encode("<think>")) > 1
