"""Safe reading of files of other people: unambiguous JSON, and limits on the length of files and messages."""

import json
import math
import re
import reprlib
from pathlib import Path
from typing import Any, NoReturn

MIB = 2**20
LFS = b"version https://git-lfs.github.com/spec/"  # the beginning of a Git LFS pointer
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)  # ORG/NAME, as the Hugging Face hub names a model


def check_folder(folder: Path, named: str = "") -> None:
    """Checks that a folder exists.

    Args:
      folder: the folder.
      named: the setting that names the folder, such as 'teacher.path', for the message.

    Raises:
      ValueError: the folder does not exist, or is a file. If the name looks like a name on the Hugging Face hub, the
        message says how to write it.

    Example:
      >>> check_folder(Path("/nowhere/teacher"), "teacher.path")
      Traceback (most recent call last):
      ValueError: teacher.path: the folder /nowhere/teacher does not exist.
    """
    if folder.is_dir():
        return
    where, hint = f"{named}: " if named else "", ""
    if folder.exists():
        raise ValueError(f"{where}{folder} is a file; expected the folder that contains the file.")
    if HUB_NAME.fullmatch(str(folder)) and not folder.parent.is_dir():
        hint = f" If this is a name on the Hugging Face hub, write hf://{folder}."
    raise ValueError(f"{where}the folder {folder} does not exist.{hint}")


def refuse_pointer(file: Path, content: bytes) -> None:
    """Refuses a Git LFS pointer: a few lines of text in place of a file that was not downloaded.

    Args:
      file: the path, for the message.
      content: the first bytes of the file.

    Raises:
      ValueError: the content is a Git LFS pointer.
    """
    if content.startswith(LFS):
        raise ValueError(
            f"{file}: this is a Git LFS pointer, a few lines of text in place of the file. Run `git lfs pull` in the file's "
            "repository, or download the file again."
        )


def read_bytes(file: Path, limit: int) -> bytes:
    """Returns the bytes of a file. A file of more than `limit` bytes is refused before any byte is read.

    Symbolic links are followed, because caches consist of links. A person who can make a link can already read the
    target of the link.

    Raises:
      ValueError: the file does not exist, is too large, is a pipe or a device, is a Git LFS pointer, or cannot be read.
    """
    try:
        if not file.is_file():
            raise ValueError(f"{file}: cannot be read (there is no such file).")
        if (size := file.stat().st_size) > limit:
            raise ValueError(
                f"{file}: the file has {size} bytes; at most {limit} are read, many times the size of such a file."
            )
        content = file.read_bytes()
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror}).") from error
    refuse_pointer(file, content)
    return content


def read_text(file: Path, limit: int) -> str:
    """Returns the text of a UTF-8 file. The conditions of `read_bytes` apply."""
    return decoded(read_bytes(file, limit), file)


def decoded(content: bytes, file: Path) -> str:
    """Returns a file's content as text, decoded from UTF-8.

    Raises:
      ValueError: the content is not UTF-8; the message names the file.
    """
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: the content is not UTF-8 ({error}).") from error


def read_json(file: Path, limit: int = 4 * MIB) -> dict[str, Any]:
    """Returns the JSON object in a file of at most `limit` bytes.

    Raises:
      ValueError: the file cannot be read or contains no JSON object; the message names the file.
    """
    content = parse_json(read_bytes(file, limit), str(file))
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object, found {type(content).__name__}.")
    return content


def parse_json(text: bytes, where: str, *, finite: bool = True) -> Any:
    """Returns a JSON text as Python values. Text that two parsers could understand differently is refused.

    Args:
      text: the text, in UTF-8.
      where: the file, and if useful the line, for the message.
      finite: True to refuse NaN, Infinity and numbers too large for float64. Python writes such numbers, although they
        are not JSON.

    Raises:
      ValueError: the text is not JSON, an object has a key twice, the nesting is too deep, or an integer has thousands
        of digits.

    Example:
      >>> parse_json(b'{"a": 1, "a": 2}', "config.json")
      Traceback (most recent call last):
      ValueError: config.json: not valid JSON (the key 'a' appears twice in one object).
    """
    strict: dict[str, Any] = dict(parse_constant=_refuse, parse_float=_float) if finite else {}
    try:
        return json.loads(text.decode(), object_pairs_hook=_object, **strict)
    except RecursionError as error:
        raise ValueError(f"{where}: not valid JSON (it is nested too deeply).") from error
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON ({error}).") from error


def printable(value: object) -> str:
    """Returns `repr` of a value, truncated if it is long or deep, so that a message can quote any value.

    Example:
      >>> printable("x" * 1000), printable([[[[[[[[[]]]]]]]]])
      ("'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx...xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx'", '[[[[[[[...]]]]]]]')
    """
    return _REPR.repr(value)


_REPR = reprlib.Repr()
_REPR.maxstring, _REPR.maxother, _REPR.maxlong, _REPR.maxdict = 80, 80, 40, 8


def clip(text: str, length: int = 300) -> str:
    """Returns a text, truncated to a length that a message can quote."""
    return text if len(text) <= length else f"{text[:length]}..."


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {printable(repeated)} appears twice in one object")
    return fields


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


def _float(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise ValueError(f"the number {clip(digits, 40)} is too large")
    return value
