"""The READMEs: every link and path exists, every command names files that exist, and the library example runs."""

import doctest
import re

import pytest

from tests.helpers.paths import ROOT

OUTSIDE = ("models", "runs")  # folders at the top for downloaded models and for results


def is_ours(path):
    parts = path.relative_to(ROOT).parts
    return parts[0] not in OUTSIDE and not any(part.startswith(".") for part in parts)


READMES = [path for path in sorted(ROOT.rglob("README.md")) if is_ours(path)]
IDS = [str(path.relative_to(ROOT)) for path in READMES]
FOLDERS = "(?:kd_jax|configs|experiments|notebooks|tests)/"


@pytest.mark.parametrize("path", READMES, ids=IDS)
def test_links_and_paths_exist(path):
    text = path.read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?://|#)([^)#\s]+)", text):
        assert (path.parent / link).exists(), link
    for named in re.findall(rf"`({FOLDERS}[\w/.]+)(?:::\w+)?`", text):
        assert (ROOT / named).exists(), named


@pytest.mark.parametrize("path", READMES, ids=IDS)
def test_commands_name_modules_and_configs_that_exist(path):
    text = path.read_text(encoding="utf-8")
    for module in re.findall(r"python -m ((?:kd_jax|configs|tests|experiments)[\w.]*)", text):
        file = ROOT / module.replace(".", "/").rstrip("/")
        assert file.with_suffix(".py").exists() or (file / "__main__.py").exists(), module
    for config in re.findall(r"--config=(configs/[\w/]+\.py)", text):
        assert (ROOT / config).exists() or re.search("METHOD|NAME", config), config
    for command in re.findall(r"\bbash (\S+\.sh)", text):
        assert (ROOT / command).exists(), command


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150 and len(READMES) > 20
    assert [line for line in lines if len(line) > 120] == []


def test_the_library_example_runs():
    assert doctest.testfile(str(ROOT / "README.md"), module_relative=False).failed == 0
