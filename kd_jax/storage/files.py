"""Storage errors as one paragraph: the path, the cause, and the space that is left on the file system of the path."""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# The texts of the operating system's errors, as errors of libraries quote them.
FULL_TEXT = re.compile(r"No space left on device|Disk quota exceeded|File too large|\b(ENOSPC|EDQUOT|EFBIG)\b")


class StorageError(OSError):
    """A storage failure. The message is a paragraph that names the path."""


@contextlib.contextmanager
def storing(path: Any) -> Iterator[None]:
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
        raise StorageError(said(path, error)) from error


@contextlib.contextmanager
def room(path: Any) -> Iterator[None]:
    """Turns the error of a full disk into a paragraph, and no other error. This is for blocks that also compute.

    Args:
      path: the path that is written, used if the error names none.

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
        raise StorageError(said(getattr(error, "filename", None) or path, error)) from error


def is_full(error: BaseException | None) -> bool:
    """Returns True if an error, or a cause of it, is about a full disk, a quota, or a limit on a file's size."""
    while error is not None:
        if (isinstance(error, OSError) and error.errno in FULL) or FULL_TEXT.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def said(path: Any, error: BaseException) -> str:
    """Returns the paragraph for an error with a path."""
    cause = " ".join(str(error).split())[-300:] or type(error).__name__
    if is_full(error):
        return f"{path} could not be written: {cause}. {space_left(path)}Make room, and call again."
    return f"{path} could not be read or written ({type(error).__name__}: {cause})."


def space_left(path: Any) -> str:
    """Returns a sentence on the free space of a path's file system, followed by a space; "" for an address."""
    if "://" in str(path):
        return ""
    folder = Path(str(path)).expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    return f"On the file system of {folder} {shutil.disk_usage(folder).free / 2**20:,.1f} MiB are left. "


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file completely, or not at all.

    Raises:
      StorageError: the file cannot be written.
    """
    partial = path.with_name(f"{path.name}.partial.{os.getpid()}")
    with storing(path):
        try:
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
