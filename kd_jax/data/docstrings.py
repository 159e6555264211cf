"""Functions and their docstrings, from the Python packages of this machine. Nothing is downloaded."""

import ast
import importlib.metadata
import importlib.util
import inspect
import platform
import re
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from kd_jax.data import jsonl
from kd_jax.storage.checksum import digest

SKIPPED = {"site-packages", "test", "tests", "testing", "idlelib", "lib2to3", "__pycache__", "_vendor", "conftest"}
SPLITS = ("train", "validation", "test")
SHARES = {"test": 0.03, "validation": 0.03}  # shares of the modules; the other modules are for training
PACKAGES = ("numpy", "scipy", "jax", "matplotlib")
MAX_CHARACTERS = 6000
MAX_HINT = 400  # characters
COLUMNS = ("hint",)


def source(
    packages: tuple[str, ...] = PACKAGES, standard_library: bool = True
) -> tuple[str, dict[str, Callable[[], Iterable[dict[str, str]]]]]:
    """Returns the fingerprint and the splits of the docstrings dataset.

    The prompt is the source of a function without its docstring. The response is the first paragraph of the docstring.
    The column `hint` is the rest of the docstring, cut at about 400 characters, and is empty if there is no rest.
    The files are parsed and never imported.

    A hash of a module's name assigns the whole module to one split: about 94 % to train, 3 % to validation and 3 % to
    test. If there are few modules, each split still has at least one.

    A function is dropped if an earlier function has the same body, or the same name and docstring. The held-out splits
    are processed first, so that no held-out function has a duplicate in the training split.

    Args:
      packages: the installed packages that are read in addition to the standard library.
      standard_library: True to read the standard library.

    Raises:
      ValueError: a package is not installed.
    """
    roots = [(Path(sysconfig.get_path("stdlib")), "")] if standard_library else []
    versions = [f"python {sys.version_info.major}.{sys.version_info.minor}"] if standard_library else []
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(
                f"the docstrings dataset reads the package {package!r}, which is not installed: pip install {package}."
            )
        roots.append((Path(spec.submodule_search_locations[0]), package))
        versions.append(f"{package} {_version(package)}")
    fingerprint = digest(";".join([*versions, "at least one", "with hint"]))[:12]
    cache: dict[str, list[dict[str, str]]] = {}

    def rows(split: str) -> Iterable[dict[str, str]]:
        if not cache:
            cache.update(_split(roots))
        return cache[split]

    return fingerprint, {split: lambda split=split: rows(split) for split in SPLITS}


def _split(roots: list[tuple[Path, str]]) -> dict[str, list[dict[str, str]]]:
    """Returns all rows by split, without duplicates."""
    modules: dict[str, list[dict[str, str]]] = {}
    for root, package in roots:
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            if SKIPPED & set(parts) or any(part.startswith("test_") for part in parts):
                continue
            module = ".".join((package, *parts) if package else parts).removesuffix(".__init__")
            if rows := list(_functions(path, module)):
                modules[module] = modules.get(module, []) + rows
    ranges = jsonl.divide(map(_fraction, modules), SHARES)
    all_rows: dict[str, list[dict[str, str]]] = {split: [] for split in SPLITS}
    for module, rows in modules.items():
        all_rows[_in_range(ranges, module)].extend(rows)
    seen: set[str] = set()
    unique_rows: dict[str, list[dict[str, str]]] = {}
    for split in ("test", "validation", "train"):
        unique_rows[split] = []
        for row in all_rows[split]:
            body = _normal(re.sub(r"^.*?def \w+", "def f", row["prompt"], count=1, flags=re.DOTALL))
            name_and_docstring = row["name"].rsplit(".", 1)[-1] + " " + _normal(row["response"])
            if body not in seen and name_and_docstring not in seen:
                unique_rows[split].append(row)
            seen |= {body, name_and_docstring}
    return unique_rows


def split_of(module: str) -> str:
    """Returns the split of a module by a hash of the module's name, as in a dataset of many modules."""
    return _in_range({"test": (0.0, 0.03), "validation": (0.03, 0.06), "train": (0.06, 1.0)}, module)


def _in_range(ranges: dict[str, tuple[float, float]], module: str) -> str:
    return next(split for split, (low, high) in ranges.items() if low <= _fraction(module) < high)


def _fraction(module: str) -> float:
    """Returns a number in [0, 1) that depends only on a hash of the module's name.

    The remainder of the hash modulo 100 comes first. The hash itself orders modules that have the same remainder.
    """
    number = int(digest(module), 16)
    return (number % 100 + number / 2**256 * 0.999) / 100


def _functions(path: Path, module: str) -> Iterator[dict[str, str]]:
    """Yields a row for each function of a file that has a suitable docstring."""
    try:
        text = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():  # invalid escape sequences in the files give warnings
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return  # not valid Python, such as a template or a file for another version
    lines = text.splitlines()
    for node, name in _walk(tree, module):
        docstring = ast.get_docstring(node, clean=False)
        if not docstring or len(node.body) < 2:
            continue
        paragraph, *others = (" ".join(part.split()) for part in inspect.cleandoc(docstring).split("\n\n"))
        prompt = _without_docstring(lines, node)
        if (
            len(paragraph.split()) >= 3
            and paragraph.isascii()
            and paragraph[0].isalnum()
            and len(prompt) <= MAX_CHARACTERS
        ):
            hint = _cut("\n\n".join(filter(None, others)), MAX_HINT)
            yield {"name": name, "prompt": prompt, "context": "", "response": paragraph, "hint": hint}


def _cut(text: str, length: int) -> str:
    """Returns the words of a text that end within `length` characters. Half surrogate pairs become question marks.

    Example:
      >>> _cut("one two three", 8), _cut("one two three", 7), _cut("one two", 6), _cut("one", 2)
      ('one two', 'one two', 'one', 'on')
    """
    if len(text) > length:
        text = re.split(r"\s+\S*$", text[: length + 1], maxsplit=1)[0][:length]
    return text.encode("utf-8", "replace").decode()


def _walk(node: ast.AST, prefix: str) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child, f"{prefix}.{child.name}"
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from _walk(child, f"{prefix}.{child.name}")
        elif isinstance(child, ast.If | ast.Try | ast.With):
            yield from _walk(child, prefix)


def _without_docstring(lines: list[str], node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """Returns a function's source, decorators included, without docstring, blank lines and common indentation."""
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    docstring = node.body[0]
    code = lines[first - 1 : docstring.lineno - 1] + lines[docstring.end_lineno : node.end_lineno]
    indent = len(code[0]) - len(code[0].lstrip())
    return "\n".join(line[indent:] if not line[:indent].strip() else line for line in code if line.strip())


def _normal(text: str) -> str:
    return re.sub(r"\W+", " ", text).strip().lower()


def _version(package: str) -> str:
    if package in sys.stdlib_module_names:
        return platform.python_version()
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        pass
    # A distribution of another name has the package. This search reads the files of all distributions, for a second.
    for name in importlib.metadata.packages_distributions().get(package, ()):
        return importlib.metadata.version(name)
    raise ValueError(
        f"the docstrings dataset must know the version of {package!r}, so that a new version is built again, and no "
        f"installed distribution has this package: install it with pip, or remove it from data.options.packages."
    )
