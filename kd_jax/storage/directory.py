"""The work directory of a run: its config, the fingerprints of its data, and a lock against a second run."""

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from kd_jax import storage
from kd_jax.storage import untrusted
from kd_jax.storage.files import Json

CONFIG, PARTIAL, LOCK = "config.json", "config.json.partial", "lock"
IDENTITY = "identity.json"  # name -> fingerprint of the data and models that the config names
COMMIT = "commit of "  # begins the name of an entry of IDENTITY: the commit of a repository on the Hugging Face hub
# Keys that may differ between a run and its resumption. None of them changes the batches or the training on them.
FREE = (
    "mesh.",
    "keep_checkpoints",
    "checkpoint_every",
    "log_every",
    "profile_steps",
    "max_skipped",
    "teacher.int8_report",
    "push",
    "log.",
)

# Keys that earlier versions did not have, each with the value that gives the behaviour of those versions. The keys of
# an ablation's base end with these names.
ADDED: Json = {
    "data.template_options": {}, "data.system": "", "optimizer.no_decay": [], "members": {}, "teacher.follow": 0.0,
    "teacher.follow_every": 1, "teacher.follow_copy_first": False, "teacher.view.name": "none",
    "data.order.name": "shuffled", "student.lora.rank": 0, "student.lora.alpha": 16.0, "student.lora.scaling": "rank",
    "student.lora.targets": ["all-linear"], "student.lora.dropout": 0.0, "student.lora.path": "", "student.freeze": "",
    "student.frozen_dtype": "float32", "student.frozen_weights": "float",
} | {
    # keys of a term, and of its policy
    "between": ["student", "teacher"], "weights": {}, "vocabulary.support": "whole", "entry_clip": 0.0, "logits.name": "raw",
    "temperature": 0.0, "teacher_temperature": 0.0, "temperature_squared": False, "tokens.name": "none",
    "row_gate.name": "none", "where": {}, "policy.reward.name": "identity", "policy.members.teacher": 1.0,
}  # fmt: skip


def check(workdir: str, config: Json) -> None:
    """Checks that a directory is new, or belongs to a run with this config.

    Args:
      workdir: the work directory, which need not exist.
      config: the config, as nested dicts of JSON values.

    Raises:
      ValueError: the directory belongs to another config, or has files but no config. The message lists the differences
        of the configs, or names a file.
    """
    differences = config_difference(workdir, config)
    if differences:
        raise ValueError(
            f"the work directory {workdir} belongs to another config. Choose another --workdir, or undo these changes:\n  "
            + "\n  ".join(differences)
        )
    folder = epath.Path(workdir)
    if differences is None and folder.exists():
        if not folder.is_dir():
            raise ValueError(f"the work directory {workdir} is a file; choose an empty or a new folder.")
        if files := _foreign_files(folder):
            raise ValueError(
                f"the work directory {workdir} has files that belong to no run, such as {min(files)}; choose an empty or a new "
                f"folder."
            )


def config_difference(workdir: str, config: Json) -> list[str] | None:
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
        f"{key}: {old.get(key, absent)!r} in the work directory, {new.get(key, absent)!r} now"
        for key in sorted(old.keys() | new.keys())
        if not key.startswith(FREE) and old.get(key, absent) != new.get(key, absent)
    ]


def _with_defaults(config: object) -> object:
    """Returns the config of a run or of an ablation with `data.defaults` merged into the options of each dataset.

    So the place of an option does not matter: earlier versions had all options of a dataset in `data.options`.
    """
    if not isinstance(config, dict):
        return config
    tree: Json = {key: _with_defaults(value) for key, value in config.items()}
    if not isinstance(data := tree.get("data"), dict) or not isinstance(defaults := data.get("defaults"), dict):
        return tree
    for key in ("data", "text"):
        section = tree.get(key)
        if isinstance(section, dict) and isinstance(options := section.get("options"), dict):
            # If `text` has no options and names the same dataset as `data`, the options of `data` are used.
            uses_data = key == "text" and not options and section.get("name") == data.get("name")
            defaults_of_dataset = {} if uses_data else defaults.get(section.get("name"), {})
            tree[key] = section | {"options": defaults_of_dataset | options}
    tree["data"] = {key: value for key, value in tree["data"].items() if key != "defaults"}
    return tree


def write_config(workdir: str, config: Json) -> None:
    """Writes the resolved config completely, or not at all."""
    _write_json(epath.Path(workdir) / CONFIG, config)


def write_identity(workdir: str, fingerprints: dict[str, str]) -> None:
    """Writes the fingerprints of the data and models that the config names, completely or not at all."""
    _write_json(epath.Path(workdir) / IDENTITY, fingerprints)


def read_identity(workdir: str) -> dict[str, str]:
    """Returns the fingerprints from `write_identity`; {} if an older version made the directory without fingerprints.

    Raises:
      ValueError: the file is damaged.
    """
    path = epath.Path(workdir) / IDENTITY
    if not path.exists():
        return {}
    fingerprints = untrusted.parse_json(path.read_bytes(), str(path))
    if not isinstance(fingerprints, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(fingerprints).__name__}.")
    return fingerprints


def read_commits(workdir: str) -> dict[str, str]:
    """Returns the commits of repositories on the Hugging Face hub that a run has recorded, by `hub.repository`."""
    recorded = read_identity(workdir)
    return {name.removeprefix(COMMIT): commit for name, commit in recorded.items() if name.startswith(COMMIT)}


def _write_json(path: epath.Path, content: Json) -> None:
    storage.write_whole(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


@contextlib.contextmanager
def alone(workdir: str | Path, wait: bool = False) -> Iterator[None]:
    """Holds a lock on a folder, which is created if it does not exist. The end of the process releases the lock.

    The operating system locks a file in the folder. The lock works if the file system supports locks; on NFS and Lustre
    the lock holds on all hosts. At an address, `remote.work_directory` excludes other runs.

    Args:
      workdir: the folder.
      wait: True to wait until another process releases the lock, False to refuse.

    Raises:
      ValueError: another run uses the folder, and `wait` is False; the message names the run.
    """
    folder = epath.Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    # The library `filelock` is not used, for two reasons. On a file system without locks it falls back to a file that
    # remains after a process is killed. And its lock file cannot contain the owner's name.
    with open(folder / LOCK, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"the work directory {workdir} is in use by another run ({file.read().strip() or 'just started'}). Wait for that "
                f"run, stop that run, or choose another --workdir."
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def _foreign_files(folder: epath.Path) -> list[str]:
    """Returns the names of the files in a directory without a config that no run of kd_jax can have written."""
    return [path.name for path in folder.iterdir() if not path.name.startswith(PARTIAL) and path.name != LOCK]


def flat(tree: object, prefix: str = "") -> Json:
    """Returns the nested dicts of a config as one dict: {"data.batch_size": ...}."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    return {k: v for name, sub in tree.items() for k, v in flat(sub, f"{prefix}.{name}" if prefix else name).items()}
