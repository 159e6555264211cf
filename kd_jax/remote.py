"""Folders and files on an object store (gs://, s3://): whatever appends, renames or locks works in a local folder beside it.

The only module that knows of addresses. A run works in a temporary folder, which is copied to its address while it goes on:
no file there is ever appended to, and the run does not wait for the store. Checkpoints on gs:// are left to orbax, which writes
each host's part there by itself; it has no s3://, where they are copied as everything else.
"""

import contextlib
import glob
import hashlib
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec

EVERY = 60.0  # seconds between looks at what is to be copied
CHECKPOINTS = "checkpoints"
UNREAD = ("tensorboard", "profile")  # of a work directory: what a run that goes on only adds to
HEAVY = (*UNREAD, CHECKPOINTS, "student")  # what a page of it needs nothing of
UNFINISHED = (".orbax-checkpoint-tmp", ".partial")  # in the name of what will have another one
LOCK = "lock"
PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "s3a": "s3fs"}


def is_remote(path: Any) -> bool:
    """Whether a path is an address."""
    return "://" in str(path)


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system of an address, and the path in it.

    Raises:
      ValueError: no such kind of address, or the package that knows it is not installed.
    """
    scheme = url.partition("://")[0]
    try:
        system, root = fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = PACKAGES.get(scheme, "")
        hint = f"pip install {package}" if package else str(error)
        raise ValueError(f"{url}: {scheme}:// needs a package that is not installed: {hint}.") from error
    return system, root.rstrip("/")


@contextlib.contextmanager
def work_directory(
    url: str, processes: int = 1, writes: bool = True, unread: tuple[str, ...] = UNREAD
) -> Iterator[tuple[str, str]]:
    """A folder to work in that stands for a work directory, and where its checkpoints go.

    What is there is fetched first; what is new is copied while the caller works and, all of it, at the end.

    Args:
      url: an address, or a local path, which stands for itself.
      processes: of the run.
      writes: whether this process is the one that copies to the address.
      unread: folders in it that are not fetched.

    Raises:
      ValueError: an address that cannot be used, or that has something else.
      OSError: what is new could not be copied; it is named, and stays in the temporary folder.
    """
    if not is_remote(url):
        yield url, url
        return
    url = url.rstrip("/")
    scheme, _, path = url.partition("://")
    by_orbax = scheme in ("gs", "gcs")
    if processes > 1 and not by_orbax:
        raise ValueError(
            f"--workdir={url}: the checkpoints of several processes can go to gs:// or to a folder that all share, but not to "
            f"{scheme}://, which orbax cannot write to."
        )
    system, root = filesystem(url)
    if not system.exists(f"{root}/config.json") and system.exists(root) and system.ls(root):
        raise ValueError(f"the work directory {url} has something else in it; choose an empty or a new one.")
    temporary = tempfile.mkdtemp(prefix="kd_jax-")
    folder = Path(temporary) / path  # so that what is said of it says what is meant
    skipped = (CHECKPOINTS,) if by_orbax else ()
    copy = Copy(system, root, folder, skipped)
    copy.pull(unread)
    with copy.kept_up() if writes else contextlib.nullcontext():
        yield str(folder), url if by_orbax else str(folder)
    shutil.rmtree(temporary)


class Copy:
    """A local folder and its copy at an address."""

    def __init__(
        self, system: Any, root: str, folder: Path, skipped: tuple[str, ...] = (), parts: tuple[str, ...] = UNFINISHED
    ):
        """Copies nothing yet, and never what is in the folder's folders `skipped` or has one of the `parts` in its name."""
        self._system, self._root, self._folder, self._skipped, self._parts = system, root, folder, skipped, parts
        self._there: dict[str, tuple[int, int]] = {}  # name -> size and time of what was copied

    def pull(self, unread: tuple[str, ...] = ()) -> None:
        """Fetches everything but the folders `unread`.

        Raises:
          ValueError: an object would come to lie outside the folder.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        self._system.invalidate_cache()
        for path in self._system.find(self._root):
            name = path.removeprefix(self._root).lstrip("/")
            if not name or name.partition("/")[0] in (*unread, *self._skipped):
                continue
            if ".." in name.split("/"):
                raise ValueError(f"{path} has a name that leads out of {self._root}; delete it there, or rename it.")
            target = self._folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            self._system.get_file(path, str(target))
            self._there[name] = _stamp(target)

    def push(self) -> None:
        """Copies what is new or changed; of a checkpoint that is gone here what is there goes once a newer one is whole there."""
        # First what checkpoints there are and then the rest: what metrics.jsonl has is never behind a checkpoint.
        names = set(self._files())
        for name in sorted(names, key=lambda name: (_of_checkpoint(name), name)):
            try:
                stamp = _stamp(self._folder / name)
                if self._there.get(name) != stamp:
                    self._system.makedirs(f"{self._root}/{name}".rpartition("/")[0], exist_ok=True)
                    self._system.put_file(str(self._folder / name), f"{self._root}/{name}")
                    self._there[name] = stamp
            except FileNotFoundError:
                if (self._folder / name).exists():
                    raise  # what is not found is the bucket
        # A step that came or went meanwhile may be there in part: the list of its files is then another one by now.
        changed = {_step(name) for name in names ^ set(self._files())}
        newest = dict(sorted(step for step in {_step(name) for name in names} - changed if step))
        for name in self._there.keys() - names:
            if (step := _step(name)) and step[1] <= newest.get(step[0], -1):
                with contextlib.suppress(FileNotFoundError):
                    self._system.rm_file(f"{self._root}/{name}")
                del self._there[name]

    @contextlib.contextmanager
    def kept_up(self) -> Iterator[None]:
        """Pushes every minute from a thread, and whatever happens at the end."""
        ended = threading.Event()

        def follow() -> None:
            while not ended.wait(EVERY):
                with contextlib.suppress(Exception):  # the network's, perhaps: the next time, or the last, tells
                    self.push()

        thread = threading.Thread(target=follow, name="kd_jax.remote", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            try:
                self.push()
            except Exception as error:  # each store has its own
                raise OSError(
                    f"{self._folder} could not be copied to {self._root}; it is still there: "
                    f"{' '.join(str(error).split())[-300:]}"
                ) from error

    def _files(self) -> list[str]:
        found = (path for path in self._folder.rglob("*") if path.is_file())
        names = (path.relative_to(self._folder).as_posix() for path in found)
        return [
            name
            for name in names
            if name.partition("/")[0] not in (*self._skipped, LOCK) and not any(part in name for part in self._parts)
        ]


def _of_checkpoint(name: str) -> bool:
    return f"/{CHECKPOINTS}/" in f"/{name}"


def _step(name: str) -> tuple[str, int] | None:
    """Of a checkpoint's file the folder of checkpoints and the step."""
    found = re.fullmatch(rf"(.*/)?{CHECKPOINTS}/(\d+)/.*", name)
    return (found[1] or "", int(found[2])) if found else None


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def stand_in(url: str) -> Path:
    """A local folder that is the same for the same address, and stays."""
    return Path("~/.cache/kd_jax/remote").expanduser() / hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:12]


def local_folder(path: str | Path) -> Path:
    """A folder that is read where it lies, part by part.

    Raises:
      ValueError: an address.
    """
    if is_remote(path):
        raise ValueError(
            f"{path} is an address; models and a teacher's cache are read from folders of this machine. Copy it first, such as by "
            f"gcloud storage cp -r, or aws s3 cp --recursive."
        )
    return Path(path).expanduser()


def local_file(path: str | Path) -> Path:
    """A file as one can open it: of an address a copy, fetched where what is there is not what was fetched before.

    Raises:
      ValueError: there is no such file at the address.
    """
    if not is_remote(path):
        return Path(path).expanduser()
    system, root = filesystem(str(path))
    system.invalidate_cache()
    if not system.isfile(root):
        raise ValueError(f"there is no file {path}.")
    # ukey is a store's own mark of a content.
    target = stand_in(str(path)) / str(system.ukey(root))[:12] / root.rpartition("/")[2]
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.{os.getpid()}")
        system.get_file(root, str(partial))
        partial.replace(target)
    return target


def matches(pattern: str) -> list[str]:
    """The files, here or at an address, that a pattern such as 'books/*.txt' fits, in order."""
    if not is_remote(pattern):
        return sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))
    system, root = filesystem(pattern)
    return sorted(map(system.unstrip_protocol, system.glob(root)))


@contextlib.contextmanager
def folder_beside(path: str | Path, writes: bool = True) -> Iterator[Path]:
    """A folder to write in, a file after the other; of an address a local one that stays, fetched and kept up as a run's is."""
    if not is_remote(path):
        yield Path(path).expanduser()
        return
    copy = Copy(*filesystem(str(path)), stand_in(str(path)), parts=())
    if writes:
        copy.pull()
    with copy.kept_up() if writes else contextlib.nullcontext():
        yield stand_in(str(path))


def fetch_folder(url: str, folder: Path, sign: str) -> None:
    """The folder at an address, whole or not at all: it is whole where it has the file `sign`."""
    system, root = filesystem(url)
    system.invalidate_cache()
    if system.exists(f"{root}/{sign}"):
        folder = Path(os.fspath(folder))
        partial = folder.with_name(f"{folder.name}.{os.getpid()}")
        Copy(system, root, partial).pull()
        partial.replace(folder)


def store_folder(folder: Path, url: str, sign: str) -> None:
    """The reverse of `fetch_folder`; `sign` goes last."""
    system, root = filesystem(url)
    for path in sorted(folder.iterdir(), key=lambda path: path.name == sign):
        system.makedirs(root, exist_ok=True)
        system.put_file(str(path), f"{root}/{path.name}")
