"""Fingerprints of the contents that belong to a run: data, models, tokenizer, cache, and the user's functions."""

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import jax

from kd_jax import data, models, sharding
from kd_jax.data.options import dataset_options
from kd_jax.models import peft
from kd_jax.run import hub_names
from kd_jax.run.cache import unpacked
from kd_jax.run.models import STUDENT, load_tokenizer
from kd_jax.run.view_prompts import options_of_rows
from kd_jax.settings import Settings
from kd_jax.storage import checkpoint, directory, remote, untrusted
from kd_jax.storage.checksum import digest, file_digest
from kd_jax.storage.files import Json
from kd_jax.teachers.cache_files import MANIFEST, describe_rows

# Matches module:function, also inside the keywords of a call.
OWN = re.compile(r"(?<![\w.:])([A-Za-z_][\w.]*):([A-Za-z_]\w*)")
Written = data.Rows | data.Packed | None
TERM_SPECS = (
    "divergence", "assistant", "weight", "coefficient", "vocabulary", "logits", "temperature", "teacher_temperature",
    "tokens", "row_gate", "spans",
)  # fmt: skip
FUNCTIONS_OF_VIEWS = ("name", "reward", "feedback")  # the keys of a view that name functions


class Part(NamedTuple):
    """One of the contents that belong to a run.

    Attributes:
      named: the key and the value of the config that name the content.
      fingerprint: the fingerprint of the content alone; "" if the content does not exist.
    """

    named: str
    fingerprint: str


def check(workdir: str, config: Settings, written: Written = None) -> None:
    """Checks that the contents have not changed since the run of a work directory began.

    Repositories on the Hugging Face hub are read at the commits that the run has recorded, also if a branch has moved.
    All processes must call this function. Only the first process compares, so that each file is read once. All
    processes raise the same error.

    Args:
      workdir: the work directory of the run, which need not exist.
      config: the config of the run.
      written: the rows that a teacher wrote, as in `parts`.

    Raises:
      ValueError: some contents differ or cannot be read; the message names each of them.
    """
    hub_names.settle(config, workdir)
    problem = ""
    if jax.process_index() == 0:
        try:
            problem = _difference(workdir, config, written)
        except (ValueError, OSError) as error:
            problem = str(error)
    if problem := sharding.text_from_first_process(problem):
        raise ValueError(problem)


def write(workdir: str, config: Settings, written: Written) -> None:
    """Writes the fingerprints into the work directory, without changing fingerprints that are already there.

    A directory of an older version without checkpoints gets the fingerprints of the current contents.
    """
    recorded = directory.read_identity(workdir)
    current = {name: part.fingerprint for name, part in parts(config, written).items() if part.fingerprint}
    current |= {f"{directory.COMMIT}{name}": commit for name, commit in hub_names.commits(config).items()}
    if current.keys() - recorded.keys():
        directory.write_identity(workdir, current | recorded)


def _difference(workdir: str, config: Settings, written: Written) -> str:
    """Returns the error message for contents that have changed; "" if no content has changed."""
    if not (recorded := directory.read_identity(workdir)):
        return _of_older_version(workdir, config)
    lines = [
        f"{part.named} has other content than when the run began"
        for name, part in parts(config, written).items()
        # The student's weights may be missing because a resumed run does not read them. `build` reports all other
        # missing contents.
        if part.fingerprint and part.fingerprint != recorded.get(name, part.fingerprint)
    ]
    if not lines:
        return ""
    listed = "\n  ".join(lines)
    return (
        f"the work directory {workdir} belongs to a run of other contents. Restore the old contents, or choose another "
        f"--workdir:\n  {listed}"
    )


def _of_older_version(workdir: str, config: Settings) -> str:
    """Returns the error message for an unfinished run without fingerprints; "" if no step is saved or all steps are made."""
    step = checkpoint.last_step(workdir)
    if step is None or step >= config.steps:
        return ""
    return (
        f"the work directory {workdir} has step {step} of a run that has no {directory.IDENTITY}: an earlier version of kd_jax "
        f"began the run. The earlier version truncated and encoded prompts and responses in another way, so the resumed run "
        f"would train on other rows. Finish the run with the earlier version, or start it again in another --workdir."
    )


def parts(config: Settings, written: Written = None) -> dict[str, Part]:
    """Returns all contents that a config names, under names without a path.

    Args:
      config: the config of a run.
      written: the rows that the teacher of a built run wrote; None before the run is built, or without such rows.

    Raises:
      ValueError: a dataset or a tokenizer cannot be read.
    """
    text = config.text
    contents = {"data": _data("data", config.data.name, config.data.train_split, options_of_rows(config))}
    if text.name and (text.options or text.name != config.data.name):
        contents["text"] = _data("text", text.name, text.split, dataset_options(config, "text"))
    if config.teacher.cache:
        contents["teacher.cache"] = Part(f"teacher.cache={config.teacher.cache}", _cache(config.teacher.cache))
    elif config.teacher.path not in ("", STUDENT):
        contents["teacher"] = _model("teacher.path", config.teacher.path)
    for name, member in config.members.items():
        if member.cache:
            contents[f"cache of {name}"] = Part(f"members.{name}.cache={member.cache}", _cache(member.cache))
        elif member.path != STUDENT:
            contents[f"member {name}"] = _model(f"members.{name}.path", member.path)
    if config.student.init == "pretrained":
        contents["student"] = _model("student.path", config.student.path)
    if path := config.student.lora.path:
        contents["adapter"] = Part(f"student.lora.path={path}", peft.fingerprint(models.folder(path)))
    contents |= _tokenizers(config)
    contents |= {f"source of {name}": part for name, part in _own_functions(config).items()}
    if written is not None:
        contents["responses"] = Part(
            "the set of the teacher's responses (prefixes.name=teacher)", describe_rows(unpacked(written))["hash"]
        )
    return contents


def _model(key: str, path: str) -> Part:
    return Part(f"{key}={path}", models.fingerprint(models.folder(path)))


def _data(key: str, name: str, split: str, options: Json) -> Part:
    paths = [f"{key}.options.{option}={value}" for option, value in options.items() if "path" in option and value]
    fingerprint = data.fingerprint(name, split=split, **options)
    return Part(" or ".join(paths) or f"{key}.name={name}", fingerprint)


def _cache(path: str) -> str:
    """Returns the fingerprint of a cache's manifest.

    The manifest has hashes of the teacher, the rows and the output matrix. Each record is checked with the manifest.
    """
    file = remote.local_folder(path) / MANIFEST
    if not file.is_file():
        return ""
    manifest = untrusted.read_json(file)
    manifest["teacher"] = {**manifest.get("teacher", {}), "path": ""}  # the teacher's path is not part of the content
    return _hash(str(sorted(manifest.items())))


def _tokenizers(config: Settings) -> dict[str, Part]:
    """Returns the tokenizer that the config names, and the pretrained student's own tokenizer for comparison."""
    keys = {
        "tokenizer.path": config.tokenizer.path,
        "teacher.cache": config.teacher.cache,
        "teacher.path": "" if config.teacher.path == STUDENT else config.teacher.path,
        "student.path": config.student.path,
    }  # in the order of `load_tokenizer`
    key = next(key for key, path in keys.items() if path)
    tokenizers = {"tokenizer": Part(f"the tokenizer of {key}={keys[key]}", _tokenizer(config, load_tokenizer(config)))}
    if config.student.init == "pretrained" and key != "student.path":
        own = data.Tokenizer.load(models.folder(config.student.path, weights=False))
        tokenizers["tokenizer of the student"] = Part(
            f"the tokenizer of student.path={config.student.path}", _tokenizer(config, own)
        )
    return tokenizers


def _tokenizer(config: Settings, tokenizer: data.Tokenizer) -> str:
    template = tokenizer.chat_template or "" if config.data.template == "chat" else ""
    return _hash(f"{tokenizer.fingerprint()} {tokenizer.end_ids} {template}")


def _own_functions(config: Settings) -> dict[str, Part]:
    """Returns the source of each function that a spec names as module:function, except for functions of kd_jax."""
    specs = {"learning_rate": config.learning_rate, "optimizer": config.optimizer, "prefixes": config.prefixes}
    for name, term in config.objective.terms.items():
        if term is not None:
            specs |= {f"objective.terms.{name}.{key}": term[key] for key in TERM_SPECS}
    for name, model in {"teacher": config.teacher, **config.members}.items():
        view = {"name": model.view} if isinstance(model.view, str) else model.view
        specs[f"{name}.view"] = {key: view[key] for key in FUNCTIONS_OF_VIEWS if key in view}
    functions = {}
    for key, text in _strings(specs, ""):
        for module, function in OWN.findall(text):
            if module.partition(".")[0] != "kd_jax":
                name = f"{module}:{function}"
                functions.setdefault(name, Part(f"the source code of {key}={text}", _source(module, function)))
    return functions


def _strings(tree: object, key: str) -> Iterator[tuple[str, str]]:
    """Yields all texts in nested mappings and sequences, each with its key."""
    if isinstance(tree, str):
        yield key, tree
    elif isinstance(tree, Mapping):
        for name in tree:
            yield from _strings(tree[name], f"{key}.{name}" if key else name)
    elif isinstance(tree, list | tuple):
        for index, entry in enumerate(tree):
            yield from _strings(entry, f"{key}[{index}]")


def _source(module_name: str, name: str) -> str:
    """Returns the hash of the files that define a function, or of the function's own source in a notebook or a script."""
    try:
        function = getattr(importlib.import_module(module_name), name)
    except Exception:  # the error of such a file is reported when the function is looked up
        return ""
    defined_in = {module_name, getattr(function, "__module__", None) or module_name}
    if "__main__" not in defined_in:
        modules = [sys.modules[module] for module in sorted(defined_in) if module in sys.modules]
        return _hash(" ".join(file_digest(Path(file)) for file in map(_file, modules) if file))
    return _hash(_text(function))


def _file(module: ModuleType) -> str:
    return getattr(module, "__file__", None) or ""


def _text(function: Callable[..., object]) -> str:
    """Returns the source of a function or a class; "" if Python does not know the source."""
    try:
        return inspect.getsource(function)
    except (
        OSError,
        TypeError,
    ):  # Python does not find the source of a class in a notebook, only of the class's methods
        members = vars(function).values() if inspect.isclass(function) else ()
        return "".join(_text(member) for member in members if inspect.isfunction(member))


def _hash(text: str) -> str:
    return digest(text)[:16] if text else ""
