"""Checkpoints: the state and the data's position, saved together, asynchronously, whole or not at all."""

import copy
import json
import os
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

PARTIAL = "config.json.partial"


def open_manager(workdir: str, keep: int) -> ocp.CheckpointManager:
    """The manager of a work directory's checkpoints. Close it, or use it in a `with`.

    Args:
      workdir: checkpoints go to its folder `checkpoints`; a folder of a step exists only when it is complete.
      keep: how many of the newest are kept.
    """
    folder = epath.Path(workdir).absolute() / "checkpoints"
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
    return ocp.CheckpointManager(folder, options=options, item_names=("state", "data"))


def has_steps(workdir: str) -> bool:
    """Whether a work directory has a checkpoint to go on from."""
    folder = epath.Path(workdir) / "checkpoints"
    return folder.exists() and any(path.name.isdigit() for path in folder.iterdir())


def save(manager: ocp.CheckpointManager, step: int, state: Any, iterator: Any) -> None:
    """Starts to save; returns when the arrays are copied, while they are still being written.

    Args:
      manager: as from `open_manager`.
      step: updates made.
      state: a pytree of arrays, random keys included.
      iterator: with `get_state() -> dict` that JSON can hold.
    """
    data = copy.deepcopy(iterator.get_state())  # written by a thread, while the iterator goes on
    manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(_raw(state)), data=ocp.args.JsonSave(data)))


def restore(manager: ocp.CheckpointManager, state: Any, iterator: Any) -> Any:
    """The newest checkpoint's state, its arrays placed as `state` says, with `iterator` set to where it was.

    Args:
      manager: as from `open_manager`; it must have a step.
      state: a tree like the saved one, of ShapeDtypeStructs with shardings.
      iterator: as in `save`; changed.
    """
    args = ocp.args.Composite(state=ocp.args.StandardRestore(_raw_shapes(state)), data=ocp.args.JsonRestore())
    saved = manager.restore(manager.latest_step(), args=args)
    iterator.set_state(saved["data"])
    return _keys_like(state, saved["state"])


def config_difference(workdir: str, config: dict[str, Any]) -> list[str] | None:
    """What differs between a config and the one that a work directory was started with.

    Args:
      workdir: of the run.
      config: nested dicts of what JSON can hold.

    Returns:
      None where the directory has no config yet; else a line per difference, [] where they agree.
    """
    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        return None
    old, new = _flat(json.loads(path.read_text())), _flat(json.loads(json.dumps(config)))
    absent = "(absent)"
    return [
        f"{key}: {old.get(key, absent)!r} there, {new.get(key, absent)!r} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, absent) != new.get(key, absent)
    ]


def foreign_files(workdir: Any) -> list[str]:
    """What is in a work directory without a config that no run of ours can have left there."""
    return [path.name for path in epath.Path(workdir).iterdir() if not path.name.startswith(PARTIAL)]


def write_config(workdir: str, config: dict[str, Any]) -> None:
    """Writes the resolved config beside the checkpoints, whole or not at all."""
    folder = epath.Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{PARTIAL}.{os.getpid()}"
    partial.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    partial.replace(folder / "config.json")


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    return {k: v for name, sub in tree.items() for k, v in _flat(sub, f"{prefix}.{name}" if prefix else name).items()}


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _raw(tree: Any) -> Any:
    # orbax stores numbers; a random key is stored as its data.
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, tree)


def _raw_shapes(tree: Any) -> Any:
    def raw(leaf: Any) -> Any:
        data = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
        return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=leaf.sharding)

    return jax.tree.map(raw, tree)


def _keys_like(tree: Any, raw: Any) -> Any:
    return jax.tree.map(lambda leaf, value: jax.random.wrap_key_data(value) if _is_key(leaf) else value, tree, raw)
