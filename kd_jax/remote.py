"""Folders and files on an object store (gs://, s3://): whatever appends, renames or locks works in a local folder beside it.

The only module that knows of addresses. A run works in a temporary folder, which is copied to its address while it goes on:
no file there is ever appended to, and the run waits for the store only before a checkpoint. Checkpoints on gs:// are left to
orbax, which writes each host's part there by itself; it has no s3://, where they are copied as everything else.
"""

import contextlib
import glob
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import fsspec

from kd_jax import remote_lease
from kd_jax.remote_copy import CHECKPOINTS, Copy
from kd_jax.storage import storing

UNREAD = ("tensorboard", "profile", "nonfinite")  # of a work directory: what a run that goes on only adds to
HEAVY = (*UNREAD, CHECKPOINTS, "student")  # what a page of it needs nothing of
BY_ORBAX = ("gs", "gcs")  # what it writes to by itself
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


class Place(NamedTuple):
    """What the folder that a run works in stands for.

    Attributes:
      url: the work directory as it was given.
      shared: where all processes write together: checkpoints, and a state whose next step was not finite.
      store: copies what is new now, or raises OSError; nothing where another process copies, or nobody has to.
    """

    url: str
    shared: str
    store: Callable[[], None]


@contextlib.contextmanager
def work_directory(
    url: str, processes: int = 1, writes: bool = True, unread: tuple[str, ...] = UNREAD, alone: bool = True
) -> Iterator[tuple[str, Place]]:
    """A folder to work in that stands for a work directory, and what it stands for.

    What is there is fetched first; what is new is copied while the caller works, when it asks for that, and at the end. A store
    that fails is said at once. Who asks waits for it for PATIENCE seconds, and then fails: a run does so before each
    checkpoint, so that none goes on without being stored.

    Args:
      url: an address, or a local path, which stands for itself.
      processes: of the run.
      writes: whether this process is the one that copies to the address.
      unread: folders in it that are not fetched.
      alone: whether who writes to the address keeps others out: see `remote_lease`. In a folder `directory.alone` does.

    Raises:
      ValueError: an address that cannot be used, that has something else, or that another run is in.
      OSError: what is new could not be copied; it is named, and stays in the temporary folder, which else goes.
    """
    if not is_remote(url):
        yield url, Place(url, url, lambda: None)
        return
    url = url.rstrip("/")
    scheme, _, path = url.partition("://")
    by_orbax = scheme in BY_ORBAX
    if processes > 1 and not by_orbax:
        raise ValueError(
            f"--workdir={url}: the checkpoints of several processes can go to gs:// or to a folder that all share, but not to "
            f"{scheme}://, which orbax cannot write to."
        )
    system, root = filesystem(url)
    with storing(url):
        there = {path.rpartition("/")[2] for path in system.ls(root, detail=False)} if system.exists(root) else set()
    if "config.json" not in there and there - {remote_lease.LOCK}:
        raise ValueError(f"the work directory {url} has something else in it; choose an empty or a new one.")
    with remote_lease.held(system, root, url) if writes and alone else contextlib.nullcontext(lambda: None) as check:
        temporary = tempfile.mkdtemp(prefix="kd_jax-")
        folder = Path(temporary) / path.lstrip("/")  # so that what is said of it says what is meant
        copy = Copy(system, root, folder, (CHECKPOINTS,) if by_orbax else (), check=check)
        place = Place(url, url if by_orbax else str(folder), copy.store if writes else lambda: None)
        try:
            copy.pull(unread)
            with copy.kept_up() if writes else contextlib.nullcontext():
                yield str(folder), place
        finally:
            if not copy.problem:
                shutil.rmtree(temporary)


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
    with storing(path):
        system.invalidate_cache()
        if not system.isfile(root):
            raise ValueError(f"there is no file {path}.")
        # ukey is a store's own mark of a content.
        target = stand_in(str(path)) / str(system.ukey(root))[:12] / root.rpartition("/")[2]
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.{os.getpid()}")
        with storing(partial):
            system.get_file(root, str(partial))
            partial.replace(target)
    return target


def matches(pattern: str) -> list[str]:
    """The files, here or at an address, that a pattern such as 'books/*.txt' fits, in order."""
    if not is_remote(pattern):
        return sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))
    system, root = filesystem(pattern)
    with storing(pattern):
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
    with storing(url):
        system.invalidate_cache()
        is_whole = system.exists(f"{root}/{sign}")
    if is_whole:
        folder = Path(os.fspath(folder))
        partial = folder.with_name(f"{folder.name}.{os.getpid()}")
        Copy(system, root, partial).pull()
        partial.replace(folder)


def store_folder(folder: Path, url: str, sign: str) -> None:
    """The reverse of `fetch_folder`; `sign` goes last."""
    system, root = filesystem(url)
    for path in sorted(folder.iterdir(), key=lambda path: path.name == sign):
        with storing(url):
            system.makedirs(root, exist_ok=True)
            system.put_file(str(path), f"{root}/{path.name}")
