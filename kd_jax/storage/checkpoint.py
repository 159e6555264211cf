"""Checkpoints: the state and the position in the data, saved together.

A checkpoint is written in the background, appears complete or not at all, and is checked when it is read.
"""

import contextlib
import copy
import errno
import re
from collections.abc import Iterator
from typing import Protocol

import jax
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import PyTree

from kd_jax import sharding, storage
from kd_jax.storage import remote
from kd_jax.storage.checksum import checksums, digest
from kd_jax.storage.files import AnyPath, Json

Manager = ocp.CheckpointManager
DAMAGED = "damaged"
# The verdicts of a process on a checkpoint. The smallest verdict of all processes decides.
UNKNOWN, BAD, GOOD = range(3)
# Errors of a store, an operating system or a device, which may be temporary and are not about the content.
PASSING = re.compile(
    "^(PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED):"
    f"|os_error_code='{errno.EIO}'"
)
STORES = ("aiohttp", "botocore", "gcsfs", "google", "requests", "urllib3")  # packages whose errors have no errno


class Resumable(Protocol):
    """An iterator over batches whose position can be saved."""

    def get_state(self) -> Json:
        """Returns the position, in a form that JSON can store."""
        ...

    def set_state(self, state: Json, /) -> None:
        """Moves the iterator to a position from `get_state`."""


def open_manager(workdir: str, keep: int) -> ocp.CheckpointManager:
    """Opens the manager of a work directory's checkpoints. Close the manager, or use it in a `with` statement.

    Args:
      workdir: the work directory, whose folder `checkpoints` has a complete folder for each saved step.
      keep: the largest number of checkpoints. The oldest checkpoint is deleted when a new checkpoint is complete.
    """
    folder = _absolute(epath.Path(workdir) / "checkpoints")
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
    with storage.storing(folder):
        return ocp.CheckpointManager(folder, options=options, item_names=("state", "data"))


def _absolute(path: epath.Path) -> epath.Path:
    return path if remote.is_remote(path) else path.absolute()  # `absolute` would damage an address


def has_steps(workdir: str) -> bool:
    """Returns True if a work directory has a checkpoint from which a run can resume."""
    return last_step(workdir) is not None


def last_step(workdir: str) -> int | None:
    """Returns the step of a work directory's last complete checkpoint; None if there is no such checkpoint."""
    return max(_complete_steps(epath.Path(workdir) / "checkpoints"), default=None)


def _complete_steps(folder: epath.Path) -> list[int]:
    """Returns the steps of the complete checkpoints.

    On gs:// orbax cannot rename a complete folder, so it marks the folder with a file.
    """
    if not folder.exists():
        return []
    sign = "commit_success.txt" if remote.is_remote(folder) else ""
    return [int(path.name) for path in folder.iterdir() if path.name.isdigit() and (path / sign).exists()]


def save(manager: ocp.CheckpointManager, step: int, state: PyTree, iterator: Resumable) -> None:
    """Starts to save a checkpoint. The function returns when the arrays are copied; a thread then writes the copy.

    Args:
      manager: the manager from `open_manager`.
      step: the number of updates made.
      state: a pytree of arrays, random keys included.
      iterator: the iterator over batches.

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
        steps = _complete_steps(epath.Path(manager.directory))
        last = f"the last good checkpoint is of step {max(steps)}" if steps else "there is no good checkpoint yet"
        space = storage.space_left(manager.directory) if storage.is_full(error) else ""
        raise storage.StorageError(
            f"a checkpoint could not be written to {manager.directory}; {last}. {space}Make room, or remove the "
            f"cause, and call again: {' '.join(str(error).split())[-300:]}"
        ) from error


def restore(manager: ocp.CheckpointManager, state: PyTree, iterator: Resumable) -> tuple[PyTree, list[str]]:
    """Restores the newest good checkpoint: returns the state, placed like `state`, and sets the position of `iterator`.

    A checkpoint is good if it can be read and every array has the saved bits. A damaged checkpoint is skipped and
    renamed to `damaged-STEP`, so that no new checkpoint replaces it. An unreachable checkpoint may be good.

    Args:
      manager: the manager from `open_manager`, with at least one checkpoint.
      state: a tree like the saved state, of ShapeDtypeStructs with shardings.
      iterator: the iterator over batches, whose position is changed.

    Returns:
      The state, and a description of the damage of each newer checkpoint.

    Raises:
      ValueError: no checkpoint is good; the message names all checkpoints, and none is changed.
      OSError: a checkpoint cannot be reached; the message names this checkpoint, and none is changed.
    """
    damage: dict[int, str] = {}
    with _reader(manager) as reader:
        for step in sorted(manager.all_steps(), reverse=True):
            where = f"checkpoint {step} in {manager.directory}"
            raw, content, verdict, problem = _load(reader, step, state)
            # All processes resume from the same checkpoint, which every process can read. No process computes before
            # all processes have read the checkpoint.
            verdict, problem = sharding.least_of_processes(verdict), problem or "another process cannot read it"
            if verdict == UNKNOWN:
                raise OSError(
                    f"{where} cannot be read, and may be good; nothing was changed. Remove the cause and call again, "
                    f"or move the checkpoint away to resume from the checkpoint before: {problem}"
                )
            if verdict == GOOD:
                problem = _difference(raw, content)
            if not problem:
                _rename_damaged(manager, list(damage))
                iterator.set_state(content["position"])
                return _keys_like(state, raw), list(damage.values())
            damage[step] = f"{where} is damaged: {problem}"
    raise ValueError("no checkpoint can be read, and nothing was changed.\n  " + "\n  ".join(damage.values()))


def save_state(folder: AnyPath, state: PyTree) -> None:
    """Saves a state without a position to a folder, or to an address that orbax supports. Old content is replaced."""
    with storage.storing(folder), ocp.StandardCheckpointer() as writer:
        writer.save(_absolute(epath.Path(folder)), _raw(state), force=True)


def restore_state(folder: AnyPath, state: PyTree) -> PyTree:
    """Returns the state that `save_state` wrote, placed like `state`."""
    with storage.storing(folder), ocp.StandardCheckpointer() as reader:
        return _keys_like(state, reader.restore(epath.Path(folder).absolute(), _raw_shapes(state)))


def _reader(manager: ocp.CheckpointManager) -> ocp.CheckpointManager:
    """Returns a manager that waits for no other process, so that an error of one process does not block the others."""
    index = jax.process_index()
    this_process_only = ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"reader_{index}"
    )
    options = ocp.CheckpointManagerOptions(
        create=False, multiprocessing_options=this_process_only, enable_async_checkpointing=False
    )
    return ocp.CheckpointManager(manager.directory, options=options, item_names=("state", "data"))


def _load(reader: ocp.CheckpointManager, step: int, state: PyTree) -> tuple[PyTree, Json, int, str]:
    """Returns a step's arrays, the position and checksums, this process's verdict, and the problem, or ""."""
    args = ocp.args.Composite(state=ocp.args.StandardRestore(_raw_shapes(state)), data=ocp.args.JsonRestore())
    try:
        saved = reader.restore(step, args=args)
        raw, data = saved["state"], saved["data"]
        content = {name: data[name] for name in ("position", "checksums")}
        if data["sha256"] != digest(content):
            raise ValueError("the content of data.json is not the content that was saved")
    except Exception as error:  # a library that reads a damaged file can raise any error
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return None, {}, UNKNOWN if _is_about_access(error) else BAD, problem
    return raw, content, GOOD, ""


def _is_about_access(error: BaseException | None) -> bool:
    """Returns True if an error, or a cause of it, is about access to the files and not about their content."""
    absent = (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
    while error is not None:
        by_type = isinstance(error, PermissionError | ConnectionError | TimeoutError | MemoryError)
        by_type = by_type or type(error).__module__.partition(".")[0] in STORES
        if by_type or getattr(error, "errno", None) not in absent or PASSING.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _difference(raw: PyTree, content: Json) -> str:
    """Returns a clause on the arrays that differ from the saved arrays, or "". All processes return the same clause."""
    numbers = _named(checksums(raw))
    different = [name for name, number in numbers.items() if number != content["checksums"].get(name)]
    return f"the bits of {', '.join(different[:3])} differ from the saved bits" if different else ""


def _rename_damaged(manager: ocp.CheckpointManager, steps: list[int]) -> None:
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


def _named(tree: PyTree) -> dict[str, int]:
    """Returns the leaves of a tree by the names of their paths."""
    return {sharding.path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _is_key(leaf: jax.Array | jax.ShapeDtypeStruct) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _raw(tree: PyTree) -> PyTree:
    """Returns the tree with the data of each random key in place of the key, because orbax stores only numbers."""
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, tree)


def _raw_shapes(tree: PyTree) -> PyTree:
    """Returns the abstract arrays of `_raw`."""

    def raw(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        data = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
        return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=leaf.sharding)

    return jax.tree.map(raw, tree)


def _keys_like(tree: PyTree, raw: PyTree) -> PyTree:
    """Returns the inverse of `_raw`. The random keys of `tree` show which arrays are the data of keys."""
    return jax.tree.map(lambda leaf, value: jax.random.wrap_key_data(value) if _is_key(leaf) else value, tree, raw)
