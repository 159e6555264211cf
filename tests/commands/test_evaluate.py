"""Compares the numbers on held-out rows with full logits in NumPy."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import scipy.special
import scipy.stats
from rouge_score import rouge_scorer

from kd_jax import data, evaluate, models, sharding
from kd_jax.evaluate import __main__ as command
from kd_jax.evaluate import harness
from kd_jax.evaluate.arguments import parse
from kd_jax.evaluate.texts import pieces
from tests.helpers.steps import STUDENT, TEACHER, V, batch


def calibration_error(q, target, bins=15):
    confidence, right = q.max(-1), q.argmax(-1) == target
    inside = [(confidence >= i / bins) & (confidence < (i + 1) / bins) for i in range(bins)]
    return sum(i.mean() * abs(confidence[i].mean() - right[i].mean()) for i in inside if i.any())


def test_the_numbers_are_those_of_full_logits():
    params, teacher_params = STUDENT.init(jax.random.key(0)), TEACHER.init(jax.random.key(1))
    last = batch(1)
    last["loss_mask"][5:] = False  # padding rows of the last batch
    batches = [batch(0), last]
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    found = evaluate.evaluate(STUDENT, params, TEACHER, teacher_params, batches, mesh, vocab_size=V, chunk=5)
    p, q, target = [], [], []
    for rows in batches:
        counted = rows["loss_mask"]
        for model, its_params, into in ((TEACHER, teacher_params, p), (STUDENT, params, q)):
            logits = np.asarray(model.logits(its_params, rows["tokens"], rows["mask"]), np.float64)[..., :V]
            into.append(scipy.special.softmax(logits, axis=-1)[counted])
        target.append(rows["targets"][counted])
    p, q, target = map(np.concatenate, (p, q, target))
    cross_entropy = -np.log(q[np.arange(len(target)), target]).mean()
    expected = dict(
        cross_entropy=cross_entropy,
        forward_kl=scipy.stats.entropy(p, q, axis=-1).mean(),
        reverse_kl=scipy.stats.entropy(q, p, axis=-1).mean(),
        total_variation=np.abs(p - q).sum(axis=-1).mean() / 2,
        top1_agreement=(p.argmax(-1) == q.argmax(-1)).mean(),
        entropy=scipy.stats.entropy(q, axis=-1).mean(),
        confidence=q.max(-1).mean(),
        accuracy=(q.argmax(-1) == target).mean(),
        calibration_error=calibration_error(q, target),
        perplexity=np.exp(cross_entropy),
    )
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, err_msg=name)

    alone = evaluate.evaluate(STUDENT, params, None, None, batches, mesh, vocab_size=V)
    assert alone.keys() == expected.keys() - {"forward_kl", "reverse_kl", "total_variation", "top1_agreement"}
    np.testing.assert_allclose(alone["cross_entropy"], cross_entropy, rtol=1e-5)


def test_scores_of_texts():
    references = ["The cat sat on the mat.", "A cat was sitting there."]
    assert evaluate.rouge_l("the cats sat on the mats", references) == 100, "stemmed, and the best of both"
    # The longest common subsequence has 2 of 3 and of 6 words: precision 2/3, recall 1/3.
    assert evaluate.rouge_l("cat loves mat", references[:1]) == pytest.approx(100 * 4 / 9)
    assert evaluate.rouge_l("", references) == 0
    assert evaluate.exact_match("the CAT sat, on the mat", references) == 100
    assert evaluate.exact_match("the cat sat on", references) == 0
    assert evaluate.exact_match("«Да», — сказал он…", ["да сказал он"]) == 100
    for text, right in (("So 3 + 4 = 7.", 1), ("7.0", 1), ("$1,007", 0), ("none", 0), ("-7", 0), ("7 of 10", 0)):
        assert evaluate.number_match(text, ["... #### 7"]) == 100 * right, text


@pytest.mark.parametrize(
    ("text", "close", "score"),
    [
        ("我喜欢红色的猫。", "我喜欢黑色的猫", 100 * 6 / 7),
        ("東京タワーへ行った", "東京タワーへ行く", 100 * 14 / 17),  # 7 of 9 and 7 of 8 characters
        ("ฉันชอบแมว", "ฉันชอบหมา", None),
        ("Я люблю красных кошек.", "я люблю чёрных кошек", 75),
        ("Η γάτα κάθεται.", "η γάτα τρέχει", 100 * 2 / 3),
        ("मुझे लाल बिल्ली पसंद है", "मुझे काली बिल्ली पसंद है", 80),
        ("אני אוהב חתולים", "אני אוהב כלבים", 100 * 2 / 3),
        ("أنا أحب القطط", "أنا أحب الكلاب", 100 * 2 / 3),
        ("나는 고양이를 좋아한다", "나는 개를 좋아한다", 100 * 2 / 3),
        ("ខ្ញុំស្រឡាញ់ឆ្មា", "ខ្ញុំស្រឡាញ់ឆ្កែ", None),
        ("É", "é", 100),
    ],
)
def test_rouge_l_of_every_script(text, close, score):
    assert evaluate.rouge_l(text, [text]) == 100 and evaluate.rouge_l("the cat 5", [text]) == 0
    assert evaluate.rouge_tokens([text]) == {"papers": 0, "unicode": 1}
    if score is None:
        assert 0 < evaluate.rouge_l(close, [text]) < 100
    else:
        assert evaluate.rouge_l(close, [text]) == pytest.approx(score)


def test_latin_text_has_the_papers_numbers():
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    texts = (
        "The cats sat.", "Un café déjà vu, s'il vous plaît", "Übung macht den Meister", "Tiếng Việt rất khó", "x_1 = 5%", "42",
        "The word 猫 means cat", "",
    )  # fmt: skip
    for reference in texts[:-1]:
        for text in (*texts, "猫", "the cat already sat"):
            assert evaluate.rouge_l(text, [reference]) == 100 * scorer.score(reference, text)["rougeL"].fmeasure
    assert evaluate.rouge_tokens(texts[:-1]) == {"papers": 7, "unicode": 0}


def test_the_pieces_of_a_text_are_the_text():
    tokenizer = data.Tokenizer.load(models.folder("package:docstrings_teacher"))
    for text in ("Return the sum.", "Résumé — 你好 🤖", ""):
        ids = tokenizer.encode_batch([text])[0]
        found = pieces(tokenizer, ids)
        assert len(found) == len(ids) and "".join(found) == tokenizer.decode(ids)
    rows = np.random.default_rng(0).integers(0, tokenizer.vocab_size, (50, 20)).tolist()
    assert all("".join(pieces(tokenizer, ids)) == tokenizer.decode(ids) for ids in rows)


def arguments(tmp_path, **changes):
    rows = [{"question": f"def f{i}(x):\n    return x + {i}\n", "answers": [f"Add {i}.", "Adds."]} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "model": "package:docstrings_teacher", "teacher": "package:docstrings_teacher", "data": tmp_path / "rows.jsonl",
        "out": tmp_path / "out", "prompt_field": "question", "reference_field": "answers", "max_prompt_length": 32,
        "max_new_tokens": 8, "batch_size": 8, "seeds": "1,2",
    }  # fmt: skip
    return parse([f"--{name}={value}" for name, value in (options | changes).items()])


def test_the_command_leaves_a_table_and_every_text(tmp_path):
    found = command.run(arguments(tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "out" / "generations.jsonl").read_text().splitlines()]
    assert [line["seed"] for line in lines] == [1] * 6 + [2] * 6 and lines[0]["references"] == ["Add 0.", "Adds."]
    for line in lines:
        assert line["rouge_l"] == evaluate.rouge_l(line["response"], line["references"])
    by_seed = [np.mean([line["rouge_l"] for line in lines[i : i + 6]]) for i in (0, 6)]
    np.testing.assert_allclose(found["seeds"]["rouge_l"], (np.mean(by_seed), np.std(by_seed, ddof=1)), rtol=1e-6)
    assert found["given"]["reverse_kl"] == pytest.approx(0, abs=1e-5) and found["given"]["top1_agreement"] == 1
    results = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    assert len(results) == 3 and json.loads(results[-1])["rows"] == 6
    table = (tmp_path / "out" / "table.md").read_text()
    assert found["rouge_l_words"] == {"papers": 12, "unicode": 0}
    assert "ROUGE-L compares 12 references by words of a to z and 0 to 9, stemmed, as in the papers." in table
    assert "rouge_l" in table and "exposure bias" in table and "calibration_error" in table
    with pytest.raises(ValueError, match="is not empty"):
        command.run(arguments(tmp_path))


def test_an_evaluation_set_by_name_with_several_references(tmp_path):
    rows = [
        {"prompt": f"### Instruction:\nCount to {i}.\n\n### Response:\n", "output": ["1", "One."]} for i in range(3)
    ]
    (tmp_path / "valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"data": "super_natural", "data_path": tmp_path / "valid.jsonl", "seeds": "1", "rows": 2, "teacher": ""}
    assert command.run(arguments(tmp_path, **changes))["rows"] == 2
    lines = [json.loads(line) for line in (tmp_path / "out" / "generations.jsonl").read_text().splitlines()]
    assert [line["references"] for line in lines] == [["1", "One."]] * 2
    assert lines[0]["prompt"] == rows[0]["prompt"]
    with pytest.raises(
        ValueError, match="--template=alpaca, but the prompts of --data=super_natural already have the Alpaca"
    ):
        command.run(arguments(tmp_path, **changes, template="alpaca", out=tmp_path / "other"))


@pytest.fixture
def lm_eval(monkeypatch):
    """The calls of a module that replaces lm-eval, to check the folder and the tasks that it receives."""
    calls = []

    class TaskManager:
        def __init__(self, include_path=None):
            self.all_tasks = ["arc_easy", "arc_challenge", "hellaswag", *(["own"] if include_path else [])]

        def match_tasks(self, tasks):
            return [name for name in self.all_tasks for task in tasks if Path(name).match(task)]

    def simple_evaluate(**keywords):
        calls.append(keywords)
        values = {"alias": "it", "acc,none": 0.25, "acc_stderr,none": 0.125, "em,strict": 1, "em_stderr,strict": "N/A"}
        tasks = keywords["tasks"]
        samples = {task: {"original": 20, "effective": 4} for task in tasks}
        return {"results": {t: values for t in tasks}, "n-shot": dict.fromkeys(tasks, 0), "n-samples": samples}

    monkeypatch.setitem(sys.modules, "lm_eval", SimpleNamespace(simple_evaluate=simple_evaluate))
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", SimpleNamespace(TaskManager=TaskManager))
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: False)))
    return calls


def test_lm_eval_is_given_the_folder_and_its_scores_stand_beside_ours(tmp_path, lm_eval):
    student = tmp_path / "run" / "student"
    student.parent.mkdir()
    student.symlink_to(models.folder("package:docstrings_teacher"))
    options = {
        "lm_eval": "hellaswag, arc_*,hellaswag",
        "lm_eval_limit": 4,
        "dtype": "bfloat16",
        "seeds": "",
        "teacher": "",
    }
    found = command.run(arguments(tmp_path, model=tmp_path / "run", **options))
    (call,) = lm_eval
    assert call["model"] == "hf" and call["model_args"] == {"pretrained": str(student), "dtype": "bfloat16"}
    assert call["device"] == "cpu"
    assert call["tasks"] == ["hellaswag", "arc_easy", "arc_challenge"] and (call["limit"], call["batch_size"]) == (4, 8)
    assert found["lm_eval"][:2] == [
        {"task": "hellaswag", "metric": "acc", "value": 0.25, "error": 0.125, "shots": 0, "prompts": 4},
        {"task": "hellaswag", "metric": "em (strict)", "value": 1, "error": None, "shots": 0, "prompts": 4},
    ]
    last = (tmp_path / "out" / "results.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["lm_eval"] == found["lm_eval"]
    table = (tmp_path / "out" / "table.md").read_text()
    assert re.search(r"arc_easy +\| +acc +\| +0 +\| +4 +\| 0\.2500 ± 0\.1250", table)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lm_eval": "helaswag"}, "lm-eval has no task 'helaswag' (did you mean 'hellaswag'?)"),
        ({"lm_eval": "own"}, "lm-eval has no task 'own'"),
        ({"lm_eval": ","}, "--lm_eval=',' names no task"),
        ({"lm_eval": "own", "lm_eval_path": "/nowhere"}, "no folder --lm_eval_path=/nowhere"),
    ],
)
def test_tasks_that_lm_eval_does_not_have_are_told_before_anything_is_read(tmp_path, lm_eval, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        command.run(arguments(tmp_path, model="/nowhere", **changes))
    harness.make("own", str(tmp_path))
    assert not lm_eval


@pytest.mark.parametrize("name", ["lm_eval", "lm_eval.models.huggingface"])
def test_where_lm_eval_is_not_installed_it_is_told_before_anything_is_read(tmp_path, monkeypatch, lm_eval, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=r"--lm_eval=arc_easy needs lm-eval .* pip install 'lm-eval\[hf\]'"):
        command.run(arguments(tmp_path, model="/nowhere", lm_eval="arc_easy"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 3}, "a multiple of the 8 devices"),
        ({"max_new_tokens": 500}, "more than the 256 tokens that both models accept"),
        ({"seeds": "1;2"}, "whole numbers, separated by commas"),
        ({"seeds": "1,-1"}, "--seeds='1,-1' must be at least 0 and below"),
        ({"seeds": str(2**64)}, "must be at least 0 and below"),
        ({"rows": -1}, "--rows=-1 must be at least 0; 0 means no limit."),
        ({"lm_eval_limit": -1}, "--lm_eval_limit=-1 must be at least 0"),
        ({"temperature": "nan", "seeds": "1"}, "temperature=nan must be at least 0"),
        ({"reference_field": "answer"}, "'answer' is missing"),
        ({"data": "/nowhere.jsonl"}, "no file --data=/nowhere.jsonl"),
        ({"data": "dollie"}, "did you mean 'dolly'"),
        ({"model": "/nowhere"}, "/nowhere"),
    ],
)
def test_bad_arguments_are_named_and_nothing_is_written(tmp_path, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        command.run(arguments(tmp_path, **changes))
    assert not (tmp_path / "out").exists()
