"""A work directory: the config and the contents that it belongs to, and that one run at a time is in it."""

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from typing import Any

from etils import epath

from kd_jax import storage, untrusted

CONFIG, PARTIAL, LOCK = "config.json", "config.json.partial", "lock"
IDENTITY = "identity.json"  # name -> fingerprint of what the config names
# What may differ between a run and its resumption: none of it decides the batches or what is made of them.
FREE = (
    "mesh.",
    "keep_checkpoints",
    "checkpoint_every",
    "log_every",
    "profile_steps",
    "max_skipped",
    "teacher.int8_report",
)

# Keys that earlier versions did not have, each with the value that means what those versions did. The keys of an ablation's
# base end with these.
ADDED = {"data.template_options": {}, "data.system": "", "optimizer.no_decay": []}


def check(workdir: str, config: dict[str, Any]) -> None:
    """Refuses a directory of another run, or one with something else in it, and says what differs.

    Args:
      workdir: of the run; it need not exist.
      config: nested dicts of what JSON can hold.

    Raises:
      ValueError: the directory is not this run's.
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
    """What differs between a config and the one that a work directory was started with, but what is in FREE.

    Args:
      workdir: of the run.
      config: nested dicts of what JSON can hold.

    Returns:
      None where the directory has no config yet; else a line per difference, [] where they agree.
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
    """A config, or an ablation's, with `data.defaults` merged into the options that they stand for.

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
    """Writes the resolved config, whole or not at all."""
    _write_json(epath.Path(workdir), CONFIG, config)


def write_identity(workdir: str, fingerprints: dict[str, str]) -> None:
    """Writes the fingerprints of what the config names, whole or not at all."""
    _write_json(epath.Path(workdir), IDENTITY, fingerprints)


def read_identity(workdir: str) -> dict[str, str]:
    """Returns what `write_identity` wrote; {} where nothing did, such as in a directory of an older version.

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


def _write_json(folder: epath.Path, name: str, content: dict[str, Any]) -> None:
    partial = folder / f"{name}.partial.{os.getpid()}"
    with storage.storing(folder / name):
        folder.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        partial.replace(folder / name)


@contextlib.contextmanager
def alone(workdir: str) -> Iterator[None]:
    """Holds a work directory, which is made if it does not exist; who dies lets it go.

    The lock is the operating system's, on a file: it reaches as far as the file system's locks do, which on NFS and Lustre is
    all hosts. At an address `remote.work_directory` keeps others out.

    Raises:
      ValueError: another run is in it; it is named.
    """
    folder = epath.Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
    """What is in a directory without a config that no run of ours can have left there."""
    return [path.name for path in folder.iterdir() if not path.name.startswith(PARTIAL) and path.name != LOCK]


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A config's nested dicts as one, {"data.batch_size": ...}."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    return {k: v for name, sub in tree.items() for k, v in flat(sub, f"{prefix}.{name}" if prefix else name).items()}
