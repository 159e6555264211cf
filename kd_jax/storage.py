"""Failures of storage as one paragraph: the path, the cause, and the space that is left on its file system."""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# As the libraries' own errors quote the operating system's.
FULL_TEXT = re.compile(r"No space left on device|Disk quota exceeded|File too large|\b(ENOSPC|EDQUOT|EFBIG)\b")


class StorageError(OSError):
    """A failure of storage, said in a paragraph that names the path."""


@contextlib.contextmanager
def storing(path: Any) -> Iterator[None]:
    """Turns whatever a library of storage raises into a paragraph: for blocks that do nothing but read or write.

    Args:
      path: that is read or written.

    Raises:
      StorageError: in place of any error; a ValueError stays, which says itself what is wrong, unless a full disk led to it.
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
    """Turns an error of a full disk into a paragraph, and no other error: for blocks that also compute.

    Args:
      path: that is written, where the error names none.

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
    """Whether an error, or one that led to it, is that of a full disk, a quota, or a limit of a file's size."""
    while error is not None:
        if (isinstance(error, OSError) and error.errno in FULL) or FULL_TEXT.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def said(path: Any, error: BaseException) -> str:
    """The paragraph for an error with a path."""
    cause = " ".join(str(error).split())[-300:] or type(error).__name__
    if is_full(error):
        return f"{path} could not be written: {cause}. {space_left(path)}Make room, and call again."
    return f"{path} could not be read or written ({type(error).__name__}: {cause})."


def space_left(path: Any) -> str:
    """A sentence on the file system of a path, with a space behind; "" where it is an address."""
    if "://" in str(path):
        return ""
    folder = Path(str(path)).expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    return f"On the file system of {folder} {shutil.disk_usage(folder).free / 2**20:,.1f} MiB are left. "


def write_text(path: Path, text: str) -> None:
    """Writes a file in UTF-8, whole or not at all.

    Raises:
      StorageError: it cannot be written.
    """
    partial = path.with_name(f"{path.name}.partial.{os.getpid()}")
    with storing(path):
        try:
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
