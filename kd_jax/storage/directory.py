"""A work directory: the config and the data that belong to it, and a lock so that only one run uses it at a time."""

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

from kd_jax import storage
from kd_jax.storage import untrusted

CONFIG, PARTIAL, LOCK = "config.json", "config.json.partial", "lock"
IDENTITY = "identity.json"  # name -> fingerprint of the data and models that the config names
# Keys that may differ between a run and its resumption. None of them changes the batches or the training on them.
FREE = (
    "mesh.",
    "keep_checkpoints",
    "checkpoint_every",
    "log_every",
    "profile_steps",
    "max_skipped",
    "teacher.int8_report",
)

# Keys that earlier versions did not have, each with the value that gives the behaviour of those versions. The keys of
# an ablation's base end with these names.
ADDED = {"data.template_options": {}, "data.system": "", "optimizer.no_decay": []}


def check(workdir: str, config: dict[str, Any]) -> None:
    """Checks that a directory belongs to this run, and lists the differences if it belongs to another one.

    Args:
      workdir: the work directory, which need not exist.
      config: the config, as nested dicts of JSON values.

    Raises:
      ValueError: the directory belongs to another config, or contains something else.
    """
    differences = config_difference(workdir, config)
    if differences:
        raise ValueError(
            f"the work directory {workdir} belongs to another config. Choose another --workdir, or take these back:\n  "
            + "\n  ".join(differences)
        )
    folder = epath.Path(workdir)
    if differences is None and folder.exists() and (not folder.is_dir() or _foreign_files(folder)):
        raise ValueError(f"the work directory {workdir} has something else in it; choose an empty or a new one.")


def config_difference(workdir: str, config: dict[str, Any]) -> list[str] | None:
    """Returns the differences between a config and the config of a work directory, except for the keys in FREE.

    Args:
      workdir: the work directory.
      config: the config, as nested dicts of JSON values.

    Returns:
      A line for each difference, or None if the directory has no config yet.
    """
    path = epath.Path(workdir) / CONFIG
    if not path.exists():
        return None
    trees = json.loads(path.read_text(encoding="utf-8")), json.loads(json.dumps(config))
    old, new = (flat(_with_defaults(tree)) for tree in trees)
    for key, value in ADDED.items():
        for added in [name for name in new if name == key or name.endswith(f".{key}")]:
            old.setdefault(added, value)
    absent = "(absent)"
    return [
        f"{key}: {old.get(key, absent)!r} there, {new.get(key, absent)!r} now"
        for key in sorted(old.keys() | new.keys())
        if not key.startswith(FREE) and old.get(key, absent) != new.get(key, absent)
    ]


def _with_defaults(tree: Any) -> Any:
    """Returns a config, or an ablation's, with `data.defaults` merged into the options of each dataset.

    The options of a dataset are the same wherever a config has them. Earlier versions had all of them in `data.options`.
    """
    if not isinstance(tree, dict):
        return tree
    tree = {key: _with_defaults(value) for key, value in tree.items()}
    if not isinstance(data := tree.get("data"), dict) or not isinstance(defaults := data.get("defaults"), dict):
        return tree
    for key in ("data", "text"):
        section = tree.get(key)
        if isinstance(section, dict) and isinstance(options := section.get("options"), dict):
            # Empty options of `text` stand for those of `data`, where both name the same dataset.
            stands = key == "text" and not options and section.get("name") == data.get("name")
            own = {} if stands else defaults.get(section.get("name"), {})
            tree[key] = section | {"options": own | options}
    tree["data"] = {key: value for key, value in tree["data"].items() if key != "defaults"}
    return tree


def write_config(workdir: str, config: dict[str, Any]) -> None:
    """Writes the resolved config completely, or not at all."""
    _write_json(epath.Path(workdir) / CONFIG, config)


def write_identity(workdir: str, fingerprints: dict[str, str]) -> None:
    """Writes the fingerprints of the data and models that the config names, completely or not at all."""
    _write_json(epath.Path(workdir) / IDENTITY, fingerprints)


def read_identity(workdir: str) -> dict[str, str]:
    """Returns the fingerprints from `write_identity`, or {} if there are none, as in a directory of an older version.

    Raises:
      ValueError: the file is damaged.
    """
    path = epath.Path(workdir) / IDENTITY
    if not path.exists():
        return {}
    found = untrusted.parse_json(path.read_bytes(), str(path))
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(found).__name__}.")
    return found


def _write_json(path: epath.Path, content: dict[str, Any]) -> None:
    storage.write_whole(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


@contextlib.contextmanager
def alone(workdir: str | Path, wait: bool = False) -> Iterator[None]:
    """Holds a lock on a folder, which is created if it does not exist. A process that dies releases the lock.

    The lock is a lock of the operating system on a file. It works as far as the locks of the file system do. On NFS and
    Lustre these reach all hosts. At an address, `remote.work_directory` keeps other runs away.

    Args:
      workdir: the folder.
      wait: True to wait until another process releases the lock, False to refuse.

    Raises:
      ValueError: another run uses the folder, and `wait` is False; the message names the run.
    """
    folder = epath.Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    # The library `filelock` does not serve here. On a file system without locks it falls back to a file that outlives a
    # killed process, and the file of its lock has no place for the owner's name.
    with open(folder / LOCK, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"the work directory {workdir} is in use by another run ({file.read().strip() or 'just started'}). Wait for it, "
                f"stop it, or choose another --workdir."
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def _foreign_files(folder: epath.Path) -> list[str]:
    """Returns the names of files in a directory without a config that no run of kd_jax can have left there."""
    return [path.name for path in folder.iterdir() if not path.name.startswith(PARTIAL) and path.name != LOCK]


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Returns the nested dicts of a config as one dict: {"data.batch_size": ...}."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    return {k: v for name, sub in tree.items() for k, v in flat(sub, f"{prefix}.{name}" if prefix else name).items()}
