"""The READMEs: every link and path exists, every command names files that exist, and the library example runs."""

import doctest
import importlib.util
import re
import shlex

import pytest
from ml_collections import ConfigDict

from tests.helpers.paths import ROOT

OUTSIDE = ("models", "runs")  # top-level folders for downloaded models and for results


def is_ours(path):
    parts = path.relative_to(ROOT).parts
    return parts[0] not in OUTSIDE and not any(part.startswith(".") for part in parts)


READMES = [path for path in sorted(ROOT.rglob("README.md")) if is_ours(path)]
IDS = [str(path.relative_to(ROOT)) for path in READMES]
FOLDERS = "(?:kd_jax|configs|experiments|notebooks|tests)/"
COMMANDS = ("main", "ablate", "replay", "cache_teacher", "evaluate", "report")


def commands(text):
    """Returns the commands of the package in a README, each as a name and arguments."""
    joined = re.sub(r"\\\n\s*", "", text)
    for name, rest in re.findall(r"python -m kd_jax\.(\w+)([^\n`]*)", joined):
        assert name in COMMANDS, name
        if not re.search("METHOD|NAME|CONFIG", rest):  # placeholders for any config
            yield name, shlex.split(rest)


def flags_of(name):
    """Returns the names of a command's flags, from its sources and, if it takes a config, from kd_jax.main."""
    sources = list((ROOT / "kd_jax" / name).glob("*.py")) or [ROOT / f"kd_jax/{name}.py", ROOT / "kd_jax/main.py"]
    text = "".join(path.read_text(encoding="utf-8") for path in sources)
    definitions = r"(?:DEFINE\w*|_text|_count|_json|_number)\((?:\w+\(\),)?\s*\"(\w+)\""
    return {"help"} | set(re.findall(definitions, text))


def config_of(path):
    """Returns the config that a flag names as FILE or FILE:SETTING."""
    file, _, setting = path.partition(":")
    spec = importlib.util.spec_from_file_location("config", ROOT / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*[setting] if setting else [])


def assert_is_a_key(config, key):
    """Checks that a dotted key is in a config. The keywords of a spec, and the options of a dataset, may be new."""
    section = ""
    for part in key.split("."):
        if not isinstance(config, ConfigDict) or section == "options":
            return
        is_spec = "name" in config and section != "data"
        assert part in config or is_spec, f"--config.{key}"
        section, config = part, config.get(part)


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


@pytest.mark.parametrize("path", READMES, ids=IDS)
def test_the_flags_and_keys_of_commands_exist(path):
    for name, arguments in commands(path.read_text(encoding="utf-8")):
        known = flags_of(name)
        given = dict(
            argument.removeprefix("--").split("=", 1) for argument in arguments if re.match(r"--[\w.]+=", argument)
        )
        config = config_of(given["config"]) if "config" in given else None
        for flag in given:
            if flag.startswith("config."):
                assert_is_a_key(config, flag.removeprefix("config."))
            else:
                assert flag in known, f"kd_jax.{name} has no flag --{flag}; it has {', '.join(sorted(known))}"


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150 and len(READMES) > 20
    assert [line for line in lines if len(line) > 120] == []


def test_the_library_example_runs():
    assert doctest.testfile(str(ROOT / "README.md"), module_relative=False).failed == 0
