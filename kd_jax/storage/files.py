"""Files that are written whole or not at all, and storage errors as one paragraph.

The paragraph of an error has the path, the cause, and the space that is left on the file system of the path.
"""

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from kd_jax.storage import untrusted

Json = dict[str, Any]  # an object of a JSON file; the reader checks the values that are used
AnyPath = str | PathLike[str]  # pathlib.Path, epath.Path, or a string

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# The texts of the operating system's errors, as errors of libraries quote them.
FULL_TEXT = re.compile(r"No space left on device|Disk quota exceeded|File too large|\b(ENOSPC|EDQUOT|EFBIG)\b")


class StorageError(OSError):
    """A storage failure. The message is a paragraph that names the path."""


@contextlib.contextmanager
def storing(path: AnyPath) -> Iterator[None]:
    """Turns any error in a block into a paragraph. This is for blocks that only read or write.

    Args:
      path: the path that is read or written.

    Raises:
      StorageError: an error occurred. A ValueError is passed on unchanged, because it already explains the cause,
        unless it comes from a full disk.
    """
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        if isinstance(error, ValueError) and not is_full(error):
            raise
        raise StorageError(_paragraph(path, error)) from error


@contextlib.contextmanager
def room(path: AnyPath) -> Iterator[None]:
    """Turns the error of a full disk into a paragraph, and no other error. This is for blocks that also compute.

    Args:
      path: the path that is written. The message names this path if the error names no path.

    Raises:
      StorageError: the disk is full.
    """
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        if not is_full(error):
            raise
        raise StorageError(_paragraph(getattr(error, "filename", None) or path, error)) from error


def is_full(error: BaseException | None) -> bool:
    """Returns True if an error, or a cause of it, is about a full disk, a quota, or a limit on a file's size."""
    while error is not None:
        if (isinstance(error, OSError) and error.errno in FULL) or FULL_TEXT.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _paragraph(path: AnyPath, error: BaseException) -> str:
    """Returns the message for an error with a path."""
    cause = " ".join(str(error).split())[-300:] or type(error).__name__
    if is_full(error):
        return f"{path} could not be written: {cause}. {space_left(path)}Make room, and call again."
    return f"{path} could not be read or written ({type(error).__name__}: {cause})."


def space_left(path: AnyPath) -> str:
    """Returns a sentence on the free space of a path's file system, followed by a space; "" for an address."""
    if "://" in str(path):
        return ""
    folder = Path(str(path)).expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    return f"On the file system of {folder} {shutil.disk_usage(folder).free / 2**20:,.1f} MiB are left. "


def write_whole(path: AnyPath, content: str | bytes) -> None:
    """Writes a file completely, or not at all. Missing parent folders are created. Text is written as UTF-8.

    Raises:
      StorageError: the file cannot be written; the message names the path.
    """
    with storing(path), writing_whole(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def writing_whole(path: AnyPath) -> Iterator[Path]:
    """Yields a temporary path, at which the caller writes a file or a folder. It is renamed to `path` at the end.

    After any error, an interrupt included, the temporary file or folder is removed and `path` is unchanged. A killed
    process leaves the temporary path, whose name `is_partial` recognises. Errors of the block are passed on unchanged;
    `storing` or `room` turns them into paragraphs.

    Args:
      path: the final path. An existing file or an empty folder there is replaced.

    Raises:
      StorageError: the parent folder cannot be created, or the result cannot be renamed; the message names `path`.
    """
    path = Path(path)
    # Processes that write the same path at the same time must not write into the same temporary file.
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(partial)  # a killed process with the same number may have left this path
    try:
        yield partial
        with storing(path):
            partial.replace(path)
    finally:
        _remove(partial)


def is_partial(path: Path) -> bool:
    """Returns True if `writing_whole` makes such a name, so that a killed process may have left the path."""
    return re.search(r"\.partial-\d+$", path.name) is not None


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_json_lines(path: AnyPath, lines: Iterable[object]) -> None:
    """Writes a file with one JSON value per line, completely or not at all.

    Raises:
      StorageError: the file cannot be written; the message names the path.
    """
    write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))


def read_json_lines(path: Path, appended: bool = False) -> list[Any]:
    """Returns the values of a file with one JSON value per line, as kd_jax writes them.

    A file to which a run appends may end with an incomplete line, because the run was killed. This line is ignored, and
    the run writes the line again. A file that was written at once has no incomplete line.

    Args:
      path: the file.
      appended: True if a run appends to the file line by line. With False, every line must be complete.

    Raises:
      ValueError: a line is not JSON; the message names the file and the line.
    """
    content = path.read_bytes()
    lines = content[: content.rfind(b"\n") + 1 if appended else None].splitlines()
    return [untrusted.parse_json(line, f"{path}:{number}", finite=False) for number, line in enumerate(lines, start=1)]
