"""The contents that a run belongs to beside its config: its data, models, tokenizer, cache, and functions of one's own."""

import hashlib
import importlib
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax

from kd_jax import checkpoint, data, directory, models, remote, sharding, untrusted
from kd_jax.checksum import file_digest
from kd_jax.setup import dataset_options, folder, load_tokenizer
from kd_jax.teacher_cache_files import MANIFEST, about_rows

OWN = re.compile(r"(?<![\w.:])([A-Za-z_][\w.]*):([A-Za-z_]\w*)")  # module:function, also within a call's keywords
TERM_SPECS = ("divergence", "assistant", "weight", "coefficient")


class Part(NamedTuple):
    """One of the contents.

    Attributes:
      named: the key and the value of the config that name it.
      fingerprint: of the content alone; "" where the content is not there.
    """

    named: str
    fingerprint: str


def check(workdir: str, config: Any, run: Any = None) -> None:
    """Checks that the contents are those with which the run of a work directory began. All processes call it.

    The first process compares, so that each file is read once, and all raise the same error.

    Args:
      workdir: of the run; it need not exist.
      config: of the run.
      run: as in `parts`.

    Raises:
      ValueError: contents differ, or cannot be read; each is named.
    """
    problem = ""
    if jax.process_index() == 0:
        try:
            problem = _difference(workdir, config, run)
        except (ValueError, OSError) as error:
            problem = str(error)
    if problem := sharding.text_from_first_process(problem):
        raise ValueError(problem)


def write(workdir: str, config: Any, run: Any) -> None:
    """Writes the fingerprints into the work directory; those that it has already stay.

    A directory of an older version that has nothing to resume has none, and takes those of now.
    """
    there = directory.read_identity(workdir)
    here = {name: part.fingerprint for name, part in parts(config, run).items() if part.fingerprint}
    if here.keys() - there.keys():
        directory.write_identity(workdir, here | there)


def _difference(workdir: str, config: Any, run: Any) -> str:
    if not (there := directory.read_identity(workdir)):
        return _of_older_version(workdir, config)
    lines = [
        f"{part.named} has other content than when the run began"
        for name, part in parts(config, run).items()
        # A student's folder may be gone: a run that goes on reads no weights there. Of all else that is gone `build` says so.
        if part.fingerprint and part.fingerprint != there.get(name, part.fingerprint)
    ]
    if not lines:
        return ""
    listed = "\n  ".join(lines)
    return (
        f"the work directory {workdir} belongs to a run of other contents. Put the old content back, or choose another "
        f"--workdir:\n  {listed}"
    )


def _of_older_version(workdir: str, config: Any) -> str:
    """Returns why a run without fingerprints cannot be resumed; "" where no step is saved, or where all are made."""
    step = checkpoint.last_step(workdir)
    if step is None or step >= config.steps:
        return ""
    return (
        f"the work directory {workdir} has step {step} of a run that has no {directory.IDENTITY}: an earlier version of kd_jax "
        f"began it. That version truncated and encoded prompts and responses in another way, so that the run would go on with "
        f"other rows. Finish it with the version that began it, or begin it again in another --workdir."
    )


def parts(config: Any, run: Any = None) -> dict[str, Part]:
    """Returns all contents that a config names, by a name that has no path in it.

    Args:
      config: of a run.
      run: the `train.Run` that was built of it, or None; with it the rows that a teacher wrote are among the contents.

    Raises:
      ValueError: a dataset or a tokenizer that cannot be read.
    """
    text = config.text
    found = {"data": _data("data", config.data.name, config.data.train_split, dataset_options(config))}
    if text.name and (text.options or text.name != config.data.name):
        found["text"] = _data("text", text.name, text.split, dataset_options(config, "text"))
    if config.teacher.cache:
        found["teacher.cache"] = Part(f"teacher.cache={config.teacher.cache}", _cache(config.teacher.cache))
    elif config.teacher.path:
        found["teacher"] = Part(f"teacher.path={config.teacher.path}", models.fingerprint(folder(config.teacher.path)))
    if config.student.init == "pretrained":
        found["student"] = Part(f"student.path={config.student.path}", models.fingerprint(folder(config.student.path)))
    found |= _tokenizers(config)
    found |= {f"source of {name}": part for name, part in _own_functions(config).items()}
    if run is not None and run.written is not None:
        rows = run.written.rows if isinstance(run.written, data.Packed) else run.written
        found["responses"] = Part("what the teacher wrote (prefixes.name=teacher)", about_rows(rows)["hash"])
    return found


def _data(key: str, name: str, split: str, options: Any) -> Part:
    paths = [f"{key}.options.{option}={value}" for option, value in dict(options).items() if "path" in option and value]
    fingerprint = data.fingerprint(name, split=split, **dict(options))
    return Part(" or ".join(paths) or f"{key}.name={name}", fingerprint)


def _cache(path: str) -> str:
    """The manifest's fingerprint: it has hashes of the teacher, of the rows and of the head, and each record is checked with it."""
    file = remote.local_folder(path) / MANIFEST
    if not file.is_file():
        return ""
    manifest = untrusted.read_json(file)
    manifest["teacher"] = {**manifest.get("teacher", {}), "path": ""}  # where the teacher was is no content
    return _hash(str(sorted(manifest.items())))


def _tokenizers(config: Any) -> dict[str, Part]:
    """Returns the tokenizer that the config names, and a pretrained student's own, with which it is compared."""
    keys = {
        "tokenizer.path": config.tokenizer.path,
        "teacher.cache": config.teacher.cache,
        "teacher.path": config.teacher.path,
        "student.path": config.student.path,
    }  # as `load_tokenizer` takes them
    key = next(key for key, path in keys.items() if path)
    found = {"tokenizer": Part(f"the tokenizer of {key}={keys[key]}", _tokenizer(config, load_tokenizer(config)))}
    if config.student.init == "pretrained" and key != "student.path":
        own = data.Tokenizer.load(folder(config.student.path))
        found["tokenizer of the student"] = Part(
            f"the tokenizer of student.path={config.student.path}", _tokenizer(config, own)
        )
    return found


def _tokenizer(config: Any, tokenizer: data.Tokenizer) -> str:
    template = tokenizer.chat_template or "" if config.data.template == "chat" else ""
    return _hash(f"{tokenizer.fingerprint()} {tokenizer.end_ids} {template}")


def _own_functions(config: Any) -> dict[str, Part]:
    """The source of each function that a spec names as module:function, but for those of kd_jax."""
    specs = {key: config[key] for key in ("learning_rate", "optimizer", "prefixes")}
    for name, term in config.objective.terms.items():
        if term is not None:
            specs |= {f"objective.terms.{name}.{key}": term[key] for key in TERM_SPECS}
    found = {}
    for key, text in _strings(specs, ""):
        for module, function in OWN.findall(text):
            if module.partition(".")[0] != "kd_jax":
                name = f"{module}:{function}"
                found.setdefault(name, Part(f"the source code of {key}={text}", _source(module, function)))
    return found


def _strings(tree: Any, key: str) -> Iterator[tuple[str, str]]:
    """All texts in nested mappings and sequences, each with its key."""
    if isinstance(tree, str):
        yield key, tree
    elif hasattr(tree, "keys"):
        for name in tree:
            yield from _strings(tree[name], f"{key}.{name}" if key else name)
    elif isinstance(tree, list | tuple):
        for index, entry in enumerate(tree):
            yield from _strings(entry, f"{key}[{index}]")


def _source(module_name: str, name: str) -> str:
    """The hash of the files that define a function; of a notebook's or a script's function that of its own source."""
    try:
        function = getattr(importlib.import_module(module_name), name)
    except Exception:  # what such a file raises is said when the function is looked up
        return ""
    defined_in = {module_name, getattr(function, "__module__", None) or module_name}
    if "__main__" not in defined_in:
        modules = [sys.modules[its] for its in sorted(defined_in) if its in sys.modules]
        return _hash(" ".join(file_digest(Path(file)) for file in map(_file, modules) if file))
    return _hash(_text(function))


def _file(module: ModuleType) -> str:
    return getattr(module, "__file__", None) or ""


def _text(function: Any) -> str:
    """The source of a function or a class; "" where Python does not know it."""
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):  # a class of a notebook has no file that Python could look into, but its methods have
        members: Mapping[str, Any] = vars(function) if inspect.isclass(function) else {}
        return "".join(_text(member) for member in members.values() if inspect.isfunction(member))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16] if text else ""
