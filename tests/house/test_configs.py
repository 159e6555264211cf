"""Every declared key is read, every config is locked, and every setting exists in every method."""

import collections
import dataclasses
import importlib
import inspect
import json
import re
import sys
from typing import ClassVar

import pytest

from configs import base, settings, table
from kd_jax import data, prefixes, sharding, train
from kd_jax.data.options import dataset_options
from kd_jax.run import hub_names
from kd_jax.run.build import make_objective
from kd_jax.settings import Settings, Teacher, Term, is_section, keys_of
from kd_jax.storage import hub, hub_upload
from tests.helpers.paths import ROOT
from tests.helpers.runs import METHODS, smoke


def declared(kind, prefix=""):
    """Yields the class, the name and the path of every declared key. Keywords of specs are not declared."""
    for name, _, default in keys_of(kind):
        if is_section(default):
            yield from declared(type(default), f"{prefix}{name}.")
        else:
            yield kind, name, f"{prefix}{name}"


class Recorded(collections.UserDict):
    """A term of the objective that records the keys that are read."""

    read: ClassVar[set[str]] = set()

    def __getitem__(self, key):
        self.read.add(key)
        return super().__getitem__(key)


@pytest.mark.slow
def test_every_declared_key_is_read(tmp_path, data_dir, monkeypatch):
    """A run with a teacher, and the assembly of runs with other sources, read every key of the settings."""
    mesh = dict(mesh__data=2, mesh__fsdp=2, mesh__tensor=2)
    whole = smoke("amid", data_dir, **mesh, push="hf://org/student")
    monkeypatch.setattr(hub_upload, "check", lambda address: None)
    monkeypatch.setattr(hub_upload, "upload", lambda *arguments: "https://huggingface.co/org/student")
    student = dict(student__init="pretrained", student__path=str(tmp_path / "run" / "student"))
    parts = [smoke("amid", data_dir, **mesh, **student), smoke("amid", data_dir, student__init="layers", **mesh)]
    parts[1].student.layers = (0, 3)
    parts.append(smoke("minillm", data_dir, **mesh))
    parts.append(smoke("alm", data_dir, **mesh))
    own_teacher = dict(teacher__path="student", teacher__follow=0.1, tokenizer__path="package:docstrings_teacher")
    parts.append(smoke("forward_kl", data_dir, **mesh, **own_teacher))
    found, parse = set(), Settings.parse

    def recorded(config):
        """Returns settings of classes that record the keys that are read after the settings are parsed."""
        settings = parse(config)
        if isinstance(config, Settings):
            return settings
        terms = {
            name: Recorded(term | {"policy": Recorded(term["policy"])})
            for name, term in settings.objective.terms.items()
        }
        return dataclasses.replace(settings, objective=dataclasses.replace(settings.objective, terms=terms))

    for kind in {kind for kind, *_ in declared(Settings)}:

        def getattribute(values, name, kind=kind):
            caller = sys._getframe(1).f_code.co_name
            if caller not in ("check_ranges", "replace", "_replace"):  # these functions read every key
                found.add((kind, name))
            return object.__getattribute__(values, name)

        monkeypatch.setattr(kind, "__getattribute__", getattribute)
    monkeypatch.setattr(Settings, "parse", recorded)
    train.train(whole, str(tmp_path / "run"), quiet=True)
    for config in parts:
        train.build(config)
    assert {path for kind, name, path in declared(Settings) if (kind, name) not in found} == set()
    assert {name for _, name, _ in declared(Term)} - Recorded.read == set()


def test_every_declared_key_has_a_meaning():
    for kind in (Settings, Term):
        for section, name, path in declared(kind):
            field = section.__dataclass_fields__[name]
            assert field.metadata["meaning"], path


def test_the_layouts_of_a_teacher_are_those_of_the_mesh():
    assert set(Teacher.__dataclass_fields__["sharding"].metadata["choices"]) == set(sharding.LAYOUTS)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("setting", [setting.__name__ for setting in settings.SETTINGS])
def test_every_method_has_every_setting(method, setting):
    config = importlib.import_module(f"configs.{method}").get_config(setting)
    with pytest.raises(AttributeError, match="Did you mean"):
        config.data.batchsize = 3
    config.steps = 12345
    flat = str(config.to_dict())
    assert flat.count("12345") >= 2, "the learning rate follows the number of steps"


@pytest.mark.parametrize("setting", [setting.__name__ for setting in settings.SETTINGS])
def test_a_setting_passes_the_checks_that_need_no_models(setting, monkeypatch, tmp_path):
    """Checks the keys, the objective, the addresses and the options of the dataset of each setting, and its docstring.

    A local file with one conversation stands for the data on the hub.
    """
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns}))
    monkeypatch.setattr(hub, "data", lambda address: tmp_path / "rows.jsonl")
    config = importlib.import_module("configs.distillm2").get_config(setting)
    parsed = Settings.parse(config)
    make_objective(parsed)
    addresses = hub_names.addresses(parsed)
    for address, key in addresses.items():
        kind = "dataset" if key.startswith("data.") else "model"
        assert hub.parse(address, kind).id.count("/") == 1
    data.columns(parsed.data.name, **dataset_options(parsed))
    text = f"{parsed.data.max_length} tokens"
    assert parsed.data.max_prompt_length + parsed.sampling.max_new_tokens <= parsed.data.max_length + 1, text
    doc = inspect.getdoc(getattr(settings, setting))
    assert not addresses or " not run at full size" in " ".join(doc.split()), setting
    assert f"| `{setting}`" in CONFIGS.read_text(), "the settings are listed in configs/README.md"


def test_an_unknown_setting_is_told_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'dolly_smollm2'"):
        settings.get("dolly_smolm2")


def test_a_term_has_no_other_keys():
    with pytest.raises(KeyError, match="divergenc"):
        base.term(divergenc={"name": "forward_kl"})


CONFIGS, LIBRARY, DATA = (ROOT / name / "README.md" for name in ("configs", "kd_jax", "kd_jax/data"))


def test_the_tables_of_methods_and_keys_are_current():
    for made in (table.methods(), table.keys()):
        assert made in CONFIGS.read_text(), "python -m configs.table prints the tables of configs/README.md"
    assert set(table.METHODS) == set(METHODS)


def test_the_table_of_datasets_is_current():
    assert table.datasets() in DATA.read_text(), "python -m configs.table prints the table of kd_jax/data/README.md"


def test_every_source_is_listed():
    for name in prefixes.__all__:
        assert f"| `{name}` |" in CONFIGS.read_text()


def test_the_rows_of_divergences_and_assistants_are_current():
    """A new divergence of the library need not have a row yet."""
    rows = re.findall(r"^\| `\w+` \| .*$", LIBRARY.read_text().partition("## The functions")[2], re.MULTILINE)
    assert len(rows) >= 13 and set(rows) <= set(table.functions().splitlines()), "python -m configs.table prints them"


def test_what_follows_another_key_does_not_change_it():
    config = smoke("minillm", "")
    config.update(text=dict(name="text", split="validation"), learning_rate=dict(decay_steps=7))
    assert (config.data.name, config.data.train_split, config.steps) == ("docstrings", "train", 2)
    assert smoke("minillm", "", data__name="dolly").text.name == "dolly"
