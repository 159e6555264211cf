"""Every declared key is read, every config is locked, and every setting exists in every method."""

import importlib
import re
from pathlib import Path

import pytest

from configs import base, settings
from tests.runs import METHODS

ROOT = Path(__file__).parent.parent


def test_every_declared_key_is_read_and_commented():
    source = "\n".join(path.read_text() for path in (ROOT / "kd_jax").rglob("*.py"))
    declared = (ROOT / "configs" / "base.py").read_text()
    for key in base.get_config().to_dict() | base.get_config().data.to_dict() | base.get_config().student.to_dict():
        assert re.search(rf"\.{key}\b", source), f"config key {key} is read nowhere"
    for line in re.findall(r"^    config\.\w+(?:\.\w+)? = .*$", declared, re.MULTILINE):
        if not line.endswith("ConfigDict()") or ".options" in line:
            assert "  # " in line, line
    for key in base.term().to_dict():
        assert f'spec["{key}"]' in source or f'"{key}"' in source, key


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
