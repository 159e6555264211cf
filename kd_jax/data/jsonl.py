"""Rows of the user's own, from files or folders in JSON lines, JSON, Parquet or Arrow: conversations, prompts or text."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from kd_jax.data import formats, shards
from kd_jax.storage import checksum, untrusted
from kd_jax.storage.checksum import file_digest
from kd_jax.storage.files import Json

PARTS = ("train", "validation")
VERSION = 1  # of the rows of conversations, instructions and texts
ROW = ("name", "prompt", "context", "response")  # the columns that every row of a built dataset has


def source(
    path: str,
    prompt_field: str = "",
    response_field: str = "",
    context_field: str = "",
    validation_path: str = "",
    validation_fraction: float = 0.02,
    columns: tuple[str, ...] = (),
    format: str = "auto",
    messages_field: str = "",
) -> tuple[str, dict[str, Callable[[], Iterable[dict[str, str]]]]]:
    """Returns the fingerprint and the splits of a file or of a folder of shards.

    The splits are train and validation, and those that the names of a folder's files name (`shards.splits_of`).

    Args:
      path: a file that ends in .jsonl, .json, .jsonl.gz, .json.gz, .parquet or .arrow, as a local path or an address;
        or a folder of such files, or a folder that the library `datasets` saved to disk.
      prompt_field: the name of the prompt's field; empty for the name of the format, which is prompt or instruction.
      response_field: the name of the response's field; empty for response, output or text.
      context_field: the name of the context's field; empty if there is no context.
      validation_path: a file or folder of held-out rows. If empty, and if no file of a folder is named for the split
        validation, a part of the split train is held out.
      validation_fraction: the share of `path` that is held out, in [0, 1), chosen by a hash of the prompt, or of
        a conversation's first turn of a user. Above 0, each split has at least one prompt, provided that there are two different
        prompts. With 0 nothing is held out.
      columns: the names of further fields, which become columns of the same name. A number or a boolean becomes its
        JSON text, such as 3, 0.5 or true.
      format: one of `formats.FORMATS`; auto to recognise the format by the fields of the first row.
      messages_field: the name of the field with the turns of a conversation; empty for messages or conversations.

    Raises:
      ValueError: a file does not exist, a line is not JSON, a row lacks a field, the share is out of range, or a name
        in `columns` is reserved, empty or repeated.
    """
    check_share(validation_fraction, validation_path)
    check_columns(columns)
    files = shards.splits_of(shards.local_path(path))
    if validation_path:
        files["validation"] = _all_files(shards.splits_of(shards.local_path(validation_path)))
    names = (format, prompt_field, response_field, context_field, messages_field)
    found = dataclasses.replace(_recognised(files, *names), columns=tuple(columns))
    held_out = "validation" not in files and "train" in files
    fingerprint = digest(_all_files(files), _settings(found, files, validation_fraction if held_out else ""))
    splits: dict[str, Callable[[], Iterable[dict[str, str]]]] = {
        split: partial(_rows, of_split, found) for split, of_split in files.items()
    }
    if held_out:
        splits |= {split: partial(_part, files["train"], found, validation_fraction, split) for split in PARTS}
    return fingerprint, splits


def _all_files(splits: dict[str, list[Path]]) -> list[Path]:
    return [file for files in splits.values() for file in files]


def format_of(
    path: str,
    format: str = "auto",
    prompt_field: str = "",
    response_field: str = "",
    context_field: str = "",
    messages_field: str = "",
    **others: object,
) -> formats.Format:
    """Returns the format of the rows of `source` with the same options. Only the first row is read.

    Args:
      path, format, prompt_field, response_field, context_field, messages_field: the arguments of `source`.
      **others: further arguments of `source`, which do not decide the format.

    Raises:
      ValueError: a file does not exist or cannot be read, or no format is recognised.
    """
    files = shards.splits_of(shards.local_path(path))
    return _recognised(files, format, prompt_field, response_field, context_field, messages_field)


def _recognised(files: dict[str, list[Path]], *names: str) -> formats.Format:
    """Returns the format of the first row of the files. The names are those of `formats.recognise`."""
    where, row = next(
        (row for of_split in files.values() for file in of_split for row in shards.checked_rows(file)), ("", {})
    )
    try:
        return formats.recognise(row, *names)
    except ValueError as error:
        raise ValueError(f"{where}: {error}" if where else str(error)) from error


def _settings(format: formats.Format, files: dict[str, list[Path]], share: float | str) -> str:
    """Returns the text of all options that decide the rows, for the fingerprint."""
    # For one file of prompts and responses the text is the one of earlier versions, so that built datasets stay valid.
    settings: tuple[object, ...] = (dict(format.fields), share, "at least one")
    if format.columns:
        settings = (*settings, format.columns)
    if format.name != "prompt_response":
        settings = (*settings, format.name, VERSION)
    sizes = {split: len(of_split) for split, of_split in files.items()}
    if any(size > 1 for size in sizes.values()) or not set(sizes) <= set(PARTS):
        settings = (*settings, sizes)
    return str(settings)


def _rows(files: Sequence[Path], format: formats.Format) -> Iterator[dict[str, str]]:
    """Yields the rows of some files, one file after another."""
    for file in files:
        of_file = dataclasses.replace(format, nulls=shards.is_columnar(file))
        for where, row in shards.checked_rows(file):
            yield formats.row_of(row, where, of_file)


def _part(files: Sequence[Path], format: formats.Format, share: float, split: str) -> Iterator[dict[str, str]]:
    """Yields the rows of the split train without the held-out rows, or the held-out rows."""
    low, high = divide((_fraction(row) for row in _rows(files, format)), {"validation": share})[split]
    yield from (row for row in _rows(files, format) if low <= _fraction(row) < high)


def _fraction(row: dict[str, str]) -> float:
    """Returns `fraction` of a row's prompt, of the first turn of a user in a conversation, or of a plain text."""
    if messages := row.get(formats.MESSAGES):
        return fraction(formats.first_words(json.loads(messages)))
    return fraction(row["prompt"] or row["response"])


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
      path: the file, in a format of `shards`.
      fields, several, scalars, optional: the arguments of `formats.values_of`.

    Raises:
      ValueError: a row is not a JSON object, or a field is missing or has the wrong type; the message names the file
        and the line.
    """
    for where, row in shards.checked_rows(path):
        yield formats.values_of(row, where, fields, several=several, scalars=scalars, optional=optional)


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
