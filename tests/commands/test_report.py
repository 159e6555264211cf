"""The page of a run, an evaluation, an ablation and several runs: complete, self-contained and right in a browser."""

import dataclasses
import html.parser
import json
import math
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import base, forward_kl
from kd_jax import report, train
from kd_jax.evaluate import __main__ as command
from kd_jax.evaluate.arguments import parse
from kd_jax.report import comparison, plots
from kd_jax.report.sections import Generation, Text, merged
from kd_jax.run import results, rule_weights
from kd_jax.storage import read_json_lines
from kd_jax.teachers import Viewed
from tests.helpers.runs import smoke

CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
RESPONSES = ("Adds <b>one</b>.", "Adds two to what it is given, and returns it.", "Nothing.")


class Page(html.parser.HTMLParser):
    """A parser that records the files that a page loads and the elements that are not closed."""

    VOID = ("meta", "link", "br", "input", "use", "path", "rect", "img")

    def __init__(self, text):
        super().__init__()
        self.loads, self.open = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.loads += [value for name, value in attributes if name in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def write(folder, name, content):
    folder.mkdir(parents=True, exist_ok=True)
    lines = content if isinstance(content, list) else [content]
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def a_run(folder, after=2.0, seed=0):
    """Writes the files of a run with invented numbers and texts."""
    numbers = lambda kl, rouge: {"forward_kl": kl, "cross_entropy": kl + 1, "rouge_l": rouge}
    before, last = numbers(4.0, 1.0), numbers(after, 8.0)
    write(folder, "config.json", {"steps": 2, "seed": seed})
    write(
        folder,
        "metrics.jsonl",
        [
            {"step": 0, "split": "eval", **before},
            *({"step": step, "split": "train", "loss": 3.0, "tokens": 50.0} for step in (1, 2)),
            {"step": 2, "split": "eval", **last},
        ],
    )
    places = {"places": ["1 to 4", "5 to 16"], **{who: {"reverse_kl": [1.0, None]} for who in ("given", "own")}}
    teacher = {"cross_entropy": 1.0, "rouge_l": 15.0}
    write(folder, "result.json", {"teacher": teacher, "before": before, "after": last, "by_place": places})
    text = lambda i: {"response": RESPONSES[i], "rouge_l": 40.0 * i}
    coloured = lambda i: text(i) | {"pieces": [RESPONSES[i][:3], RESPONSES[i][3:]], "reverse_kl": [0.25, 3.5]}
    lines = [
        {
            "prompt": f"def f{i}(x):",
            "references": ["Adds."],
            "teacher": text(i),
            "before": text(2),
            "after": coloured(i),
        }
        for i in range(2)
    ]
    write(folder, "generations.jsonl", lines)
    return folder


def test_a_page_says_what_came_out(tmp_path):
    path = report.write([a_run(tmp_path / "run")])
    text = path.read_text()
    assert path == tmp_path / "run" / "report.html"
    page = Page(text)
    assert not page.open and all(link.startswith(("#", "data:")) for link in page.loads)
    assert not re.search(r"https?://(?!www\.w3\.org)", text)
    assert "KL(p || q) went from 4.000 to 2.000, 50% of the way to the teacher&#39;s 0.000." in text
    assert "cross-entropy went from 5.000 to 3.000, 50% of the way to the teacher&#39;s 1.000." in text
    assert "Adds &lt;b&gt;one&lt;/b&gt;." in text and "<b>one</b>" not in text
    assert text.count("data-kl=") == 4 and 'title="3.5 nats"' in text and text.count("<svg") >= 5
    assert "data-weight=" not in text and "Coloured by the weight" not in text


def test_a_page_shows_the_token_weights_of_each_term_with_a_rule(tmp_path):
    folder = a_run(tmp_path / "run")
    lines = read_json_lines(folder / "generations.jsonl")
    lines[0]["after"]["token_weights"] = {"kd": [0.0, 0.5], "labels": [0.0, 0.0]}
    lines[1]["after"]["token_weights"] = {"kd": [2.0, 1.0], "labels": [0.0, 0.0]}
    del lines[1]["after"]["reverse_kl"]  # as in a run without a teacher
    write(folder, "generations.jsonl", lines)
    result = json.loads((folder / "result.json").read_text())
    write(folder, "result.json", result | {"without_weights": ["The token weights of the term seen are not shown."]})
    text = report.write([folder]).read_text()
    assert not Page(text).open and text.count("data-kl=") == 2 and text.count("data-weight=") == 8
    assert "under the term kd: 0" in text and "</span> 2.</p>" in text and "under the term labels: 0" in text
    shades = re.findall(r'data-weight="(.*?)" style="background: rgba\(38, 110, 201, (.*?)\)', text)
    assert shades == [
        ("0.0", "0.00"), ("0.5", "0.19"), ("0.0", "0.00"), ("0.0", "0.00"),
        ("2.0", "0.75"), ("1.0", "0.38"), ("0.0", "0.00"), ("0.0", "0.00"),
    ]  # fmt: skip
    assert "The token weights of the term seen are not shown." in text
    both = report.write([folder, a_run(tmp_path / "other")], tmp_path / "both.html").read_text()
    assert "run: The token weights of the term seen are not shown." in both and both.count("data-weight=") == 8


def test_the_weights_of_a_run_are_those_of_its_rules(tmp_path, data_dir, one_device):
    """Rules that read the term's own loss, KL(q || p), can be checked with the KL(q || p) of the same tokens."""
    kl = dict(divergence={"name": "reverse_kl"})
    rule = lambda name, **options: {"name": name, "divide_by": "all", **options}
    config = smoke("forward_kl", data_dir, mesh__data=-1, sample_tokens=12)
    rising = {"name": "linear_schedule", "init_value": 0.0, "end_value": 1.0, "transition_steps": 2}
    base.set_terms(
        config,
        local=base.term(**kl, tokens=rule("threshold", of="divergence", at_least=1.0), rows="data", coefficient=rising),
        batch=base.term(**kl, tokens=rule("top_fraction", of="divergence", fraction=0.3, within="batch")),
        row=base.term(**kl, tokens=rule("top_fraction", of="divergence", fraction=0.3, within="row")),
        early=base.hard_labels(tokens=rule("first", count=2)),
        plain=base.term(**kl),
    )
    run = train.build(config)
    params = run.init_state().params
    results.begin(run, params, str(tmp_path))
    lines = read_json_lines(tmp_path / results.BEFORE)
    kls = [np.array(line["reverse_kl"]) for line in lines]
    weights = {name: [np.array(line["token_weights"][name]) for line in lines] for name in lines[0]["token_weights"]}
    assert weights.keys() == {"local", "batch", "row", "early"} and sum(map(len, kls)) > 20
    for name, of_term in weights.items():
        for values, weight in zip(kls, of_term, strict=True):
            assert len(values) == len(weight) and set(weight) <= {0, 1}, name
    for values, local, row, early in zip(kls, weights["local"], weights["row"], weights["early"], strict=True):
        np.testing.assert_array_equal(local, np.where(abs(values - 1) < 0.002, local, values > 1))
        assert row.sum() == max(1, int(0.3 * len(values))) and values[row == 1].min() >= values[row == 0].max(initial=0)
        assert early.sum() == min(2, len(values)) and early[:2].all()
    every_kl, every_weight = np.concatenate(kls), np.concatenate(weights["batch"])
    assert every_weight.sum() == int(0.3 * len(every_kl))
    assert every_kl[every_weight == 1].min() >= every_kl[every_weight == 0].max() - 0.001

    viewed = dataclasses.replace(run.models, compared_teacher=Viewed(run.models.require_teacher()))
    shown, sentences = rule_weights.with_rules(dataclasses.replace(run, models=viewed))
    assert [term.name for term in shown] == ["early"] and len(sentences) == 3
    assert "the term batch are not shown, because the model teacher has a cache or a view" in sentences[0]


def test_several_runs_are_compared_on_one_page(tmp_path):
    first, second = a_run(tmp_path / "first"), a_run(tmp_path / "second", after=1.5)
    third = a_run(tmp_path / "elsewhere" / "first")
    text = report.write([first, third], tmp_path / "named.html").read_text()
    assert "<td>elsewhere/first</td>" in text, "two folders of one name are two runs"
    with pytest.raises(ValueError, match="--out=FILE"):
        report.write([first, second])
    text = report.write([first, second], tmp_path / "both.html").read_text()
    assert not Page(text).open
    assert "<td><b>1.500</b></td>" in text and "<td>2.000</td>" in text and "2 runs" in text
    assert text.count("<article") == 2 and "<option>second: student after</option>" in text
    assert text.count("<option>teacher</option>") == 1, "what both have is shown once"


def test_an_ablation_says_what_leads_and_by_how_much(tmp_path):
    axes = [["alpha", "key", [0.0, 0.5]], ["beta", "key", [1.0]]]
    config = {"axes": axes, "base": {}, "metrics": ["forward_kl", "rouge_l"]}
    write(tmp_path / "plane", "config.json", config)
    write(tmp_path / "plane", "results.jsonl", [])
    assert "0 runs" in report.write([tmp_path / "plane"]).read_text()
    lines = []
    for alpha, after in ((0.0, (2.0, 2.5)), (0.5, (1.0, 1.5))):
        for seed in (0, 1):
            run = a_run(tmp_path / "plane" / f"{alpha},{seed}" / "run", after[seed], seed)
            result = json.loads((run / "result.json").read_text())
            lines.append({"point": {"alpha": alpha, "beta": 1.0}, "seed": seed, "folder": run.parent.name} | result)
    write(tmp_path / "plane", "results.jsonl", lines)
    text = report.write([tmp_path / "plane"]).read_text()
    assert "KL(p || q): 0.5, 1.0 is best with 1.250, 1.000 ahead of 0.0, 1.0, more than their deviations." in text
    assert "less than their deviations" in text, "ROUGE-L is the same everywhere"
    assert "<h3>heatmap</h3>" in text and text.count("<svg") == 6, "bars, curves and heat maps of two numbers"
    assert text.count("<article") == 2 and text.count("<option>0.5, 1.0</option>") == 1
    assert text.count('data-who="teacher"') == 2


def test_what_is_no_finished_folder_is_told(tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        report.write([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="has no result.json of a finished run"):
        report.write([tmp_path])
    write(tmp_path, "results.jsonl", [{"point": {}, "seed": 0}])
    with pytest.raises(ValueError, match="has no result.json of a finished run"):
        report.write([tmp_path])  # results of an ablation without the config


def test_odd_numbers_and_names_stop_no_page(tmp_path):
    lines = [
        {"point": {"name": name}, "seed": seed, "before": {}, "after": {"forward_kl": value, "rouge_l": math.nan}}
        for name, value in (("$\\frac$", 1.0), ("$", math.inf))
        for seed in (0, 1)
    ]
    table = comparison.table(lines, ["forward_kl", "rouge_l"])
    assert "**1.000 ± 0.000**" in table and "inf ± nan" in table
    (bars,) = comparison.charts({}, ["forward_kl"], lines[:2])
    assert "$\\frac$" in plots.svg(bars)[0] and plots.save(bars, tmp_path).exists()


def test_rows_with_one_prompt_stay_apart():
    row = lambda reference, *texts: Generation("def", (reference,), tuple(Text(*text, 0.0) for text in texts))
    found = merged([
        ("a", [row("one", ("teacher", "t"), ("student", "x")), row("two", ("student", "y")), row("two", ("student", "y2"))]),
        ("b", [row("one", ("teacher", "t"), ("student", "z")), row("two", ("teacher", "u"))]),
        ("c", [row("two", ("teacher", "v"))]),
    ])  # fmt: skip
    assert [[(text.who, text.text) for text in its.texts] for its in found] == [
        [("teacher", "t"), ("a: student", "x"), ("b: student", "z")],
        [("a: student", "y"), ("b: teacher", "u"), ("c: teacher", "v")],
        [("a: student", "y2")],
    ]


@pytest.mark.slow
def test_a_run_leaves_its_page(tmp_path, data_dir, one_device):
    config = forward_kl.get_config("smoke")
    config.data.data_dir, config.mesh.data = str(data_dir), 1
    tokens = {"name": "top_fraction", "of": "student_entropy", "fraction": 0.5, "divide_by": "kept"}
    base.set_terms(config, kd=base.term(tokens=tokens))
    train.train(config, str(tmp_path / "run"), quiet=True)
    text = (tmp_path / "run" / "report.html").read_text()
    assert "2 steps" in text and text.count("<article") == config.data.eval_batch_size and "data-kl" in text
    assert text.count("data-weight") == text.count("data-kl=") and "weight of the token under the term kd: 0" in text
    assert "student before" in text and jax.__version__ in text and "docstrings_teacher" in text


def test_an_evaluation_leaves_its_page(tmp_path):
    rows = [{"prompt": f"def f{i}(x):\n    return x + {i}\n", "response": f"Add {i}."} for i in range(3)]
    write(tmp_path, "rows.jsonl", rows)
    options = {
        "model": "package:docstrings_teacher", "teacher": "package:docstrings_teacher", "data": tmp_path / "rows.jsonl",
        "out": tmp_path / "out", "max_prompt_length": 32, "max_new_tokens": 8, "batch_size": 8, "seeds": "1,2",
    }  # fmt: skip
    command.run(parse([f"--{name}={value}" for name, value in options.items()]))
    text = (tmp_path / "out" / "report.html").read_text()
    assert "has 3 prompts and 2 generation seeds." in text and "The exposure bias is" in text
    assert text.count("<article") == 3 and "<option>seed 2</option>" in text


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    if not CHROMIUM or not DRIVER:
        pytest.skip("Chromium and its driver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-background-networking", "no-first-run"):
        options.add_argument(f"--{flag}")
    with webdriver.Chrome(options=options, service=Service(DRIVER)) as found:
        yield found


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_in_a_browser(tmp_path, browser, width):
    path = report.write([a_run(tmp_path / "run")])
    size = dict(width=width, height=800, deviceScaleFactor=1, mobile=width < 600)
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(Path(path).as_uri())
    script = browser.execute_script
    assert browser.get_log("browser") == [], "nothing fails to load, and no script fails"
    assert script("return document.documentElement.scrollWidth") <= width, "it does not scroll sideways"
    assert script("return performance.getEntriesByType('resource').length") == 0
    sizes = script("return [...document.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect().width)")
    assert len(sizes) >= 5 and min(sizes) > 280

    def shown(**fields):
        script(
            "for (const e of document.querySelectorAll('#filter [name]')) e.value = arguments[0][e.name] ?? '';"
            "document.getElementById('filter').dispatchEvent(new Event('input'))",
            fields,
        )
        prompts = "[...document.querySelectorAll('article')].filter(a => !a.hidden).map(a => a.querySelector('pre').textContent)"
        found = script(f"return {prompts}")
        assert script("return document.getElementById('shown').textContent") == str(len(found))
        return [prompt[4:6] for prompt in found]

    assert shown() == ["f0", "f1"]
    assert shown(who="student after", lowest="30") == ["f1"]
    assert shown(who="student after", longest="4") == ["f0"]
    assert shown(words="TWO TO") == ["f1"] and shown(words="nothing of the kind") == []
    assert shown(order="score", who="teacher") == ["f1", "f0"] and shown(order="-score", who="teacher") == ["f0", "f1"]
