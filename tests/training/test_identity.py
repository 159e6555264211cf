"""A run belongs to the contents that its config names: replaced contents are an error, and moved contents are not."""

import copy
import json
import os
import shutil
import sys

import numpy as np
import pytest

from configs.ablations import base as ablations
from kd_jax import ablate, cache_teacher, data, models, train
from kd_jax.models import folder
from kd_jax.run import identity
from kd_jax.settings import Settings
from kd_jax.storage import directory
from tests.helpers.runs import last_state, smoke

pytestmark = pytest.mark.usefixtures("one_device")
TEACHER = folder("package:docstrings_teacher")
OWN = """
import jax.numpy as jnp

def gap(log_p, log_q):
    return jnp.sum((jnp.exp(log_p) - jnp.exp(log_q)) ** 2, axis=-1)

def constant(value):
    return lambda step: value
"""


def write_rows(path, count, word="says"):
    rows = ({"prompt": f"What is {i}?", "response": f"It {word} {i} and {i + 1}."} for i in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def of_rows(method, tmp_path, data_dir, **changes):
    """Returns a config that trains on the rows of rows.jsonl."""
    config = smoke(method, data_dir, data__name="jsonl", **changes)
    config.data.options = {"path": str(tmp_path / "rows.jsonl"), "validation_fraction": 0.1}
    return config


SHORT = dict(steps=3, checkpoint_every=2, eval_every=3, log_every=1, data__eval_rows=4)


@pytest.mark.slow
def test_a_run_whose_rows_were_replaced_is_refused_and_goes_on_with_the_old_ones(tmp_path, data_dir, monkeypatch):
    """Equal bytes in another file with another modification time count as the old contents."""
    write_rows(tmp_path / "rows.jsonl", 200)
    config = of_rows("sft", tmp_path, data_dir, **SHORT)
    train.train(config, str(tmp_path / "whole"), quiet=True)
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "3")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()

    shutil.copy(tmp_path / "rows.jsonl", tmp_path / "kept.jsonl")
    write_rows(tmp_path / "rows.jsonl", 37)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="belongs to a run of other contents") as error:
        patch.setattr(train, "build", None)  # the error comes before anything is built
        train.train(config, str(tmp_path / "run"), quiet=True)
    assert f"data.options.path={tmp_path / 'rows.jsonl'} has other content than when the run began" in str(error.value)
    assert "Restore the old contents, or choose another --workdir" in str(error.value)
    assert "teacher" not in str(error.value)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before

    os.replace(tmp_path / "kept.jsonl", tmp_path / "rows.jsonl")
    os.utime(tmp_path / "rows.jsonl", (1, 1))
    train.train(config, str(tmp_path / "run"), quiet=True)
    for one, other in zip(last_state(tmp_path / "whole")[1], last_state(tmp_path / "run")[1], strict=True):
        np.testing.assert_array_equal(one, other)


class Written:
    """A substitute for a run with a tokenizer and without responses."""

    written = None

    def __init__(self, tokenizer=None):
        self.tokenizer = tokenizer or data.Tokenizer.load(TEACHER)


def began(workdir, config, run=None):
    settings = Settings.read(config)
    identity.write(str(workdir), settings, (run or Written()).written)
    identity.check(str(workdir), settings)
    return json.loads((workdir / directory.IDENTITY).read_text(encoding="utf-8"))


def refused(workdir, config, *words, run=None):
    with pytest.raises(ValueError, match="Restore the old contents") as error:
        identity.check(str(workdir), Settings.read(config), run and run.written)
    lines = [line for line in str(error.value).splitlines() if "has other content" in line]
    assert len(lines) == len(words) and all(word in line for word, line in zip(words, lines, strict=True)), lines


@pytest.fixture
def copied(tmp_path, data_dir):
    """A config whose teacher, student and tokenizer are folders that a test may change."""
    for name in ("teacher", "student", "tokenizer"):
        shutil.copytree(TEACHER, tmp_path / name)
    for name in ("teacher", "student"):
        config = tmp_path / name / "config.json"
        config.write_text(config.read_text(encoding="utf-8") + "\n", encoding="utf-8")  # so that the three files differ
    paths = {f"{name}__path": str(tmp_path / name) for name in ("teacher", "student", "tokenizer")}
    return smoke("forward_kl", data_dir, student__init="pretrained", **paths)


def flip(path):
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def test_another_teacher_student_or_tokenizer_is_refused(copied, tmp_path):
    found = began(tmp_path / "run", copied)
    assert found.keys() == {"data", "teacher", "student", "tokenizer", "tokenizer of the student"} and str(
        tmp_path
    ) not in str(found)
    for name, file in (("teacher", "model.safetensors"), ("student", "model.safetensors"), ("teacher", "config.json")):
        content = (tmp_path / name / file).read_bytes()
        (tmp_path / name / file).write_bytes(content + b"\n")
        refused(tmp_path / "run", copied, f"{name}.path={tmp_path / name}")
        (tmp_path / name / file).write_bytes(content)
    tokenizer = tmp_path / "tokenizer" / "tokenizer.json"
    changed = json.loads(tokenizer.read_text(encoding="utf-8"))
    vocabulary = changed["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    content = tokenizer.read_bytes()
    tokenizer.write_text(json.dumps(changed), encoding="utf-8")
    refused(tmp_path / "run", copied, f"the tokenizer of tokenizer.path={tmp_path / 'tokenizer'}")
    tokenizer.write_bytes(content)
    identity.check(str(tmp_path / "run"), Settings.read(copied))


def test_the_chat_template_belongs_to_a_run_with_that_template(copied, tmp_path):
    settings = tmp_path / "tokenizer" / "tokenizer_config.json"
    kept = json.loads(settings.read_text(encoding="utf-8"))
    write = lambda template: settings.write_text(json.dumps(kept | {"chat_template": template}), encoding="utf-8")
    load = lambda: Written(data.Tokenizer.load(tmp_path / "tokenizer"))
    for template in ("plain", "chat"):
        copied.data.template = template
        write("{{ messages }}")
        began(tmp_path / template, copied, load())
        write("{{ messages }}!")
    refused(tmp_path / "chat", copied, "the tokenizer of")
    copied.data.template = "plain"
    identity.check(str(tmp_path / "plain"), Settings.read(copied))


def test_a_students_missing_weights_are_not_compared(copied, tmp_path):
    """A resumed run does not read the weights, but it reads config.json and the tokenizer of the folder."""
    began(tmp_path / "run", copied)
    (tmp_path / "student" / "model.safetensors").unlink()
    identity.check(str(tmp_path / "run"), Settings.read(copied))
    shutil.rmtree(tmp_path / "student")
    with pytest.raises(ValueError, match=rf"student\.path: the folder {tmp_path}/student does not exist"):
        identity.check(str(tmp_path / "run"), Settings.read(copied))


def test_a_models_fingerprint_is_of_its_files_wherever_they_are(tmp_path):
    model, params = models.load_pretrained(TEACHER)
    for name in ("one", "other"):
        models.save_pretrained(tmp_path / name, model, params, max_shard_bytes=2**20)
    assert len(list((tmp_path / "one").glob("*.safetensors"))) > 1
    one = models.fingerprint(tmp_path / "one")
    assert one == models.fingerprint(tmp_path / "other") != models.fingerprint(TEACHER)
    flip(sorted((tmp_path / "other").glob("*.safetensors"))[-1])
    assert models.fingerprint(tmp_path / "other") != one
    (tmp_path / "other" / "notes.txt").write_text("of no model", encoding="utf-8")
    sorted((tmp_path / "other").glob("*.safetensors"))[-1].unlink()
    assert models.fingerprint(tmp_path / "other") == models.fingerprint(tmp_path / "none") == ""


def test_the_held_out_file_and_the_second_stream_belong_to_a_run(tmp_path, data_dir):
    for name in ("rows", "held_out", "text"):
        write_rows(tmp_path / f"{name}.jsonl", 20, word=name)
    config = of_rows("minillm", tmp_path, data_dir)
    config.data.options["validation_path"] = str(tmp_path / "held_out.jsonl")
    config.text.name, config.text.options = "text", {"path": str(tmp_path / "text.jsonl")}
    began(tmp_path / "run", config)
    write_rows(tmp_path / "held_out.jsonl", 19)
    refused(tmp_path / "run", config, f"data.options.validation_path={tmp_path / 'held_out.jsonl'}")
    write_rows(tmp_path / "text.jsonl", 19)
    refused(tmp_path / "run", config, "data.options.validation_path", f"text.options.path={tmp_path / 'text.jsonl'}")


def test_functions_of_ones_own_belong_to_a_run_by_their_source(tmp_path, data_dir, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("mine_divergence", "mine_schedule", "mine_optimizer"):
        (tmp_path / f"{name}.py").write_text(OWN, encoding="utf-8")
    config = smoke("forward_kl", data_dir)
    config.objective.terms.distil.divergence.name = "mine_divergence:gap"
    config.objective.terms.distil.coefficient = "mine_schedule:constant(value=1.0)"
    config.optimizer.name = "mine_optimizer:constant(value='kd_jax.divergences:forward_kl')"
    found = began(tmp_path / "run", config)
    assert {name for name in found if name.startswith("source")} == {
        "source of mine_divergence:gap", "source of mine_schedule:constant", "source of mine_optimizer:constant",
    }  # fmt: skip
    for name, key in (
        ("mine_divergence", "objective.terms.distil.divergence.name=mine_divergence:gap"),
        ("mine_schedule", "objective.terms.distil.coefficient=mine_schedule:constant(value=1.0)"),
        ("mine_optimizer", "optimizer.name=mine_optimizer"),
    ):
        (tmp_path / f"{name}.py").write_text(OWN.replace("** 2", "** 4"), encoding="utf-8")
        refused(tmp_path / "run", config, f"the source code of {key}")
        (tmp_path / f"{name}.py").write_text(OWN, encoding="utf-8")


def test_a_notebooks_function_belongs_to_a_run_by_its_own_source(tmp_path, data_dir, monkeypatch):
    config = smoke("forward_kl", data_dir)
    config.objective.terms.distil.divergence.name = "__main__:mine"

    def define(source):  # as a cell of a notebook does
        file = tmp_path / f"cell{len(list(tmp_path.iterdir()))}.py"
        file.write_text(source, encoding="utf-8")
        space = {"__name__": "__main__"}
        exec(compile(source, str(file), "exec"), space)
        monkeypatch.setattr(sys.modules["__main__"], "mine", space["mine"], raising=False)

    define("def mine(log_p, log_q):\n    return log_p.sum(-1)\n")
    began(tmp_path / "run", config)
    define("\n\nother = 1\ndef mine(log_p, log_q):\n    return log_p.sum(-1)\n")
    identity.check(str(tmp_path / "run"), Settings.read(config))
    define("def mine(log_p, log_q):\n    return log_q.sum(-1)\n")
    refused(tmp_path / "run", config, "divergence.name=__main__:mine")


@pytest.mark.slow
def test_a_teachers_cache_belongs_to_a_run(tmp_path, data_dir):
    config = smoke("forward_kl", data_dir, data__eval_rows=4)
    cache_teacher.write(config, str(tmp_path / "cache"), "samples", k=2, quiet=True)
    with config.unlocked():
        config.teacher.cache = str(tmp_path / "cache")
    found = began(tmp_path / "run", config)
    assert "teacher.cache" in found and "teacher" not in found
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text(encoding="utf-8"))
    manifest["teacher"]["path"] = "moved"
    (tmp_path / "cache" / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    identity.check(str(tmp_path / "run"), Settings.read(config))
    (tmp_path / "cache" / "manifest.json").write_text(json.dumps(manifest | {"k": 3}), encoding="utf-8")
    refused(tmp_path / "run", config, f"teacher.cache={tmp_path / 'cache'}")


def test_what_a_teacher_wrote_belongs_to_a_run(tmp_path, data_dir):
    config, run = smoke("seqkd", data_dir), Written()
    one = data.Rows(np.arange(4, dtype=np.int32), np.array([0, 4]), np.array([2]), np.array([2]))
    run.written = one
    began(tmp_path / "run", config, run)
    identity.check(str(tmp_path / "run"), Settings.read(config), run.written)
    run.written = data.Rows(one.tokens[::-1], one.offsets, one.first_counted, one.prompt_lengths)
    refused(tmp_path / "run", config, "the set of the teacher's responses", run=run)


@pytest.mark.slow
def test_a_directory_of_an_older_version_takes_the_contents_of_now(tmp_path, data_dir):
    write_rows(tmp_path / "rows.jsonl", 200)
    config = of_rows("sft", tmp_path, data_dir, **SHORT)
    train.train(config, str(tmp_path / "run"), quiet=True)
    (tmp_path / "run" / directory.IDENTITY).unlink()
    train.train(config, str(tmp_path / "run"), quiet=True)
    assert directory.read_identity(str(tmp_path / "run")).keys() == {"data", "tokenizer", "teacher"}


@pytest.mark.slow
def test_an_unfinished_run_of_an_older_version_is_refused(tmp_path, data_dir):
    """The older version truncated and encoded rows differently, so the remaining steps would see other rows."""
    write_rows(tmp_path / "rows.jsonl", 200)
    config = of_rows("sft", tmp_path, data_dir, **SHORT)
    train.train(config, str(tmp_path / "run"), quiet=True)
    (tmp_path / "run" / directory.IDENTITY).unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "3")
    with pytest.raises(
        ValueError, match=r"has step 2 of a run that has no identity\.json: an earlier version of kd_jax"
    ):
        train.train(config, str(tmp_path / "run"), quiet=True)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")
    train.train(config, str(tmp_path / "run"), quiet=True)


@pytest.mark.slow
def test_an_ablation_whose_rows_were_replaced_is_refused(tmp_path, data_dir, monkeypatch):
    """Otherwise the table would compare runs on different rows."""
    write_rows(tmp_path / "rows.jsonl", 200)
    config = of_rows("forward_kl", tmp_path, data_dir, **SHORT, eval_prompts=2)
    axes = {"temperature": ("objective.temperature", (1.0, 2.0))}
    ablation = ablations.ablation(config, axes, seeds=(0,), metrics=("forward_kl",))
    real = train.train

    def stopped(its, workdir, quiet):
        if its.objective.temperature == 2.0:
            raise KeyboardInterrupt
        return real(its, workdir, quiet)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ablate.train, "train", stopped)
        ablate.run(ablation, str(tmp_path / "ablation"))
    write_rows(tmp_path / "rows.jsonl", 37)
    with pytest.raises(ValueError, match=r"temperature=1.0,seed=0/run belongs to a run of other contents"):
        ablate.run(ablation, str(tmp_path / "ablation"))
    assert not (tmp_path / "ablation" / "temperature=2.0,seed=0" / "run").exists()
    write_rows(tmp_path / "rows.jsonl", 200)
    assert "Failed" not in ablate.run(ablation, str(tmp_path / "ablation"))


def test_the_options_of_a_dataset_are_the_same_wherever_a_config_has_them(tmp_path, data_dir):
    """Earlier versions stored the options of a setting's dataset in data.options and had no data.defaults."""
    now = smoke("forward_kl", data_dir).to_dict()
    older = copy.deepcopy(now)
    older["data"]["options"] = older["data"].pop("defaults")["docstrings"]
    assert older["data"]["options"]
    directory.write_config(str(tmp_path), older)
    assert directory.config_difference(str(tmp_path), now) == []
    now["data"]["options"] = {"packages": ("optax",)}
    (difference,) = directory.config_difference(str(tmp_path), now)
    assert difference.startswith("data.options.packages: ") and difference.endswith("['optax'] now")
    directory.write_config(str(tmp_path), {"base": older})  # the config of an ablation
    assert directory.config_difference(str(tmp_path), {"base": smoke("forward_kl", data_dir).to_dict()}) == []
