"""The text of --help: usage, methods, settings and keys, read from the files that declare them.

This module does not import JAX, so the help appears before the imports of the command, which take seconds.
"""

import ast
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

from kd_jax.settings import Settings, Term, is_section, keys_of

CONFIGS = Path(__file__).parent.parent / "configs"
ASKED = {"-h", "-help", "--help", "-helpshort", "--helpshort", "-helpfull", "--helpfull"}
NO_METHODS = ("__init__", "base", "settings", "table")
NO_SETTINGS = ("get", "own_teacher")  # the other functions of configs/settings.py
WIDTH = 110
KEYS_ELSEWHERE = "The keys of a config, with their defaults and meanings: python -m kd_jax.main --help"
EXAMPLES = {
    "main": (
        "--config=configs/quickstart.py --workdir=runs/quickstart",
        "--config=configs/gkd.py:smoke --workdir=runs/mine --config.steps=1e3 --config.data.batch_size=16",
        "--config=configs/forward_kl.py --workdir=runs/yours --config.data.name=jsonl --config.data.options.path=FILE.jsonl",
    ),
    "ablate": (
        "--config=configs/ablations/divergences.py --workdir=runs/divergences",
        '--config=configs/ablations/schedules.py:smoke --workdir=runs/schedules --config.seeds="(0,)" --config.base.steps=10',
        "--config=configs/ablations/divergences.py --workdir=runs/divergences --table",
    ),
    "cache_teacher": (
        "--config=configs/forward_kl.py --out=runs/teacher",
        "--config=configs/reverse_kl.py --out=runs/top --kind=top_k --k=64",
        "--config=configs/forward_kl.py:smoke --out=runs/drawn --kind=samples --k=50",
    ),
    "evaluate": (
        "--model=runs/mine --out=runs/mine/evaluation",
        "--model=runs/mine/student --teacher=package:docstrings_teacher --out=runs/compared --seeds=10 --rows=100",
        "--model=MODEL --data=gsm8k --template=chat --numbers --temperature=0 --seeds=0 --out=runs/gsm8k",
    ),
    "report": (
        "runs/mine",
        "runs/mine runs/yours --out=runs/both.html",
        "runs/divergences",
    ),
    "replay": (
        "--workdir=runs/mine",
        "--workdir=runs/mine --step=120",
        "--workdir=gs://BUCKET/runs/mine",
    ),
}
CONFIGURED = ("main", "ablate", "cache_teacher")  # the commands that take a config


def answer(command: str, argv: list[str]) -> None:
    """Prints the help of a command and exits, if the arguments ask for help.

    Without any arguments, the process exits with a message about the missing flags.

    Args:
      command: the command: main, ablate or cache_teacher.
      argv: the command line, with the name of the program first.
    """
    if ASKED & set(argv[1:]):
        print(text(command))
        sys.exit(0)
    if len(argv) == 1:
        sys.exit(f"kd_jax: {missing(command)}")


def missing(command: str) -> str:
    """Returns the message for a command line that lacks the flags that a command needs."""
    folder = "out" if command == "cache_teacher" else "workdir"
    command = command if command in CONFIGURED else "main"
    return (
        f"--config and --{folder} are needed: the config file, and the folder of the results. For example: python -m "
        f"kd_jax.{command} {EXAMPLES[command][0]}. --help lists the methods, the settings and all keys."
    )


def text(command: str) -> str:
    """Returns the help of a command."""
    path = Path(__file__).parent / f"{command}.py"
    usage, _, about = (_docstring(path) or "").partition("\n")
    flags = (
        dict(own_flags(path))
        if command == "main"
        else dict(own_flags(path.with_name("main.py"))) | dict(own_flags(path))
    )
    if command == "cache_teacher":
        flags = {("out" if name == "workdir" else name): meaning for name, meaning in flags.items()}
        flags["out"] = "The folder of the cache, which is created if it does not exist."
    parts = [f"usage: {usage.strip()}", about.strip(), _section("Flags", flags, "--")]
    if command == "ablate":
        parts.append(_section("Ablations: --config=configs/ablations/NAME.py", first_sentences(CONFIGS / "ablations")))
        parts.append(
            "--config.base.KEY=VALUE changes a key of every run. --config.seeds and --config.metrics change the seeds and "
            "the metrics of the table."
        )
    else:
        parts.append(_section("Methods: --config=configs/NAME.py", first_sentences(CONFIGS)))
        parts.append(_section("Settings: --config=configs/METHOD.py:NAME", dict(settings())))
    if command == "main":
        parts += [_section(title, entries, "--config.") for title, entries in keys()]
    else:
        parts.append(KEYS_ELSEWHERE)
    return "\n\n".join(part for part in [*parts, _examples(command)] if part)


def of_flags(command: str, about: str, meanings: dict[str, str]) -> str:
    """Returns the help of a command without a config.

    Args:
      command: the command: evaluate, report or replay.
      about: the usage, and the purpose of the command.
      meanings: the help texts of the flags, by name.
    """
    return "\n\n".join([about, _section("Flags", meanings, "--"), _examples(command)])


def _examples(command: str) -> str:
    return "\n".join(["Examples", *(f"  python -m kd_jax.{command} {example}" for example in EXAMPLES[command])])


def first_sentences(folder: Path) -> dict[str, str]:
    """Returns the first sentence of the docstring of each config file in a folder, by the name of the file."""
    files = sorted(path for path in folder.glob("*.py") if path.stem not in NO_METHODS)
    return {path.stem: first_sentence(_docstring(path) or "") for path in files}


def settings() -> Iterator[tuple[str, str]]:
    """Yields the settings with the first sentences of their docstrings."""
    for node in ast.parse((CONFIGS / "settings.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name not in NO_SETTINGS and not node.name.startswith("_"):
            yield node.name, first_sentence(ast.get_docstring(node) or "")


def keys() -> Iterator[tuple[str, dict[str, str]]]:
    """Yields the declared keys by section, each with its default and its meaning."""
    yield "Keys of a config, with their defaults", dict(_declared(Settings, ""))
    terms = dict(_declared(Term, "objective.terms.NAME."))
    policy = {name: meaning for name, meaning in terms.items() if ".policy." in name}
    yield "Keys of each term", {name: meaning for name, meaning in terms.items() if ".policy" not in name}
    yield "Keys of a term's policy gradient", policy


def _declared(section: type, prefix: str) -> Iterator[tuple[str, str]]:
    """Yields the keys of a section of the settings, each with its meaning and its default."""
    for name, field, default in keys_of(section):
        meaning = field.metadata["meaning"]
        if is_section(default):
            if meaning:
                yield f"{prefix}{name}", meaning
            yield from _declared(type(default), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _with_default(default, meaning)


def own_flags(path: Path) -> Iterator[tuple[str, str]]:
    """Yields the flags that a module defines with absl, with their defaults and help texts."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr.startswith("DEFINE"):
            constants = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
            if len(constants) > 2:
                name, default, meaning = constants[0], constants[1], constants[-1]
                yield str(name), _with_default(default, str(meaning)) if default not in (None, "") else str(meaning)


def first_sentence(docstring: str) -> str:
    """Returns the first sentence of a docstring, on one line."""
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    return re.split(r"(?<=[.!?])\s+(?=[A-Z])", paragraph, maxsplit=1)[0]


def _docstring(path: Path) -> str | None:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def _with_default(value: object, meaning: str) -> str:
    """Returns a meaning followed by the default value. A spec has the form in which a flag can give the spec."""
    if isinstance(value, dict) and "name" in value:
        others = ", ".join(f"{key}={value[key]!r}" for key in sorted(value) if key != "name")
        return f"{meaning} [{value['name']}({others})]"
    return f"{meaning} [{value!r}]"


def _section(title: str, entries: dict[str, str], before: str = "") -> str:
    lines = [title]
    for name, meaning in entries.items():
        lines.append(f"  {before}{name}")
        lines += textwrap.wrap(
            meaning, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6, break_long_words=False
        )
    return "\n".join(lines)
