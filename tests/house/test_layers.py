"""Imports point strictly down, and libraries stay where they belong."""

import ast

import pytest

from tests.helpers.paths import ROOT

LAYERS = [
    {"ablate", "replay", "cache_teacher", "main"},
    {"train"},
    {"run"},
    {"train_step", "evaluate"},
    {"prefixes", "teachers", "views", "report"},
    {"models", "data", "objectives", "metrics", "command"},
    {
        "divergences",
        "spans",
        "span_divergences",
        "assistants",
        "supports",
        "logit_transforms",
        "temperatures",
        "token_weights",
        "schedules",
        "policy_gradient",
        "head_loss",
        "optimizer",
        "storage",
        "command_help",
    },
    {"logspace", "settings", "resolve", "sharding"},
]
MATHEMATICAL = {
    "objectives", "policy_gradient", "head_loss", "divergences", "assistants", "supports", "logit_transforms",
    "temperatures", "token_weights", "schedules", "logspace", "spans", "span_divergences",
}  # fmt: skip
HOMES = {
    "flax": {"models", "train_step"},
    "qwix": {"models"},
    "grain": {"data"},
    "tensorflow_datasets": {"data"},
    "orbax": {"storage"},
    "huggingface_hub": {"storage", "run"},
    "wandb": set(),  # optional, and therefore imported by name in metrics
    "absl": {"main", "ablate", "cache_teacher", "evaluate", "report", "replay", "command", "settings"},
    "ml_collections": {"main", "train", "ablate", "replay", "settings"},
    "configs": set(),
}
FILES = sorted((ROOT / "kd_jax").rglob("*.py"))


def unit(path):
    return path.relative_to(ROOT / "kd_jax").parts[0].removesuffix(".py")


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    here = unit(path)
    if here == "__init__":
        return
    level = next(i for i, layer in enumerate(LAYERS) if here in layer)
    for name in imported(path):
        top, *rest = name.split(".")
        if top == "kd_jax" and rest and rest[0] != here:
            below = set().union(*LAYERS[level + 1 :])
            below |= {"main"} if level == 0 else set()  # commands share the flags of main
            assert rest[0] in below, f"{path} imports {name}"
            assert not (here in {"models", "data"} and rest[0] in MATHEMATICAL), f"{path} imports {name}"
        assert here in HOMES.get(top, {here}), f"{path} imports {top}"
        assert top not in ("tensorflow", "torch", "transformers", "lm_eval"), f"{path} imports {top}"


def test_configs_import_only_ml_collections_each_other_and_the_declared_keys():
    """The file table.py is not a config. It prints tables for the READMEs."""
    for path in (ROOT / "configs").glob("*.py"):
        names = {name for name in imported(path) if not name.startswith("kd_jax.settings")}
        allowed = {"ml_collections", "configs", "typing", "difflib", "importlib"}
        assert path.stem == "table" or {name.split(".")[0] for name in names} <= allowed, path


def test_no_file_is_long():
    for path in FILES:
        assert len(path.read_text().splitlines()) <= 360, path


def test_every_text_file_is_opened_with_its_encoding():
    """The default encoding depends on the locale."""
    for path in [*FILES, *(ROOT / "configs").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
                continue
            of = getattr(getattr(node.func, "value", None), "id", "")  # the module or class of the function
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            modes = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
            if name in ("read_text", "write_text") and of not in ("untrusted", "storage", ""):
                raise AssertionError(f"{path}:{node.lineno}: {name} without an encoding")
            if name == "open" and of not in ("gzip", "Cache", "fsspec") and modes and "b" not in str(modes[0]):
                raise AssertionError(f"{path}:{node.lineno}: open without an encoding")


def test_every_command_prepares_the_terminal():
    mains = ("main", "ablate", "cache_teacher", "replay", "evaluate/__main__", "report/__main__")
    for name in mains:
        text = (ROOT / "kd_jax" / f"{name}.py").read_text(encoding="utf-8")
        assert "    command.start()\n" in text, name
