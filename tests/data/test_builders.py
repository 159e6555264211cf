"""The datasets: included and excluded rows, rebuilding after changes, and error messages for bad files."""

import gzip
import http.server
import importlib
import itertools
import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kd_jax import data
from kd_jax.data import docstrings, dolly, download, gsm8k, instructions, jsonl, text
from tests.helpers.paths import ROOT

ADD = '''
def add(a, b):
    """Return the sum of two numbers.

    And more.
    """
    # keep this
    total = a + b
    return total
'''
ADD_ALIKE = ADD.replace("def add", "def plus").replace("Return the sum of two numbers.", "Sums up what it is given.")
SAME_SAID = '''
class Sum:
    @staticmethod
    def add(a, b):
        """Return the sum of   two numbers."""
        return a.__add__(b)
'''
STEP = '''
class Walker:
    @property
    async def step(self):
        """Takes the next step
        of the walk.
        """
        text = """
left
"""
        return self.left + text

    def stub(self):
        """Has no code of its own."""

    def short(self):
        """Too short."""
        return 1
'''


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def module_in(split, taken=()):
    """Returns the name of a module of `sample` that the hash assigns to the split."""
    names = (f"m{i}" for i in range(1000))
    return next(n for n in names if docstrings.split_of(f"sample.{n}") == split and n not in taken)


@pytest.fixture
def sample(tmp_path, monkeypatch):
    """A function `sample(module=source, ...)` that installs a package `sample`, version 1.0, in a folder."""
    site = tmp_path / "site"
    monkeypatch.syspath_prepend(str(site))

    def install(version="1.0", **modules):
        for old in site.glob("*.dist-info"):
            (old / "METADATA").unlink()
            (old / "top_level.txt").unlink()
            old.rmdir()
        info = site / f"sample-{version}.dist-info"
        (site / "sample" / "tests").mkdir(parents=True, exist_ok=True)
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sample\nVersion: {version}\n")
        (info / "top_level.txt").write_text("sample\n")
        for name, source in {"__init__": "raise SystemExit('imported')", **modules}.items():
            (site / "sample" / f"{name}.py").write_text(source)
        (site / "sample" / "tests" / "extra.py").write_text(ADD)
        importlib.invalidate_caches()
        return {"packages": ("sample",), "standard_library": False, "data_dir": str(tmp_path / "tfds")}

    return install


def test_a_function_is_split_into_code_and_first_paragraph(sample):
    options = sample(**{module_in("train"): ADD + STEP})
    rows = {row["name"].rsplit(".", 1)[1]: row for row in data.load("docstrings", split="train", **options)}
    assert set(rows) == {"add", "step"}  # without the stub, the short function and tests/extra.py
    assert rows["add"]["response"] == "Return the sum of two numbers."
    assert rows["add"]["prompt"] == "def add(a, b):\n    # keep this\n    total = a + b\n    return total"
    assert rows["add"]["context"] == ""
    assert rows["step"]["response"] == "Takes the next step of the walk."
    assert rows["step"]["prompt"].startswith("@property\nasync def step(self):\n    text =")
    assert rows["step"]["name"] == f"sample.{module_in('train')}.Walker.step"


def test_the_hint_is_the_rest_of_the_docstring(sample):
    parts = ["Spreads \\ud800 the load.", "", "Args:", "  a: one,", "    two.", "", "", "  ", "word " * 100]
    long = ADD.replace("add", "spread").replace("And more.", "\n    ".join(parts)).replace("a + b", "a.spread(b)")
    options = sample(**{module_in("train"): ADD + long + STEP})
    rows = {row["name"].rsplit(".", 1)[1]: row for row in data.load("docstrings", split="train", **options)}
    assert set(data.columns("docstrings", packages=("sample",))) == set(rows["add"])
    assert {name: row["hint"] for name, row in rows.items() if name != "spread"} == {"add": "And more.", "step": ""}
    start = "Spreads ? the load.\n\nArgs: a: one, two.\n\nword word"
    hint = rows["spread"]["hint"]
    assert hint.startswith(start) and hint.endswith("word") and 395 < len(hint) <= docstrings.MAX_HINT


@pytest.mark.parametrize("twin", [ADD, ADD_ALIKE, SAME_SAID], ids=["same", "same code", "same name and docstring"])
def test_no_held_out_function_has_a_twin_in_training(sample, twin):
    other = ADD.replace("add", "difference").replace("sum", "difference").replace("a + b", "a.less(b)")
    options = sample(**{module_in("train"): twin + other, module_in("validation"): ADD})
    assert [row["response"] for row in data.load("docstrings", split="validation", **options)] == [
        "Return the sum of two numbers."
    ]
    names = [row["name"].rsplit(".", 1)[1] for row in data.load("docstrings", split="train", **options)]
    assert names == ["difference"]


def test_modules_are_whole_in_one_split_and_parts_are_as_said():
    splits = [docstrings.split_of(f"package.module{i}") for i in range(4000)]
    assert {split: round(splits.count(split) / 4000, 2) for split in set(splits)} == {
        "train": 0.94, "validation": 0.03, "test": 0.03,
    }  # fmt: skip


def test_an_upgraded_package_is_read_anew_and_an_old_one_is_not_rebuilt(sample, capsys):
    name = module_in("train")
    options = sample(**{name: ADD})
    assert len(data.load("docstrings", split="train", **options)) == 1
    sample(**{name: ADD + STEP})
    assert len(data.load("docstrings", split="train", **options)) == 1
    sample(version="2.0", **{name: ADD + STEP})
    capsys.readouterr()
    assert len(data.load("docstrings", split="train", **options)) == 2
    assert "2.0" not in capsys.readouterr().err


def test_docstrings_errors(sample):
    with pytest.raises(ValueError, match="'nothere', which is not installed: pip install nothere"):
        data.load("docstrings", split="train", packages=("nothere",))
    options = sample(**{module_in("train"): ADD})
    with pytest.raises(ValueError, match=r"'test' of docstrings is empty; rows of each split: \{'train': 1\}"):
        data.load("docstrings", split="test", **options)
    (info,) = Path(options["data_dir"]).parent.glob("site/*.dist-info")
    for file in info.iterdir():
        file.unlink()
    info.rmdir()
    with pytest.raises(ValueError, match="must know the version of 'sample'"):
        data.load("docstrings", split="train", **options)


def test_jsonl_fields_gzip_and_hashed_split(tmp_path):
    rows = [{"q": f"question {i % 150} ü", "c": "", "a": str(i)} for i in range(300)]
    plain = Path(write_lines(tmp_path / "rows.jsonl", rows))
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    names = dict(prompt_field="q", response_field="a", context_field="c", validation_fraction=0.1)
    parts = {}
    for path in (plain, packed):
        parts[path] = [
            [
                row["prompt"] + row["response"]
                for row in data.load("jsonl", split=s, data_dir=str(tmp_path), path=str(path), **names)
            ]
            for s in ("train", "validation")
        ]
    assert parts[plain] == parts[packed]
    train, validation = parts[plain]
    assert sorted(train + validation) == sorted(row["q"] + row["a"] for row in rows)
    assert 10 <= len(validation) <= 50
    # Both answers to a question are in the same split.
    questions = [{text.split("ü")[0] for text in part} for part in (train, validation)]
    assert not questions[0] & questions[1]


def test_jsonl_columns_are_read_back_as_texts(tmp_path):
    rows = [{"prompt": "a", "response": "b", "topic/kind é": "x\n", "level": 3}]
    rows += [{"prompt": f"{i}", "response": "r", "topic/kind é": "", "level": v} for i, v in enumerate((0.5, True))]
    options = dict(path=write_lines(tmp_path / "rows.jsonl", rows), validation_fraction=0.0)
    names = ("level", "topic/kind é")
    load = lambda **columns: data.load("jsonl", split="train", data_dir=str(tmp_path / "tfds"), **options, **columns)
    built = {row["prompt"]: row for row in load(columns=names)}
    assert built["a"] == {
        "name": "", "prompt": "a", "context": "", "response": "b", "level": "3", "topic/kind é": "x\n",
    }  # fmt: skip
    assert (built["0"]["level"], built["1"]["level"], built["1"]["topic/kind é"]) == ("0.5", "true", "")
    assert list(load(columns=names)) == list(built.values()), "read from the built files"
    assert set(load()[0]) == {"name", "prompt", "context", "response"}
    assert data.columns("jsonl", columns=names, **options) == ("name", "prompt", "context", "response", *names)
    (reference, *_) = data.load_references("jsonl", split="train", data_dir=str(tmp_path), columns=names, **options)
    assert reference["references"] == [reference["response"]] and {"level"} < set(reference)


def test_only_columns_change_the_fingerprint_of_a_jsonl_file(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [{"prompt": "a", "response": "b", "c": "d", "e": 1}])
    fingerprint = lambda **options: data.fingerprint("jsonl", split="train", path=path, **options)
    assert fingerprint() == fingerprint(columns=()) == "9a72b7294e20", "the datasets of earlier versions stay valid"
    prints = {fingerprint(), fingerprint(columns=("c",)), fingerprint(columns=("e",)), fingerprint(columns=("c", "e"))}
    assert len(prints) == 4 and fingerprint(columns=["c"]) in prints


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ('"level": "b"', r"rows.jsonl:2: the field 'topic' is missing; the row has prompt, response, level"),
        ('"topic": null', r"rows.jsonl:2: the field 'topic' is None, not a string, a finite number or a boolean"),
        ('"topic": ["a"]', r"rows.jsonl:2: the field 'topic' is \['a'\], not a string, a finite number"),
        ('"topic": NaN', r"rows.jsonl:2: the field 'topic' is nan, not a string, a finite number"),
        ('"topic": 1e999', r"rows.jsonl:2: the field 'topic' is inf, not a string, a finite number"),
        ('"topic": "\\ud800"', r"rows.jsonl:2: the field 'topic' has half of a surrogate pair"),
    ],
)
def test_bad_values_of_a_column_are_named_with_their_line(tmp_path, values, message):
    path = tmp_path / "rows.jsonl"
    first, second = ('{"prompt": "a", "response": "b", ' + part + "}\n" for part in (f'"topic": {10**400}', values))
    path.write_text(first + second)
    with pytest.raises(ValueError, match=message):
        data.load("jsonl", split="train", data_dir=str(tmp_path / "tfds"), path=str(path), columns=("topic",))


def test_names_of_columns_that_are_not_allowed(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [{"prompt": "a", "response": "b"}])
    for names, message in (
        (
            ("hint", "response"),
            r"columns=\('hint', 'response'\): the name 'response' is reserved; .*name, prompt, context",
        ),
        (("name",), "the name 'name' is reserved"),
        (("hint", "hint"), "the name 'hint' occurs twice"),
        (("",), "the name '' is empty"),
        ("hint", r"columns='hint' of the dataset jsonl must be a tuple of texts, such as \('a', 'b'\)"),
    ):
        for call in (data.columns, lambda name, **options: data.load(name, split="train", **options)):
            with pytest.raises(ValueError, match=message):
                call("jsonl", path=path, columns=names)
    with pytest.raises(ValueError, match="gsm8k has no option 'columns'"):
        data.columns("gsm8k", columns=("hint",))
    with pytest.raises(ValueError, match=r"no dataset 'gms8k' \(did you mean 'gsm8k'\?\)"):
        data.columns("gms8k")
    assert data.columns("text", path="nowhere.txt") == ("name", "prompt", "context", "response")


def test_jsonl_is_rebuilt_when_the_file_changes(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [{"prompt": "a", "response": "b"}])
    held_out = write_lines(tmp_path / "held_out.jsonl", [{"prompt": "v", "response": "w"}])
    options = dict(data_dir=str(tmp_path / "tfds"), path=path, validation_path=held_out)
    assert [dict(row) for row in data.load("jsonl", split="train", **options)] == [
        {"name": "", "prompt": "a", "context": "", "response": "b"}
    ]
    assert data.load("jsonl", split="validation", **options)[0]["prompt"] == "v"
    write_lines(Path(path), [{"prompt": "c", "response": "b"}])
    assert data.load("jsonl", split="train", **options)[0]["prompt"] == "c"


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"prompt": "a"}', r"rows.jsonl:2: the field 'response' is missing; the row has prompt"),
        ('{"prompt": "a", "response": 3}', r"rows.jsonl:2: the field 'response' is 3, not a string"),
        ('{"prompt": ', r"rows.jsonl:2: not valid JSON"),
        ("[1]", r"rows.jsonl:2: expected a JSON object, found list"),
    ],
)
def test_jsonl_errors_name_the_line_and_leave_nothing_behind(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        data.load("jsonl", split="train", data_dir=str(tmp_path / "tfds"), path=str(path))
    assert not list((tmp_path / "tfds").rglob("*array_record*"))  # no partly built dataset remains


def test_errors_of_files_splits_and_names(tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    load = lambda name="jsonl", split="train", **options: data.load(
        name, split=split, data_dir=str(tmp_path), **options
    )
    with pytest.raises(ValueError, match="no rows in any split: is its file empty"):
        load(path=str(empty))
    with pytest.raises(ValueError, match=r"there is no file .*nowhere\.jsonl"):
        load(path=str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(ValueError, match="has no split 'test'; the splits are train, validation"):
        load(split="test", path=str(empty))
    with pytest.raises(
        ValueError, match=r"no dataset 'jsnol' \(did you mean 'jsonl'\?\); known: docstrings, dolly, gsm8k, jsonl, text"
    ):
        load("jsnol")
    with pytest.raises(ValueError, match=r"no option 'prompt_feild' \(did you mean 'prompt_field'\?\)"):
        load(path="x", prompt_feild="a")
    with pytest.raises(ValueError, match=r"jsonl needs data\.options\.path"):
        load()
    with pytest.raises(ValueError, match=r"validation_fraction=1\.5 must be at least 0 and below 1"):
        load(path=str(empty), validation_fraction=1.5)
    with pytest.raises(ValueError, match=r"no file matches data.options.path='.*\*.txt'"):
        load("text", path=str(tmp_path / "*.txt"))


def test_text_files_are_cut_between_lines(tmp_path):
    (tmp_path / "b.txt").write_text("".join(f"line {i}\n" for i in range(20_000)))
    (tmp_path / "a.txt").write_text("short")
    source = data.load(
        "text", split="train", data_dir=str(tmp_path), path=str(tmp_path / "*.txt"), validation_fraction=0.0
    )
    texts = sorted((row["response"] for row in source), key=len)
    assert texts[0] == "short" and all(text.endswith("\n") and len(text) < 66_000 for text in texts[1:])
    assert sum(map(len, texts)) == sum(len(path.read_text()) for path in tmp_path.glob("*.txt"))


def test_dolly_splits(tmp_path):
    rows = [{"instruction": f"i{i}", "context": "c", "response": "r", "category": "x"} for i in range(600)]
    path = write_lines(tmp_path / "dolly.jsonl", rows)
    parts = {
        s: [r["prompt"] for r in data.load("dolly", split=s, data_dir=str(tmp_path), path=path)]
        for s in ("train", "validation", "test")
    }
    assert sorted(itertools.chain(*parts.values())) == sorted(row["instruction"] for row in rows)
    assert all(5 <= len(parts[s]) <= 40 for s in ("validation", "test"))
    write_lines(Path(path), [{"instruction": "i", "context": "", "response": "r"}, {**rows[0], "category": "open_qa"}])
    loaded = [
        row for s in ("train", "validation") for row in data.load("dolly", split=s, data_dir=str(tmp_path), path=path)
    ]
    assert {row["prompt"]: row["category"] for row in loaded} == {"i": "", "i0": "open_qa"}
    assert set(data.columns("dolly")) == set(loaded[0])


@pytest.fixture
def server(tmp_path):
    """The address of a web server that serves the folder `web`."""
    (tmp_path / "web").mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path / "web"))

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_dolly_is_downloaded_once_and_only_the_known_file(tmp_path, monkeypatch, server):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(dolly, "URL", f"{server}/dolly.jsonl")
    load = lambda: data.load("dolly", split="train", data_dir=str(tmp_path / "tfds"))
    with pytest.raises(ConnectionError, match=r"could not be downloaded.*404.*data.options.path"):
        load()
    file = tmp_path / "web" / "dolly.jsonl"
    write_lines(file, [{"instruction": "i", "context": "", "response": "r"}])
    with pytest.raises(ValueError, match="has the SHA-256"):
        load()
    assert not [path for path in (tmp_path / ".cache").rglob("*") if path.is_file()]
    monkeypatch.setattr(dolly, "SHA256", download.sha256_of(file))
    assert load()[0]["prompt"] == "i"
    file.unlink()
    assert load()[0]["prompt"] == "i"
    (cached,) = (tmp_path / ".cache").rglob("*.jsonl")
    cached.write_text("{}")
    with pytest.raises(ValueError, match="delete the file to download it again"):
        load()


def test_gsm8k_splits_and_downloads(tmp_path, monkeypatch, server):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, count in (("train", 300), ("test", 7)):
        rows = [{"question": f"{name} {i}?", "answer": f"So\n#### {i}"} for i in range(count)]
        write_lines(tmp_path / "web" / f"{name}.jsonl", rows)
    load = lambda folder, **options: {
        s: {row["prompt"] for row in data.load("gsm8k", split=s, data_dir=str(tmp_path / folder), **options)}
        for s in ("train", "validation", "test")
    }
    local = load("local", path=str(tmp_path / "web"))
    assert (
        len(local["train"] | local["validation"]) == 300
        and 1 <= len(local["validation"]) <= 25
        and len(local["test"]) == 7
    )
    monkeypatch.setattr(gsm8k, "URL", server + "/{}.jsonl")
    with pytest.raises(ValueError, match="has the SHA-256"):
        load("web")
    known = {name: download.sha256_of(tmp_path / "web" / f"{name}.jsonl") for name in gsm8k.SHA256}
    monkeypatch.setattr(gsm8k, "SHA256", known)
    assert load("web") == local
    for row in data.load("gsm8k", split="test", data_dir=str(tmp_path / "local"), path=str(tmp_path / "web")):
        assert row["answer"] == row["response"] and row["answer"].startswith("So\n#### ")


TEMPLATED = "### Instruction:\nSing.\n\n### Response:\n"


def test_an_unknown_checksum_is_trusted_once_and_checked_from_then_on(tmp_path, monkeypatch, server, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(instructions, "URL", server + "/{}")
    file = tmp_path / "web" / instructions.FILES["vicuna"]
    file.parent.mkdir(parents=True)
    write_lines(file, [{"prompt": TEMPLATED, "output": "La."}, {"prompt": TEMPLATED, "output": ["La.", "Lala."]}])
    load = lambda **options: data.load_references("vicuna", split="test", **options)
    with pytest.raises(ValueError, match=f"has the SHA-256 {download.sha256_of(file)}; {'0' * 64} was expected"):
        load(sha256="0" * 64)
    assert not [path for path in (tmp_path / ".cache").rglob("*") if path.is_file()]
    rows = load()
    assert [row["references"] for row in rows] == [["La."], ["La.", "Lala."]]
    assert {row["prompt"] + row["context"] for row in rows} == {TEMPLATED}
    said = capsys.readouterr().err
    assert f"{server}/{instructions.FILES['vicuna']}" in said and download.sha256_of(file) in said
    (record,) = (tmp_path / ".cache").rglob("*.sha256")
    assert record.read_text() == f"{download.sha256_of(file)}  {record.stem}\n"
    write_lines(file, [{"prompt": "another", "output": "one"}])
    assert load() == rows and capsys.readouterr().err == ""
    cached = record.with_suffix("")
    cached.unlink()
    with pytest.raises(
        ValueError, match=rf"{record} has the checksum of an earlier download: delete it to trust the new file"
    ):
        load()
    assert not cached.exists()
    record.unlink()
    assert load()[0]["prompt"] == "another"
    cached.write_text("{}")
    with pytest.raises(ValueError, match="delete the file to download it again"):
        load()
    assert load(sha256=download.sha256_of(file))[0]["prompt"] == "another"


@pytest.mark.parametrize("name", data.EVALUATION)
def test_evaluation_sets_from_a_file_here(tmp_path, name):
    path = write_lines(tmp_path / "valid.jsonl", [{"prompt": TEMPLATED, "output": ["La.", "Lala."], "topic": 1}])
    load = lambda split="test", **options: data.load_references(name, split=split, **{"path": path} | options)
    assert load() == [{"prompt": TEMPLATED, "context": "", "references": ["La.", "Lala."]}]
    assert load(sha256=download.sha256_of(Path(path))) == load()
    assert data.make_render("plain", None)(TEMPLATED, "") == TEMPLATED
    for changes, message in (
        ({"split": "train"}, f"{name} has no split 'train'; the splits are test"),
        ({"path": str(tmp_path / "nowhere.jsonl")}, "there is no file .*nowhere"),
        ({"sha256": "12"}, "sha256='12' must be a SHA-256: 64 digits"),
        ({"sha256": "f" * 64}, f"valid.jsonl has the SHA-256 .*; expected {'f' * 64}"),
        ({"file": path}, "has no option 'file'; the options are path, sha256"),
    ):
        with pytest.raises(ValueError, match=message):
            load(**changes)
    with pytest.raises(
        ValueError, match=rf"{name} is for evaluation only, with python -m kd_jax.evaluate --data={name}"
    ):
        data.load(name, split="train", path=path)


def test_any_dataset_has_references(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [{"prompt": "a", "response": "b"}])
    (row,) = data.load_references("jsonl", split="train", data_dir=str(tmp_path), path=path)
    assert (row["prompt"], row["context"], row["references"]) == ("a", "", ["b"])
    with pytest.raises(
        ValueError, match=r"'self_instuct' \(did you mean 'self_instruct'\?\); known: docstrings, .*vicuna"
    ):
        data.load_references("self_instuct", split="test")


def test_two_processes_may_build_at_once(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "rows.jsonl", [{"prompt": "a", "response": "b"}])
    load = lambda: data.load("jsonl", split="train", data_dir=str(tmp_path / "tfds"), path=path)
    read = jsonl.read

    def read_while_another_builds(*args, **keywords):
        monkeypatch.setattr(jsonl, "read", read)
        assert len(load()) == 1
        return read(*args, **keywords)

    monkeypatch.setattr(jsonl, "read", read_while_another_builds)
    assert [row["prompt"] for row in load()] == ["a"]
    assert not re.search("incomplete", " ".join(map(str, (tmp_path / "tfds").rglob("*"))))


def test_of_a_few_rows_one_is_held_out_and_one_is_not(tmp_path):
    sizes = lambda prompts, **options: [
        sum(1 for row in rows())
        for rows in jsonl.source(
            write_lines(tmp_path / "few.jsonl", [{"prompt": p, "response": "r"} for p in prompts]), **options
        )[1].values()
    ]
    assert min(jsonl.fraction(prompt) for prompt in "abcde") > 0.02
    assert sizes("abcde") == [4, 1] and sizes("ab") == [1, 1]
    assert sizes("aa") == [2, 0] and sizes("abcde", validation_fraction=0.0) == [5, 0]


def test_of_a_large_share_one_prompt_stays_in_training(tmp_path):
    prompts = [{"prompt": p, "response": "r"} for p in "abcde"]
    path = write_lines(tmp_path / "few.jsonl", prompts)
    for share in (0.5, 0.9, 0.999):
        splits = jsonl.source(path, validation_fraction=share)[1]
        train, held_out = ([row["prompt"] for row in splits[split]()] for split in ("train", "validation"))
        assert train and held_out and sorted(train + held_out) == list("abcde")


def test_ranges_are_the_shares_and_move_only_where_a_split_would_be_empty():
    many = [i / 1000 for i in range(1000)]
    assert jsonl.divide(many, {"validation": 0.03, "test": 0.03}) == {
        "validation": (0.0, 0.03), "test": (0.03, 0.06), "train": (0.06, 1.0),
    }  # fmt: skip
    shares = {"test": 0.03, "validation": 0.03}
    for few, filled in (
        ([], set()), ([0.01], {"train"}), ([0.01, 0.02], {"validation", "train"}), ([0.8, 0.9], {"validation", "train"}),
        ([0.01, 0.02, 0.025], set(shares) | {"train"}), ([0.7, 0.8, 0.9, 0.95], set(shares) | {"train"}),
        ([0.01, 0.04, 0.5], set(shares) | {"train"}),
    ):  # fmt: skip
        ranges = jsonl.divide(few + few, shares)
        splits = [[split for split, (low, high) in ranges.items() if low <= number < high] for number in few]
        assert all(len(one) == 1 for one in splits) and {split for (split,) in splits} == filled, few


def texts_of(path, split, tmp_path, **options):
    """Returns the sorted texts of a split of the dataset `text`."""
    source = data.load("text", split=split, data_dir=str(tmp_path / "tfds"), path=str(path), **options)
    return sorted(row["response"] for row in source)


@pytest.mark.parametrize("lines", [2, 3, 50, 400, 12_000, 40_000])
def test_of_a_small_text_some_lines_are_held_out_and_some_are_not(lines, tmp_path):
    (tmp_path / "small.txt").write_text(text := "".join(f"This is line {i}.\n" for i in range(lines)))
    train, held_out = (texts_of(tmp_path / "small.txt", split, tmp_path) for split in ("train", "validation"))
    assert train and held_out and all(map(str.strip, train + held_out))
    assert sorted("".join(train + held_out).splitlines()) == sorted(text.splitlines())
    if lines in (50, 400):  # a text of one piece: the last 2 %, at least one line
        assert held_out == ["".join(f"This is line {i}.\n" for i in range(lines - lines // 50, lines))]


def test_nothing_of_a_text_is_held_out_at_zero_and_a_file_may_be_named(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.txt").write_text("three\n")
    assert texts_of(tmp_path / "a.txt", "train", tmp_path, validation_fraction=0.0) == ["one\ntwo\n"]
    with pytest.raises(ValueError, match="'validation' of text is empty.*choose another split"):
        texts_of(tmp_path / "a.txt", "validation", tmp_path, validation_fraction=0.0)
    named = dict(validation_path=str(tmp_path / "b*.txt"), validation_fraction=7.0)
    assert texts_of(tmp_path / "a.txt", "train", tmp_path, **named) == ["one\ntwo\n"]
    assert texts_of(tmp_path / "a.txt", "validation", tmp_path, **named) == ["three\n"]
    (tmp_path / "b.txt").write_text("four\n")
    assert texts_of(tmp_path / "a.txt", "validation", tmp_path, **named) == ["four\n"], "built anew"
    both = text.source((str(tmp_path / "a.txt"), str(tmp_path / "b.txt")), str(tmp_path / "b.txt"))[0]
    assert both != text.source(str(tmp_path / "a.txt"), (str(tmp_path / "b.txt"),) * 2)[0]
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=rf"validation_fraction={share} must be at least 0 and below 1"):
            texts_of(tmp_path / "a.txt", "train", tmp_path, validation_fraction=share)
    with pytest.raises(ValueError, match=r"no file matches data.options.validation_path='.*c\.txt'"):
        texts_of(tmp_path / "a.txt", "train", tmp_path, validation_path=str(tmp_path / "c.txt"))


def test_a_text_without_text_or_with_one_line_is_a_clear_error(tmp_path):
    for content in ("", "\n \n"):
        (tmp_path / "a.txt").write_text(content)
        with pytest.raises(ValueError, match=r"data.options.path='.*a\.txt': the files have no text"):
            texts_of(tmp_path / "a.txt", "train", tmp_path)
    for content in ("one line", "one line\n\n"):
        (tmp_path / "a.txt").write_text(content)
        with pytest.raises(
            ValueError, match=r"a\.txt has only one line of text .*validation_path.*validation_fraction=0"
        ):
            texts_of(tmp_path / "a.txt", "train", tmp_path)
        assert texts_of(tmp_path / "a.txt", "train", tmp_path, validation_fraction=0.0) == [content]


@pytest.mark.parametrize(
    ("name", "content", "field", "found"),
    [
        ("text", "first\nsecond\n", "response", ["first\n", "second\n"]),
        ("jsonl", '{"prompt": "a", "response": "r"}\n{"prompt": "b", "response": "r"}\n', "prompt", ["a", "b"]),
    ],
)
def test_the_mark_that_windows_writes_before_a_text_is_no_text(name, content, field, found, tmp_path):
    (tmp_path / "rows").write_text(content, encoding="utf-8-sig")
    options = dict(path=str(tmp_path / "rows"), data_dir=str(tmp_path))
    rows = [row for split in ("train", "validation") for row in data.load(name, split=split, **options)]
    assert sorted(row[field] for row in rows) == found


def test_a_folder_or_nothing_in_place_of_a_text_file_is_named(tmp_path):
    for path, words in ((str(tmp_path), "is a folder; name files, or a pattern such as"), ("", "no file matches")):
        with pytest.raises(ValueError, match=re.escape(f"data.options.path={path!r}")) as error:
            data.load("text", split="train", path=path, data_dir=str(tmp_path))
        assert words in str(error.value)


def test_small_files_of_ones_own_have_rows_in_every_split(tmp_path):
    dollys = write_lines(
        tmp_path / "dolly.jsonl", [{"instruction": f"i{i}", "context": "", "response": "r"} for i in range(4)]
    )
    for name in ("train", "test"):
        write_lines(tmp_path / f"{name}.jsonl", [{"question": f"{name} {i}?", "answer": "2"} for i in range(3)])
    for name, path, total in (("dolly", dollys, 4), ("gsm8k", str(tmp_path), 6)):
        load = lambda split, name=name, path=path: data.load(name, split=split, data_dir=str(tmp_path), path=path)
        sizes = [len(load(split)) for split in ("train", "validation", "test")]
        assert min(sizes) >= 1 and sum(sizes) == total


def test_a_small_package_has_rows_in_every_split(sample):
    functions = {
        f"f{i}": ADD.replace("add", f"add{i}").replace("two", f"{i}").replace("a + b", f"a + {i} * b") for i in range(4)
    }
    options = sample(**functions)
    assert {docstrings.split_of(f"sample.{name}") for name in functions} == {"train"}
    found = {s: [row["name"] for row in data.load("docstrings", split=s, **options)] for s in docstrings.SPLITS}
    assert min(map(len, found.values())) >= 1 and sum(map(len, found.values())) == 4


def test_rows_are_sequences_of_str(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [{"prompt": f"p{i}", "response": "é"} for i in range(3)])
    load = lambda: data.load("jsonl", split="train", data_dir=str(tmp_path), path=path, validation_fraction=0.0)
    source = load()
    assert len(source) == 3 and [row for row in source] == [source[i] for i in range(3)] == list(load())
    assert {type(value) for row in source for value in row.values()} == {str}
    with pytest.raises(IndexError):
        source[3]


def test_tensorflow_is_never_imported(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [{"prompt": "a", "response": "b"}])
    code = (
        "import sys; from kd_jax import data; "
        f"source = data.load('jsonl', split='train', data_dir={str(tmp_path)!r}, path={path!r}); source[0]; "
        "sys.exit(any(name.split('.')[0] in ('tensorflow', 'torch') for name in sys.modules))"
    )
    root = ROOT
    assert subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=root, capture_output=True).returncode == 0
