"""Folders and files on an object store (gs://, s3://).

Object stores cannot append, rename or lock. So a run works in a local temporary folder, which is copied to its address
while the run continues. The run waits for the store only before a checkpoint. On gs://, orbax writes the checkpoints:
each host writes its part directly to the address. orbax does not support s3://, so checkpoints are copied to s3:// like
all other files. Other modules handle addresses only through this module, and through `hub` for hf://, which is read and
never written.
"""

import contextlib
import glob
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import fsspec
from fsspec import AbstractFileSystem

from kd_jax.storage import hub, remote_lease, storing, writing_whole
from kd_jax.storage.checksum import digest
from kd_jax.storage.files import AnyPath
from kd_jax.storage.remote_copy import CHECKPOINTS, Copy

UNREAD = (
    "tensorboard",
    "wandb",
    "profile",
    "nonfinite",
)  # folders of a work directory that a resumed run does not read
HEAVY = (*UNREAD, CHECKPOINTS, "student")  # folders that a report page does not need
BY_ORBAX = ("gs", "gcs")  # the schemes of the addresses to which orbax writes checkpoints
PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "s3a": "s3fs"}


def is_remote(path: AnyPath) -> bool:
    """Returns True if a path is an address."""
    return "://" in str(path)


def filesystem(url: str) -> tuple[AbstractFileSystem, str]:
    """Returns fsspec's file system of an address, and the path in it.

    Raises:
      ValueError: the kind of address is unknown, its package is not installed, or the address is on the hub.
    """
    scheme = url.partition("://")[0]
    if hub.is_hub(url):
        raise ValueError(
            f"{url}: an address on the Hugging Face hub names a model or a dataset to read, and no place for results. Choose a "
            f"folder, gs:// or s3://; --config.push=hf://ORG/NAME uploads the student of a run."
        )
    try:
        system, root = fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = PACKAGES.get(scheme, "")
        hint = f"pip install {package}" if package else str(error)
        raise ValueError(f"{url}: {scheme}:// needs a package that is not installed: {hint}.") from error
    return system, root.rstrip("/")


class Place(NamedTuple):
    """The address or folder of a run, whose files the run writes to a local work folder.

    Attributes:
      url: the work directory as the user gave it.
      shared: the folder or address to which all processes write checkpoints, and the state before a step that was not
        finite.
      store: a function that copies new files immediately, or raises OSError. The function does nothing if another
        process copies, or if no copy is needed.
    """

    url: str
    shared: str
    store: Callable[[], None]


@contextlib.contextmanager
def work_directory(
    url: str, processes: int = 1, writes: bool = True, unread: tuple[str, ...] = UNREAD, alone: bool = True
) -> Iterator[tuple[str, Place]]:
    """Yields a local folder for a work directory, and the `Place` to which the folder is copied.

    The existing files are fetched first. New files are copied in the background while the caller works, when the caller
    calls `store`, and at the end. A failure of the store is printed immediately. `store` retries for PATIENCE seconds
    and then fails. A run calls `store` before each checkpoint, so that no run continues for long without a copy.

    Args:
      url: an address, or a local path, which is used in place without a copy.
      processes: the number of processes of the run.
      writes: True if this process copies to the address.
      unread: folders of the work directory that are not fetched.
      alone: True to exclude other runs from the address, by `remote_lease`. For a local folder, `directory.alone`
        excludes other runs.

    Raises:
      ValueError: the address cannot be used, has files that belong to no run, or is in use by another run.
      OSError: new files could not be copied; the message names the temporary folder. Only after this error does the
        folder remain.
    """
    if not is_remote(url):
        yield url, Place(url, url, lambda: None)
        return
    url = url.rstrip("/")
    scheme, _, path = url.partition("://")
    by_orbax = scheme in BY_ORBAX
    if processes > 1 and not by_orbax:
        raise ValueError(
            f"--workdir={url}: several processes can write checkpoints to gs:// or to a shared folder, but not to {scheme}://, "
            f"because orbax does not support {scheme}://."
        )
    system, root = filesystem(url)
    with storing(url):
        names = {path.rpartition("/")[2] for path in system.ls(root, detail=False)} if system.exists(root) else set()
    if "config.json" not in names and (unknown := names - {remote_lease.LOCK}):
        raise ValueError(
            f"the work directory {url} has files that belong to no run, such as {min(unknown)}; choose an empty or a new address."
        )
    with remote_lease.held(system, root, url) if writes and alone else contextlib.nullcontext(lambda: None) as check:
        temporary = tempfile.mkdtemp(prefix="kd_jax-")
        folder = Path(temporary) / path.lstrip("/")  # has the path of the address, so that messages are clear
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
    """Returns the permanent local folder of an address. The same address always has the same folder."""
    return Path("~/.cache/kd_jax/remote").expanduser() / digest(url.rstrip("/"))[:12]


def local_folder(path: AnyPath) -> Path:
    """Returns the path of a folder that is read in place, part by part.

    Raises:
      ValueError: the path is an address.
    """
    if hub.is_hub(path):
        raise ValueError(
            f"{path}: a teacher's cache is read from a folder of this machine; download it with hf download."
        )
    if is_remote(path):
        raise ValueError(
            f"{path} is an address; models and a teacher's cache are read from folders of this machine. Copy the folder first, "
            f"for example with gcloud storage cp -r or aws s3 cp --recursive."
        )
    return Path(path).expanduser()


def local_file(path: AnyPath) -> Path:
    """Returns a local path of a file. A file at an address is copied, unless a copy of the same content exists.

    Raises:
      ValueError: there is no such file at the address, or a file on the hub cannot be downloaded, as in `hub.data`.
      ConnectionError: the hub cannot be reached.
    """
    if not is_remote(path):
        return Path(path).expanduser()
    if hub.is_hub(path):
        if (local := hub.data(str(path))).is_dir():
            names = sorted(file.relative_to(local).as_posix() for file in local.rglob("*") if file.is_file())
            raise ValueError(f"{path} is a folder; name one of its files: {', '.join(names[:8]) or 'there are none'}.")
        return local
    system, root = filesystem(str(path))
    with storing(path):
        system.invalidate_cache()
        if not system.isfile(root):
            raise ValueError(f"there is no file {path}.")
        # ukey identifies the content, as the store sees it.
        target = stand_in(str(path)) / str(system.ukey(root))[:12] / root.rpartition("/")[2]
    if not target.exists():
        with storing(target), writing_whole(target) as partial:
            system.get_file(root, str(partial))
    return target


def matches(pattern: str) -> list[str]:
    """Returns the files, local or at an address, that match a pattern such as 'books/*.txt', in sorted order."""
    if not is_remote(pattern):
        return sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))
    if hub.is_hub(pattern):
        return hub.data_files(pattern)
    system, root = filesystem(pattern)
    with storing(pattern):
        return sorted(map(system.unstrip_protocol, system.glob(root)))


@contextlib.contextmanager
def folder_beside(path: AnyPath, writes: bool = True) -> Iterator[Path]:
    """Yields a folder in which one file after another is written.

    For an address, the folder is a permanent local folder. The files are fetched first and copied to the address, as in
    a run.

    Args:
      path: a local path or an address.
      writes: True if this process fetches and copies the files.
    """
    if not is_remote(path):
        yield Path(path).expanduser()
        return
    copy = Copy(*filesystem(str(path)), stand_in(str(path)), parts=())
    if writes:
        copy.pull()
    with copy.kept_up() if writes else contextlib.nullcontext():
        yield stand_in(str(path))


def fetch_folder(url: str, folder: Path, sign: str) -> None:
    """Fetches the folder at an address completely, or not at all.

    Args:
      url: the address.
      folder: the local folder.
      sign: the name of a file that only a complete folder has.
    """
    system, root = filesystem(url)
    with storing(url):
        system.invalidate_cache()
        is_complete = system.exists(f"{root}/{sign}")
    if is_complete:
        with writing_whole(folder) as partial:
            Copy(system, root, partial).pull()


def store_folder(folder: Path, url: str, sign: str) -> None:
    """Copies a folder to an address, from which `fetch_folder` reads the folder. The file `sign` is copied last."""
    system, root = filesystem(url)
    for path in sorted(folder.iterdir(), key=lambda path: path.name == sign):
        with storing(url):
            system.makedirs(root, exist_ok=True)
            system.put_file(str(path), f"{root}/{path.name}")
