"""The user's own prompts and responses: a JSON object a line."""

import codecs
import gzip
import hashlib
import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kd_jax import remote, untrusted
from kd_jax.checksum import file_digest

MAX_LINE = 16 * untrusted.MIB
MAX_BLANK = 10_000
MAX_RATIO = 200  # packed text has 3 to 20; gzip can reach 1,000


def source(
    path: str,
    prompt_field: str = "prompt",
    response_field: str = "response",
    context_field: str = "",
    validation_path: str = "",
    validation_fraction: float = 0.02,
) -> tuple[str, dict[str, Callable[[], Iterable[dict[str, str]]]]]:
    """Splits train and validation.

    Args:
      path: a .jsonl or .jsonl.gz file, here or at an address.
      prompt_field: the field of the prompt.
      response_field: the field of the response.
      context_field: the field of the context; empty: there is none.
      validation_path: a file of held-out rows; empty: a part of `path` is held out.
      validation_fraction: the share that is held out then, by a hash of the prompt. Above 0 both splits have at least one
        prompt's rows, if there are two prompts. With 0 nothing is held out.

    Raises:
      ValueError: a file that does not exist, a line that is not JSON, a row without its field, a share out of range.
    """
    check_share(validation_fraction, validation_path)
    fields = {"prompt": prompt_field, "response": response_field}
    if context_field:
        fields["context"] = context_field
    files = [remote.local_file(p) for p in (path, validation_path) if p]
    fingerprint = digest(files, str((fields, validation_fraction if not validation_path else "", "at least one")))

    def rows(held_out: bool) -> Iterator[dict[str, str]]:
        if validation_path:
            yield from read(files[held_out], fields)
            return
        parts = divide((fraction(row["prompt"]) for row in read(files[0], fields)), {"validation": validation_fraction})
        low, high = parts["validation" if held_out else "train"]
        yield from (row for row in read(files[0], fields) if low <= fraction(row["prompt"]) < high)

    return fingerprint, {"train": lambda: rows(False), "validation": lambda: rows(True)}


def check_share(validation_fraction: float, validation_path: Any) -> None:
    """Checks the share that is held out, which counts where no file of held-out rows is named."""
    if not validation_path and not 0 <= validation_fraction < 1:
        raise ValueError(
            f"data.options.validation_fraction={validation_fraction} must be at least 0 and below 1; 0 holds nothing out."
        )


def divide(fractions: Iterable[float], shares: dict[str, float]) -> dict[str, tuple[float, float]]:
    """The range of `fraction` of each split: what is at or above the first number and below the second.

    The splits are neighbours, from 0 up, and `train` has the rest. Of many texts each split has about its share. Of a few
    the ranges are moved so that each split has at least one text: `train` first, then `validation`, then the others.

    Args:
      fractions: of all texts; the same text may come again.
      shares: split -> its share; a split with the share 0 stays empty.

    Example:
      >>> divide([0.2, 0.5, 0.9], {"validation": 0.25})
      {'validation': (0.0, 0.25), 'train': (0.25, 1.0)}
      >>> divide([0.2, 0.5, 0.9], {"validation": 0.95})
      {'validation': (0.0, 0.9), 'train': (0.9, 1.0)}
    """
    known = np.unique(np.fromiter(fractions, float))
    wanted = sorted((split for split, share in shares.items() if share > 0), key=lambda split: split != "validation")
    kept = wanted[: max(len(known) - 1, 0)]
    ranges, low, nominal = {}, 0.0, 0.0
    for split, share in shares.items():
        nominal, high = nominal + share, low
        if split in kept:
            kept.remove(split)
            first, last = known[np.searchsorted(known, low)], known[len(known) - 1 - len(kept)]
            high = min(max(nominal, math.nextafter(first, 1)), float(last))
        ranges[split] = (low, high)
        low = high
    return ranges | {"train": (low, 1.0)}


def read(path: Path, fields: dict[str, str], several: tuple[str, ...] = ()) -> Iterator[dict[str, Any]]:
    """Rows of a file, each field a string, or of `several` a string or a list of them; errors name the file and the line."""
    for number, line in _lines(path):
        where = f"{path}:{number}"
        row = untrusted.parse_json(line, where, finite=False)  # Python writes NaN, and no field here is a number
        if not isinstance(row, dict):
            raise ValueError(f"{where}: a JSON object is expected, not {type(row).__name__}.")
        for ours, field in fields.items():
            value = row.get(field)
            many = ours in several and isinstance(value, list) and value and all(isinstance(v, str) for v in value)
            if not isinstance(value, str) and not many:
                what = f"is {untrusted.shown(row[field])}, not a string" if field in row else "is missing"
                names = untrusted.clip(", ".join(row))
                raise ValueError(f"{where}: the field {field!r} {what}; the row has {names}.")
            if not all(map(_is_text, value if many else [value])):
                raise ValueError(f"{where}: the field {field!r} has half of a surrogate pair, which is no character.")
        yield {ours: row[theirs] for ours, theirs in fields.items()}


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, and their numbers; of a compressed file no more than text ever has."""
    compressed = path.suffix == ".gz"
    try:
        limit = max(untrusted.MIB, MAX_RATIO * path.stat().st_size) if compressed else math.inf
        total = number = blank = 0
        with gzip.open(path) if compressed else path.open("rb") as file:
            while line := file.readline(MAX_LINE + 1):
                untrusted.refuse_pointer(path, line)
                number, total = number + 1, total + len(line)
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line  # Windows writes it before the text
                if len(line) > MAX_LINE:
                    raise ValueError(f"{path}:{number}: the line is longer than {MAX_LINE} bytes.")
                if total > limit:
                    raise ValueError(
                        f"{path}: it unpacks to more than {MAX_RATIO} times its size, which no text does; unpack it by hand if "
                        f"you trust it."
                    )
                blank = 0 if line.strip() else blank + 1
                if blank > MAX_BLANK:
                    raise ValueError(f"{path}:{number}: here are more than {MAX_BLANK} blank lines in a row.")
                if not blank:
                    yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read ({error}); is it whole?") from error


def _is_text(value: str) -> bool:
    try:
        return value.isascii() or bool(value.encode())
    except UnicodeEncodeError:
        return False


def read_references(path: Path, fields: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Rows of a file with their context and a list of references, whose field is a text or a list of texts."""
    for row in read(path, fields, several=("references",)):
        references = row["references"]
        yield {"context": "", **row, "references": [references] if isinstance(references, str) else references}


def digest(files: list[Path], settings: str) -> str:
    """A fingerprint of files' contents and of what is read from them."""
    total = hashlib.sha256(settings.encode())
    for path in files:
        if not path.is_file():
            raise ValueError(f"there is no file {path}.")
        try:
            with path.open("rb") as file:
                untrusted.refuse_pointer(path, file.read(len(untrusted.LFS)))
            total.update(bytes.fromhex(file_digest(path)))
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror}).") from error
    return total.hexdigest()[:12]


def fraction(text: str) -> float:
    """A number in [0, 1) that is the same for the same text everywhere: what divides rows into splits."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6]) / 2**48
