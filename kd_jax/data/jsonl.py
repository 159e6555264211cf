"""Prompts and responses of the user's own, from files with one JSON object per line."""

import codecs
import gzip
import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from kd_jax.storage import checksum, remote, untrusted
from kd_jax.storage.checksum import file_digest
from kd_jax.storage.files import Json

MAX_LINE = 16 * untrusted.MIB
MAX_BLANK = 10_000
ROW = ("name", "prompt", "context", "response")  # the columns that every row of a built dataset has
MAX_RATIO = 200  # the compression ratio of text is 3 to 20; gzip can reach 1,000


def source(
    path: str,
    prompt_field: str = "prompt",
    response_field: str = "response",
    context_field: str = "",
    validation_path: str = "",
    validation_fraction: float = 0.02,
    columns: tuple[str, ...] = (),
) -> tuple[str, dict[str, Callable[[], Iterable[dict[str, str]]]]]:
    """Returns the fingerprint and the splits train and validation of a JSON-lines file.

    Args:
      path: a .jsonl or .jsonl.gz file, as a local path or an address.
      prompt_field: the name of the prompt's field.
      response_field: the name of the response's field.
      context_field: the name of the context's field; empty if there is no context.
      validation_path: a file of held-out rows. If empty, a part of `path` is held out.
      validation_fraction: the share of `path` that is held out, in [0, 1), chosen by a hash of the prompt. Above 0,
        each split has at least one prompt, provided that there are two different prompts. With 0 nothing is held out.
      columns: the names of further fields, which become columns of the same name. A number or a boolean becomes its
        JSON text, such as 3, 0.5 or true.

    Raises:
      ValueError: a file does not exist, a line is not JSON, a row lacks a field, the share is out of range, or a name
        in `columns` is reserved, empty or repeated.
    """
    check_share(validation_fraction, validation_path)
    check_columns(columns)
    fields = {"prompt": prompt_field, "response": response_field}
    if context_field:
        fields["context"] = context_field
    settings = (fields, validation_fraction if not validation_path else "", "at least one")
    fields = fields | {column: column for column in columns}
    files = [remote.local_file(p) for p in (path, validation_path) if p]
    # Without further columns the text is the one of earlier versions, so that their built datasets stay valid.
    fingerprint = digest(files, str((*settings, tuple(columns)) if columns else settings))
    read_rows = lambda file: read(file, fields, scalars=tuple(columns))

    def rows(held_out: bool) -> Iterator[dict[str, str]]:
        if validation_path:
            yield from read_rows(files[held_out])
            return
        parts = divide((fraction(row["prompt"]) for row in read_rows(files[0])), {"validation": validation_fraction})
        low, high = parts["validation" if held_out else "train"]
        yield from (row for row in read_rows(files[0]) if low <= fraction(row["prompt"]) < high)

    return fingerprint, {"train": lambda: rows(False), "validation": lambda: rows(True)}


def check_share(validation_fraction: float, validation_path: str | tuple[str, ...]) -> None:
    """Checks that the share of held-out rows is in [0, 1). The share is not used if a file of held-out rows is named.

    Raises:
      ValueError: the share is used and out of range.
    """
    if not validation_path and not 0 <= validation_fraction < 1:
        raise ValueError(
            f"data.options.validation_fraction={validation_fraction} must be at least 0 and below 1; 0 holds nothing out."
        )


def check_columns(columns: Sequence[str]) -> None:
    """Checks the names of further columns.

    Raises:
      ValueError: a name is one of `ROW`, is empty, or occurs twice.
    """
    for index, column in enumerate(columns):
        if not column or column in ROW or column in columns[:index]:
            problem = "is empty" if not column else "is reserved" if column in ROW else "occurs twice"
            raise ValueError(
                f"data.options.columns={tuple(columns)!r}: the name {column!r} {problem}; name further fields of the file, "
                f"other than {', '.join(ROW)}."
            )


def divide(fractions: Iterable[float], shares: dict[str, float]) -> dict[str, tuple[float, float]]:
    """Returns for each split the range of `fraction` that belongs to the split: [low, high).

    The ranges are adjacent and begin at 0. The split `train` has the rest, up to 1. With many texts, each split has
    about the requested share. With few texts, the ranges are moved so that each split has at least one text, in the
    order `train`, `validation`, other splits.

    Args:
      fractions: the fractions of all texts; equal texts may occur several times.
      shares: the requested share of each split; a split with the share 0 stays empty.

    Example:
      >>> divide([0.2, 0.5, 0.9], {"validation": 0.25})
      {'validation': (0.0, 0.25), 'train': (0.25, 1.0)}
      >>> divide([0.2, 0.5, 0.9], {"validation": 0.95})
      {'validation': (0.0, 0.9), 'train': (0.9, 1.0)}
    """
    known = np.unique(np.fromiter(fractions, float))
    wanted = sorted((split for split, share in shares.items() if share > 0), key=lambda split: split != "validation")
    to_fill = wanted[: max(len(known) - 1, 0)]
    ranges, low, nominal = {}, 0.0, 0.0
    for split, share in shares.items():
        nominal, high = nominal + share, low
        if split in to_fill:
            to_fill.remove(split)
            first, last = known[np.searchsorted(known, low)], known[len(known) - 1 - len(to_fill)]
            high = min(max(nominal, math.nextafter(first, 1)), float(last))
        ranges[split] = (low, high)
        low = high
    return ranges | {"train": (low, 1.0)}


def read(
    path: Path,
    fields: dict[str, str],
    several: tuple[str, ...] = (),
    scalars: tuple[str, ...] = (),
    optional: tuple[str, ...] = (),
) -> Iterator[Json]:
    """Yields the rows of a file.

    Args:
      path: the file.
      fields: the name of a field in kd_jax -> the name of the field in the file.
      several: the names in kd_jax of the fields whose value may also be a non-empty list of strings.
      scalars: the names in kd_jax of the fields whose value may also be a finite number or a boolean, which becomes its
        JSON text.
      optional: the names in kd_jax of the fields that may be missing, which then are empty.

    Raises:
      ValueError: a row is not a JSON object, or a field is missing or has the wrong type; the message names the file
        and the line.
    """
    for number, line in _lines(path):
        where = f"{path}:{number}"
        # NaN is allowed in fields that are not read here, because Python can write it.
        row = untrusted.parse_json(line, where, finite=False)
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected a JSON object, found {type(row).__name__}.")
        values = {}
        for ours, field in fields.items():
            value = row.get(field, "" if ours in optional else None)
            if ours in scalars and (isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))):
                value = json.dumps(value)
            many = ours in several and isinstance(value, list) and value and all(isinstance(v, str) for v in value)
            if not isinstance(value, str) and not many:
                kinds = "a string, a finite number or a boolean" if ours in scalars else "a string"
                problem = f"is {untrusted.printable(row[field])}, not {kinds}" if field in row else "is missing"
                names = untrusted.clip(", ".join(row))
                raise ValueError(f"{where}: the field {field!r} {problem}; the row has {names}.")
            if not all(map(_is_text, value if many else [value])):
                raise ValueError(f"{where}: the field {field!r} has half of a surrogate pair, which is no character.")
            values[ours] = value
        yield values


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields the number and the bytes of each line that is not blank.

    A compressed file may expand at most `MAX_RATIO`-fold, or to 1 MiB, because text never compresses that well.
    """
    compressed = path.suffix == ".gz"
    try:
        limit = max(untrusted.MIB, MAX_RATIO * path.stat().st_size) if compressed else math.inf
        total = number = blank = 0
        with gzip.open(path) if compressed else path.open("rb") as file:
            while line := file.readline(MAX_LINE + 1):
                untrusted.refuse_pointer(path, line)
                number, total = number + 1, total + len(line)
                line = (
                    line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                )  # Windows writes this byte order mark
                if len(line) > MAX_LINE:
                    raise ValueError(f"{path}:{number}: the line is longer than {MAX_LINE} bytes.")
                if total > limit:
                    raise ValueError(
                        f"{path}: the file unpacks to more than {MAX_RATIO} times its size, and no text does that. If you trust "
                        f"the file, unpack it by hand."
                    )
                blank = 0 if line.strip() else blank + 1
                if blank > MAX_BLANK:
                    raise ValueError(f"{path}:{number}: more than {MAX_BLANK} blank lines in a row end here.")
                if not blank:
                    yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read ({error}); the file may be incomplete.") from error


def _is_text(value: str) -> bool:
    """Returns True if a string can be encoded in UTF-8."""
    try:
        return value.isascii() or bool(value.encode())
    except UnicodeEncodeError:
        return False


def read_references(path: Path, fields: dict[str, str]) -> Iterator[Json]:
    """Yields the rows of a file with context and references.

    Args:
      path: the file.
      fields: the argument of `read`. The field of the references is a text or a list of texts.
    """
    for row in read(path, fields, several=("references",)):
        references = row["references"]
        yield {"context": "", **row, "references": [references] if isinstance(references, str) else references}


def digest(files: list[Path], settings: str) -> str:
    """Returns a fingerprint of the files' contents and of the settings with which they are read.

    Raises:
      ValueError: a file does not exist or cannot be read.
    """
    digests = []
    for path in files:
        if not path.is_file():
            raise ValueError(f"there is no file {path}.")
        try:
            with path.open("rb") as file:
                untrusted.refuse_pointer(path, file.read(len(untrusted.LFS)))
            digests.append(bytes.fromhex(file_digest(path)))
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror}).") from error
    return checksum.digest(settings, *digests)[:12]


def fraction(text: str) -> float:
    """Returns a number in [0, 1) that depends only on the text. It decides the split of a row."""
    return int(checksum.digest(text)[:12], 16) / 2**48
