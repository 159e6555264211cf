"""Every declared key is read, every config is locked, and every setting exists in every method."""

import importlib
import inspect
import re
import sys

import pytest
from ml_collections import ConfigDict

from configs import base, settings, table
from kd_jax import assistants, divergences, prefixes, train
from tests.helpers.paths import ROOT
from tests.helpers.runs import METHODS, smoke


def paths(node, prefix=""):
    """(path, node's id, key) of every declared key; what specs and keywords hold is not declared."""
    for key in node:
        name = (
            f"{prefix}{key}" if prefix != "objective.terms." else f"{prefix}*"
        )  # one term may read what another does not
        yield name, id(node), key
        if isinstance(node[key], ConfigDict) and key not in base.OPEN:
            yield from paths(node[key], f"{name}.")


def test_every_declared_key_is_read(tmp_path, data_dir, monkeypatch):
    mesh = dict(mesh__data=2, mesh__fsdp=2, mesh__tensor=2)
    whole = smoke("amid", data_dir, **mesh)
    student = dict(student__init="pretrained", student__path=str(tmp_path / "run" / "student"))
    parts = [smoke("amid", data_dir, **mesh, **student), smoke("amid", data_dir, student__init="layers", **mesh)]
    parts[1].student.layers = (0, 3)
    parts.append(smoke("minillm", data_dir, **mesh))
    declared = {(node, key): path for config in (whole, *parts) for path, node, key in paths(config)}
    read = set()
    get = ConfigDict.__getitem__

    def getitem(node, key):
        frame, inside = sys._getframe(1), set()
        while "ml_collections" in frame.f_code.co_filename:
            inside.add(frame.f_code.co_name)
            frame = frame.f_back
        if "to_dict" not in inside and frame.f_code.co_name not in ("paths", "check_types"):  # which read every key
            read.add((id(node), key))
        return get(node, key)

    monkeypatch.setattr(ConfigDict, "__getitem__", getitem)
    train.train(whole, str(tmp_path / "run"), quiet=True)
    for config in parts:
        train.build(config)
    seen = {path for key, path in declared.items() if key in read}
    assert set(declared.values()) - seen == set()


def test_every_declared_key_is_commented():
    for line in re.findall(
        r"^    config\.\w+(?:\.\w+)? = .*$", (ROOT / "configs" / "base.py").read_text(), re.MULTILINE
    ):
        if not line.endswith("ConfigDict()") or ".options" in line:
            assert "  # " in line, line


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("setting", ["docstrings", "smoke", "dolly_smollm2", "dolly_gpt2"])
def test_every_method_has_every_setting(method, setting):
    config = importlib.import_module(f"configs.{method}").get_config(setting)
    with pytest.raises(AttributeError, match="Did you mean"):
        config.data.batchsize = 3
    config.steps = 12345
    flat = str(config.to_dict())
    assert flat.count("12345") >= 2, "the learning rate follows the number of steps"


def test_an_unknown_setting_is_told_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'dolly_smollm2'"):
        settings.get("dolly_smolm2")


def test_a_term_has_no_other_keys():
    with pytest.raises(KeyError, match="divergenc"):
        base.term(divergenc={"name": "forward_kl"})


def test_the_readmes_table_of_the_methods_is_current():
    assert table.methods() in (ROOT / "README.md").read_text(), (
        "python -c 'from configs import table; print(table.methods())'"
    )
    assert set(table.METHODS) == set(METHODS)


def test_the_readme_lists_every_source():
    for name in prefixes.__all__:
        assert f"| `{name}` |" in (ROOT / "README.md").read_text()


def test_the_readme_lists_every_divergence_and_assistant():
    text = (ROOT / "README.md").read_text().partition("## Divergences and assistants")[2]
    listed = re.findall(r"^\| `(\w+)` \| ((?:`\w+`(?:, )?)*) ?\|", text, re.MULTILINE)
    for module in (divergences, assistants):
        for name in module.__all__:
            parameters = inspect.signature(getattr(module, name)).parameters.values()
            keywords = [f"`{p.name}`" for p in parameters if p.kind == p.KEYWORD_ONLY]
            assert (name, ", ".join(keywords)) in listed
    assert len(listed) == len(divergences.__all__) + len(assistants.__all__)


def test_what_follows_another_key_does_not_change_it():
    config = smoke("minillm", "")
    config.update(text=dict(name="text", split="validation"), learning_rate=dict(decay_steps=7))
    assert (config.data.name, config.data.train_split, config.steps) == ("docstrings", "train", 2)
    assert smoke("minillm", "", data__name="dolly").text.name == "dolly"
