"""A local folder and its copy at an address. The copy is updated while the folder is in use, and at the end."""

import contextlib
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from fsspec import AbstractFileSystem
from tqdm import tqdm

from kd_jax.storage import StorageError, storing
from kd_jax.storage.remote_lease import LOCK, Taken

EVERY = 60.0  # seconds between two updates of the copy
PATIENCE, RETRY_AFTER = 120.0, 5.0  # seconds that a run waits for a failing store, and between two tries
CHECKPOINTS = "checkpoints"
UNFINISHED = (".orbax-checkpoint-tmp", ".partial")  # parts of the names of unfinished files


class Copy:
    """A local folder and its copy at an address.

    Attributes:
      problem: the reason why the last update failed, or "".
    """

    def __init__(
        self, system: AbstractFileSystem, root: str, folder: Path, skipped: tuple[str, ...] = (),
        parts: tuple[str, ...] = UNFINISHED, check: Callable[[], None] = lambda: None,
    ):  # fmt: skip
        """Prepares a copy. Nothing is copied yet.

        Args:
          system: fsspec's file system of the address.
          root: the path of the address in that file system.
          folder: the local folder.
          skipped: folders that are neither fetched nor copied to the address.
          parts: parts of the names of files that are not copied to the address.
          check: a function that is called before each update, and raises Taken if this run may no longer copy.
        """
        self._system, self._root, self._folder, self._skipped = system, root, folder, (*skipped, LOCK)
        self._parts, self._check = parts, check
        self._copied: dict[str, tuple[int, int]] = {}  # name -> size and time of the copied file
        self._pushing, self._patience, self.problem = threading.Lock(), PATIENCE, ""

    def pull(self, unread: tuple[str, ...] = ()) -> None:
        """Fetches all files except the files of the folders `unread`.

        Raises:
          ValueError: an object has a name that leads out of the folder.
        """
        with storing(self._root):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._system.invalidate_cache()
            paths = self._system.find(self._root)
        for path in map(str, paths):
            name = path.removeprefix(self._root).lstrip("/")
            if not name or name.partition("/")[0] in (*unread, *self._skipped):
                continue
            if ".." in name.split("/"):
                raise ValueError(f"{path} has a name that leads out of {self._root}; delete or rename this object.")
            target = self._folder / name
            with storing(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                self._system.get_file(path, str(target))
                self._copied[name] = _stamp(target)

    def push(self) -> None:
        """Copies new and changed files.

        The copy of a deleted checkpoint is deleted once the copy of a newer checkpoint is complete.
        """
        # Files are listed first and checkpoints are copied last, so that metrics.jsonl is never behind a checkpoint.
        names = set(self._files())
        for name in sorted(names, key=lambda name: (_of_checkpoint(name), name)):
            try:
                stamp = _stamp(self._folder / name)
                if self._copied.get(name) != stamp:
                    self._system.makedirs(f"{self._root}/{name}".rpartition("/")[0], exist_ok=True)
                    self._system.put_file(str(self._folder / name), f"{self._root}/{name}")
                    self._copied[name] = stamp
            except FileNotFoundError:
                if (self._folder / name).exists():
                    raise  # the bucket does not exist
        # A step whose list of files changed during the copy may be incomplete at the address.
        changed = {_step(name) for name in names ^ set(self._files())}
        newest = dict(sorted(step for step in {_step(name) for name in names} - changed if step))
        for name in self._copied.keys() - names:
            if (step := _step(name)) and step[1] <= newest.get(step[0], -1):
                with contextlib.suppress(FileNotFoundError):
                    self._system.rm_file(f"{self._root}/{name}")
                del self._copied[name]

    def store(self) -> None:
        """Updates the copy, and retries if the update fails.

        Raises:
          OSError: the update has failed for PATIENCE seconds, or another run has the address.
        """
        started = time.monotonic()
        while not self._tried():
            if time.monotonic() >= started + self._patience:
                self._patience = 0.0  # only one try is made at the end
                raise StorageError(
                    f"{self._folder} could not be copied to {self._root}; the folder still exists: {self.problem}"
                )
            time.sleep(RETRY_AFTER)

    @contextlib.contextmanager
    def kept_up(self) -> Iterator[None]:
        """Updates the copy every minute in a thread, and at the end of the block, even after an error."""
        ended = threading.Event()

        def follow() -> None:
            while not ended.wait(EVERY):
                self._tried()

        thread = threading.Thread(target=follow, name="kd_jax.storage.remote", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self.store()

    def _tried(self) -> bool:
        """Tries to update the copy, and returns True on success.

        A line is printed when updates begin to fail, and when they succeed again.
        """
        with self._pushing:
            before, self.problem = self.problem, "the update was interrupted"
            try:
                self._check()
                self.push()
                problem = ""
            except Exception as error:  # each store has its own kinds of errors
                self._patience *= not isinstance(error, Taken)
                problem = f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}"
            if bool(before) != bool(problem):
                result = f"cannot be copied; kd_jax tries again ({problem})" if problem else "can be copied again"
                tqdm.write(f"kd_jax: new files for {self._root} {result}.", file=sys.stderr)
            self.problem = problem
            return not problem

    def _files(self) -> list[str]:
        """Returns the names of the local files to copy."""
        files = (path for path in self._folder.rglob("*") if path.is_file())
        names = (path.relative_to(self._folder).as_posix() for path in files)
        return [
            name
            for name in names
            if name.partition("/")[0] not in self._skipped and not any(part in name for part in self._parts)
        ]


def _of_checkpoint(name: str) -> bool:
    return f"/{CHECKPOINTS}/" in f"/{name}"


def _step(name: str) -> tuple[str, int] | None:
    """Returns the folder of checkpoints and the step of a checkpoint's file, or None for another file."""
    match = re.fullmatch(rf"(.*/)?{CHECKPOINTS}/(\d+)/.*", name)
    return (match[1] or "", int(match[2])) if match else None


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns
