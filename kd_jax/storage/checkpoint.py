"""Checkpoints: the state and the data's position, saved together, asynchronously, whole or not at all, and checked when read."""

import contextlib
import copy
import errno
import re
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from kd_jax import sharding, storage
from kd_jax.storage import remote
from kd_jax.storage.checksum import checksums, digest

Manager = ocp.CheckpointManager
DAMAGED = "damaged"
# The verdicts of a process on a checkpoint. The smallest verdict of all processes decides.
UNKNOWN, BAD, GOOD = range(3)
# Errors of a store, an operating system or a device that say nothing about the content. They may be temporary.
PASSING = re.compile(
    "^(PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED):"
    f"|os_error_code='{errno.EIO}'"
)
STORES = ("aiohttp", "botocore", "gcsfs", "google", "requests", "urllib3")  # packages whose errors have no errno


def open_manager(workdir: str, keep: int) -> ocp.CheckpointManager:
    """Opens the manager of a work directory's checkpoints. Close the manager, or use it in a `with` statement.

    Args:
      workdir: the work directory; checkpoints go to its folder `checkpoints`. The folder of a step exists only when
        complete.
      keep: the number of newest checkpoints that are kept; an older one is deleted when its successor is complete.
    """
    folder = _absolute(epath.Path(workdir) / "checkpoints")
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
    with storage.storing(folder):
        return ocp.CheckpointManager(folder, options=options, item_names=("state", "data"))


def _absolute(path: epath.Path) -> epath.Path:
    return path if remote.is_remote(path) else path.absolute()  # `absolute` would damage an address


def has_steps(workdir: str) -> bool:
    """Returns whether a work directory has a checkpoint from which to resume."""
    return last_step(workdir) is not None


def last_step(workdir: str) -> int | None:
    """Returns the step of a work directory's last complete checkpoint; None where there is none."""
    return max(_complete_steps(epath.Path(workdir) / "checkpoints"), default=None)


def _complete_steps(folder: epath.Path) -> list[int]:
    """Returns the steps of the complete checkpoints.

    On gs:// orbax cannot rename a complete folder, so it marks the folder with a file.
    """
    if not folder.exists():
        return []
    sign = "commit_success.txt" if remote.is_remote(folder) else ""
    return [int(path.name) for path in folder.iterdir() if path.name.isdigit() and (path / sign).exists()]


def save(manager: ocp.CheckpointManager, step: int, state: Any, iterator: Any) -> None:
    """Starts to save a checkpoint, and returns when the arrays are copied; the writing continues in the background.

    Args:
      manager: the manager from `open_manager`.
      step: the number of updates made.
      state: a pytree of arrays, random keys included.
      iterator: an object with `get_state() -> dict`, which JSON can hold.

    Raises:
      OSError: the previous checkpoint could not be written.
    """
    raw = _raw(state)
    position = copy.deepcopy(iterator.get_state())  # a thread writes the position while the iterator continues
    content = {"position": position, "checksums": _named(checksums(raw))}
    data = content | {"sha256": digest(content)}
    with _errors_of_writing(manager):
        manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(raw), data=ocp.args.JsonSave(data)))


def wait(manager: ocp.CheckpointManager) -> None:
    """Waits until the checkpoints that `save` has started are written.

    Raises:
      OSError: a checkpoint could not be written.
    """
    with _errors_of_writing(manager):
        manager.wait_until_finished()


@contextlib.contextmanager
def _errors_of_writing(manager: ocp.CheckpointManager) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # each storage has its own type of error for a full disk
        good = _complete_steps(epath.Path(manager.directory))
        last = f"the last good one is of step {max(good)}" if good else "there is none yet"
        left = storage.space_left(manager.directory) if storage.is_full(error) else ""
        raise storage.StorageError(
            f"a checkpoint could not be written to {manager.directory}; {last}. {left}Make room, or remove the "
            f"cause, and call again: {' '.join(str(error).split())[-300:]}"
        ) from error


def restore(manager: ocp.CheckpointManager, state: Any, iterator: Any) -> tuple[Any, list[str]]:
    """Restores the newest good checkpoint: returns the state, placed like `state`, and sets the position of `iterator`.

    A checkpoint is good if it can be read and every array has the saved bits. A damaged checkpoint is skipped and
    renamed to `damaged-STEP`, so that nothing is saved over it. A checkpoint that cannot be reached may be good.

    Args:
      manager: the manager from `open_manager`; it must have a step.
      state: a tree like the saved one, of ShapeDtypeStructs with shardings.
      iterator: the iterator, as in `save`; its position is changed.

    Returns:
      The state, and a description of the damage of each newer checkpoint.

    Raises:
      ValueError: no checkpoint is good; the message names each, and all are left unchanged.
      OSError: a checkpoint cannot be reached; the message names it, and all are left unchanged.
    """
    wrong: dict[int, str] = {}
    with _reader(manager) as reader:
        for step in sorted(manager.all_steps(), reverse=True):
            where = f"checkpoint {step} in {manager.directory}"
            raw, content, verdict, problem = _load(reader, step, state)
            # All processes resume from the same checkpoint, which each can read. None computes before all have read.
            verdict, problem = sharding.least_of_processes(verdict), problem or "another process cannot read it"
            if verdict == UNKNOWN:
                raise OSError(
                    f"{where} cannot be read, and may be good; nothing was changed. Remove the cause and call again, "
                    f"or move the checkpoint away to resume from the one before: {problem}"
                )
            if verdict == GOOD:
                problem = _difference(raw, content)
            if not problem:
                _put_aside(manager, list(wrong))
                iterator.set_state(content["position"])
                return _keys_like(state, raw), list(wrong.values())
            wrong[step] = f"{where} is damaged: {problem}"
    raise ValueError("no checkpoint can be read, and nothing was changed.\n  " + "\n  ".join(wrong.values()))


def save_state(folder: Any, state: Any) -> None:
    """Saves a state without a position into a folder, or at an address that orbax supports. Old content is replaced."""
    with storage.storing(folder), ocp.StandardCheckpointer() as writer:
        writer.save(_absolute(epath.Path(folder)), _raw(state), force=True)


def restore_state(folder: Any, state: Any) -> Any:
    """Returns the state that `save_state` wrote, placed like `state`."""
    with storage.storing(folder), ocp.StandardCheckpointer() as reader:
        return _keys_like(state, reader.restore(epath.Path(folder).absolute(), _raw_shapes(state)))


def _reader(manager: ocp.CheckpointManager) -> ocp.CheckpointManager:
    """Returns a manager that waits for no other process, so that one process's error does not block the others."""
    index = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"reader_{index}"
    )
    options = ocp.CheckpointManagerOptions(
        create=False, multiprocessing_options=alone, enable_async_checkpointing=False
    )
    return ocp.CheckpointManager(manager.directory, options=options, item_names=("state", "data"))


def _load(reader: ocp.CheckpointManager, step: int, state: Any) -> tuple[Any, dict[str, Any], int, str]:
    """Returns a step's arrays, its position and checksums, this process's verdict, and the problem, or ""."""
    args = ocp.args.Composite(state=ocp.args.StandardRestore(_raw_shapes(state)), data=ocp.args.JsonRestore())
    try:
        saved = reader.restore(step, args=args)
        raw, data = saved["state"], saved["data"]
        content = {name: data[name] for name in ("position", "checksums")}
        if data["sha256"] != digest(content):
            raise ValueError("the content of data.json is not the content that was saved")
    except Exception as error:  # a damaged file can cause any error in its reader
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return None, {}, UNKNOWN if _may_pass(error) else BAD, problem
    return raw, content, GOOD, ""


def _may_pass(error: BaseException | None) -> bool:
    """Returns True if an error, or a cause of it, is about access to the files and not about their content."""
    absent = (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
    while error is not None:
        kind = isinstance(error, PermissionError | ConnectionError | TimeoutError | MemoryError)
        kind = kind or type(error).__module__.partition(".")[0] in STORES
        if kind or getattr(error, "errno", None) not in absent or PASSING.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _difference(raw: Any, content: dict[str, Any]) -> str:
    """Returns a clause on the arrays that differ from the saved ones, or "". It is the same on all processes."""
    found = _named(checksums(raw))
    different = [name for name, number in found.items() if number != content["checksums"].get(name)]
    return f"the bits of {', '.join(different[:3])} are not those that were saved" if different else ""


def _put_aside(manager: ocp.CheckpointManager, steps: list[int]) -> None:
    """Renames damaged checkpoints, because a manager saves nothing at or before its latest step."""
    if not steps:
        return
    if jax.process_index() == 0:
        for step in steps:
            folder, count = epath.Path(manager.directory), 0
            while (target := folder / f"{DAMAGED}-{step}{f'-{count}' if count else ''}").exists():
                count += 1
            (folder / str(step)).rename(target)
    sharding.barrier("damaged checkpoints are renamed")  # no process continues before the renaming is done
    manager.reload()


def _named(tree: Any) -> dict[str, int]:
    return {sharding.path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


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
