"""Files of rows: JSON lines, JSON, Parquet and Arrow, as one file or as a folder of shards.

A folder is a folder that the `datasets` library saved to disk, or any folder with files of one of these formats. The
names of the files say to which split a file belongs: `train-00000-of-00002.parquet` or `test.jsonl`.
"""

import codecs
import contextlib
import gzip
import itertools
import json
import math
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from kd_jax.storage import hub, remote, untrusted
from kd_jax.storage.files import Json

MAX_LINE = 16 * untrusted.MIB
MAX_BLANK = 10_000
MAX_RATIO = 200  # the compression ratio of text is 3 to 20; gzip can reach 1,000
CHUNK = untrusted.MIB  # characters of a JSON array that are read at a time
BATCH = 256  # rows of a Parquet or Arrow file that are Python objects at a time

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".arrow")
# JSON files beside the data that are not data.
ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json", "metadata.json")
SHARD = re.compile(r"(?P<split>.+?)-\d{5}-of-\d{5}(-\w+)?")
SPLIT = re.compile(r"(train|validation|valid|val|dev|test)([_.-].*)?")
NAMES_OF_VALIDATION = ("valid", "val", "dev")
SPACE = re.compile(r"[ \t\r\n]*")


def local_path(path: str) -> Path:
    """Returns the local file or folder of an option such as `path`. A file at an address is copied first, and
    files on the Hugging Face hub are downloaded.

    Raises:
      ValueError: there is no such file or folder, or the address is that of a folder.
    """
    found = hub.data(path) if hub.is_hub(path) else remote.local_file(path)
    if not found.exists():
        raise ValueError(f"there is no file {path}.")
    return found


def splits_of(path: Path) -> dict[str, list[Path]]:
    """Returns the files of each split of a file or a folder, in sorted order. One file is the split `train`.

    The files of a folder without names of splits are shards of the split `train`. The names valid, val and dev mean
    `validation`.

    Raises:
      ValueError: the folder has no file of a known format, files of several formats, or lacks a file that it names.
    """
    if not path.is_dir():
        return {"train": [path]}
    if (path / "dataset_dict.json").is_file():
        names = untrusted.read_json(path / "dataset_dict.json").get("splits")
        if not isinstance(names, list) or not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise ValueError(
                f"{path / 'dataset_dict.json'}: splits is {untrusted.printable(names)}; expected a list of names."
            )
        return {name: _saved(path / name) for name in names}
    if (path / "state.json").is_file():
        return {"train": _saved(path)}
    files = [file for file in sorted(path.rglob("*")) if _is_data(file.relative_to(path))]
    kinds = sorted({_suffix(file) for file in files})
    if not files:
        raise ValueError(f"the folder {path} has no file of rows; such a file ends in {', '.join(SUFFIXES)}.")
    if len(kinds) > 1:
        raise ValueError(
            f"the folder {path} has files of several formats, {' and '.join(kinds)}, which may hold the same rows. Name one "
            f"file, or a folder whose files have one format."
        )
    splits = {file: _split_of(file) for file in files}
    if not all(splits.values()):
        return {"train": files}
    return {split: [f for f in files if splits[f] == split] for split in dict.fromkeys(splits.values())}


def rows(path: Path) -> Iterator[tuple[str, object]]:
    """Yields the rows of a file, each with its place: the path and the line, or the number of the row in other formats.

    Lines and rows are counted from 1. A file whose name ends in none of `SUFFIXES` is read as JSON lines.

    Raises:
      ValueError: the file cannot be read or has another format than its name says; the message names the place.
    """
    name = path.name.lower()
    if name.endswith(".parquet"):
        yield from _columnar(path, "Parquet", _parquet)
    elif name.endswith(".arrow"):
        yield from _columnar(path, "Arrow", _arrow)
    elif name.endswith((".json", ".json.gz")) and _begins_with_array(path):
        yield from _array(path)
    else:
        for number, line in lines(path):
            where = f"{path}:{number}"
            # NaN is allowed in fields that are not used, because Python can write it.
            yield where, untrusted.parse_json(line, where, finite=False)


def checked_rows(path: Path) -> Iterator[tuple[str, Json]]:
    """Yields the rows of a file as `rows` does, and checks that each row is an object.

    Raises:
      ValueError: as in `rows`, or a row is not an object.
    """
    for where, row in rows(path):
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected a JSON object, found {type(row).__name__}.")
        yield where, row


def is_columnar(path: Path) -> bool:
    """Returns True for a format in which each row has each field, so that a missing value is null."""
    return path.name.lower().endswith((".parquet", ".arrow"))


def _suffix(path: Path) -> str:
    return next(suffix for suffix in sorted(SUFFIXES, key=len, reverse=True) if path.name.lower().endswith(suffix))


def _is_data(path: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)
    cached = path.name.startswith("cache-") and path.suffix == ".arrow"  # left behind by the datasets library
    return path.name.lower().endswith(SUFFIXES) and path.name not in ABOUT and not hidden and not cached


def _split_of(path: Path) -> str:
    """Returns the split that a file's name gives, or "" if the name gives none."""
    name = path.name[: -len(_suffix(path))]
    shard = SHARD.fullmatch(name)
    name = shard["split"] if shard else name
    if not SPLIT.fullmatch(name):
        return ""
    return "validation" if name in NAMES_OF_VALIDATION else name


def _saved(folder: Path) -> list[Path]:
    """Returns the Arrow files of a dataset that `datasets.Dataset.save_to_disk` wrote."""
    state = folder / "state.json"
    files = untrusted.read_json(state).get("_data_files")
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in files or ()]
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise ValueError(f"{state}: _data_files is {untrusted.printable(files)}; expected a list of file names.")
    paths = [folder / str(name) for name in names]
    if missing := [path for path in paths if not path.is_file()]:
        raise ValueError(f"{state} names the file {missing[0]}, which does not exist.")
    return paths


def _columnar(path: Path, kind: str, read: Callable[[Path], Iterator[list[Json]]]) -> Iterator[tuple[str, object]]:
    """Yields the rows of a Parquet or Arrow file with their numbers, a batch at a time."""
    import pyarrow as pa  # imported here because the import takes a third of a second, and most runs do not need it

    try:
        with path.open("rb") as file:
            untrusted.refuse_pointer(path, file.read(len(untrusted.LFS)))
        for index, batch in enumerate(read(path)):
            for number, row in enumerate(batch, start=1 + index * BATCH):
                yield f"{path}:{number}", row
    except (OSError, pa.ArrowException) as error:
        problem = untrusted.clip(" ".join(str(error).split()))
        raise ValueError(f"{path}: cannot be read as {kind} ({problem}); the file may be incomplete.") from error


def _parquet(path: Path) -> Iterator[list[Json]]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        yield from _of_size(batch.to_pylist() for batch in file.iter_batches(batch_size=BATCH))


def _arrow(path: Path) -> Iterator[list[Json]]:
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        is_file = source.size() >= 6 and source.read(6) == b"ARROW1"  # the datasets library writes the stream format
        source.seek(0)
        if is_file:
            reader = pa.ipc.open_file(source)
            tables = (reader.get_batch(index) for index in range(reader.num_record_batches))
        else:
            tables = iter(pa.ipc.open_stream(source))
        parts = (table.slice(start, BATCH) for table in tables for start in range(0, table.num_rows, BATCH))
        yield from _of_size(part.to_pylist() for part in parts)


def _of_size(parts: Iterator[list[Json]]) -> Iterator[list[Json]]:
    """Yields the same rows in lists of `BATCH` rows, of which only the last list may be shorter."""
    remaining = itertools.chain.from_iterable(parts)
    while batch := list(itertools.islice(remaining, BATCH)):
        yield batch


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields the number and the bytes of each line that is not blank.

    A compressed file may expand at most `MAX_RATIO`-fold, or to 1 MiB, because text never compresses that well.

    Raises:
      ValueError: the file cannot be read, a line is too long, or there are too many blank lines in a row.
    """
    compressed = path.suffix == ".gz"
    try:
        _refuse_pointer(path)
        limit = _unpacked_limit(path)
        total = number = blank = 0
        with gzip.open(path) if compressed else path.open("rb") as file:
            while line := file.readline(MAX_LINE + 1):
                number, total = number + 1, total + len(line)
                line = (
                    line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                )  # Windows writes this byte order mark
                if len(line) > MAX_LINE:
                    raise ValueError(f"{path}:{number}: the line is longer than {MAX_LINE} bytes.")
                if total > limit:
                    raise _unpacks(path)
                blank = 0 if line.strip() else blank + 1
                if blank > MAX_BLANK:
                    raise ValueError(f"{path}:{number}: more than {MAX_BLANK} blank lines in a row end here.")
                if not blank:
                    yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read ({error}); the file may be incomplete.") from error


def _refuse_pointer(path: Path) -> None:
    """Refuses a Git LFS pointer, whose text may stand in place of a compressed file, too."""
    with path.open("rb") as file:
        untrusted.refuse_pointer(path, file.read(len(untrusted.LFS)))


def _unpacked_limit(path: Path) -> float:
    return max(untrusted.MIB, MAX_RATIO * path.stat().st_size) if path.suffix == ".gz" else math.inf


def _unpacks(path: Path) -> ValueError:
    return ValueError(
        f"{path}: the file unpacks to more than {MAX_RATIO} times its size, and no text does that. If you trust the file, "
        f"unpack it by hand."
    )


@contextlib.contextmanager
def _text(path: Path) -> Iterator[TextIO]:
    """Opens a file as UTF-8 text, and turns any error into a ValueError that names the file."""
    try:
        _refuse_pointer(path)
        with (
            gzip.open(path, "rt", encoding="utf-8-sig")
            if path.suffix == ".gz"
            else path.open(encoding="utf-8-sig") as file
        ):
            yield file  # pyrefly: ignore[invalid-yield]  # gzip.open in mode "rt" returns text
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as UTF-8 text ({error}); the file may be incomplete.") from error


def _begins_with_array(path: Path) -> bool:
    with _text(path) as file:
        while piece := file.read(64):
            if piece.strip():
                return piece.lstrip().startswith("[")
    return False


def _array(path: Path) -> Iterator[tuple[str, object]]:
    """Yields the elements of a file with one JSON array. One element at a time is in memory."""
    limit = _unpacked_limit(path)
    with _text(path) as file:
        array = _Array(path, file, limit)
        yield from array.elements()


class _Array:
    """Reads a JSON array element by element."""

    def __init__(self, path: Path, file: TextIO, limit: float):
        self.path, self.file, self.limit = path, file, limit
        self.text, self.position, self.line, self.total = "", 0, 1, 0
        self.decoder = json.JSONDecoder()

    def elements(self) -> Iterator[tuple[str, object]]:
        opening = self._next_character()  # the bracket that `_begins_with_array` found
        self.position += len(opening)
        while (character := self._next_character()) != "]":
            if opening == ",":
                if character != ",":
                    raise ValueError(
                        f"{self.path}:{self.line}: not valid JSON (expected a comma or a closing bracket)."
                    )
                self.position += 1
                self._next_character()
            yield self._element()
            opening = ","
        self.position += 1
        if self._next_character():
            raise ValueError(f"{self.path}:{self.line}: not valid JSON (there is text after the array).")

    def _element(self) -> tuple[str, object]:
        where = f"{self.path}:{self.line}"
        while True:
            try:
                _, end = self.decoder.raw_decode(self.text, self.position)
            except (ValueError, RecursionError):  # the element is incomplete, or wrong: `parse_json` explains the error
                if self._read():
                    continue
                end = len(self.text)
            content = self.text[self.position : end]
            element = untrusted.parse_json(content.encode(errors="surrogatepass"), where, finite=False)
            self.line, self.position = self.line + content.count("\n"), end
            return where, element

    def _next_character(self) -> str:
        """Skips white space, and returns the next character; "" at the end of the file."""
        while True:
            match = SPACE.match(self.text, self.position)
            end = match.end() if match else self.position
            self.line += self.text.count("\n", self.position, end)
            self.position = end
            if end < len(self.text):
                return self.text[end]
            if not self._read():
                return ""

    def _read(self) -> bool:
        """Appends more of the file to the text, and returns False at the end of the file."""
        remaining = self.text[self.position :]
        if len(remaining) > MAX_LINE:
            raise ValueError(f"{self.path}:{self.line}: the row is longer than {MAX_LINE} characters.")
        more = self.file.read(max(CHUNK, len(remaining)))
        self.text, self.position, self.total = remaining + more, 0, self.total + len(more)
        if self.total > self.limit:
            raise _unpacks(self.path)
        return bool(more)
