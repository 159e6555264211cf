"""Plain text files, whose tokens are packed into rows of full length."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from kd_jax.data import jsonl
from kd_jax.storage import remote

PIECE = 64 * 1024  # characters


def source(
    path: str | tuple[str, ...], validation_path: str | tuple[str, ...] = "", validation_fraction: float = 0.02
) -> tuple[str, dict[str, Callable[[], Iterable[dict[str, str]]]]]:
    """Returns the fingerprint and the splits train and validation of plain text files.

    The files are divided at line ends into pieces of about 64 Ki characters, and of at most twice that length.

    Args:
      path: a file, a pattern such as 'books/*.txt', or several of them.
      validation_path: a file, a pattern or several of them with held-out text. If empty, a part of `path` is held out.
      validation_fraction: the share of pieces of `path` that is held out, in [0, 1), chosen by a hash of the text.
        Above 0, both splits have at least one piece. If there is only one piece, its last lines are held out. With 0
        nothing is held out.

    Raises:
      ValueError: a pattern matches no file, a file is not UTF-8, there is no text, the share is out of range, or the
        text has only one line and a part of the text is held out.
    """
    jsonl.check_share(validation_fraction, validation_path)
    training, held_out = _files("path", path), _files("validation_path", validation_path) if validation_path else []

    def rows(split: str) -> Iterator[dict[str, str]]:
        if held_out or not validation_fraction:
            pieces = _all_pieces(held_out if split == "validation" else training)
        else:
            pieces = _part(training, split, validation_fraction)
        yield from ({"response": piece} for piece in pieces)

    if not any(True for _ in _all_pieces(training)):
        raise ValueError(f"data.options.path={path!r}: the files have no text.")
    settings = f"text {len(training)} files, {'' if held_out else validation_fraction}, at least one"
    fingerprint = jsonl.digest(training + held_out, settings)
    return fingerprint, {"train": lambda: rows("train"), "validation": lambda: rows("validation")}


def _files(option: str, path: str | tuple[str, ...]) -> list[Path]:
    """Returns the files that match one or several patterns."""
    files: list[Path] = []
    for pattern in [path] if isinstance(path, str) else path:
        matches = remote.matches(pattern) if pattern else []
        if not matches:
            raise ValueError(f"no file matches data.options.{option}={pattern!r}.")
        files += map(remote.local_file, matches)
    if folders := [file for file in files if file.is_dir()]:
        raise ValueError(
            f"data.options.{option}={path!r}: {folders[0]} is a folder; name files, or a pattern such as {folders[0]}/*.txt."
        )
    return files


def _part(files: list[Path], split: str, share: float) -> Iterator[str]:
    """Yields the pieces of a split. If there is only one distinct piece, it is divided."""
    fractions = list(map(jsonl.fraction, _all_pieces(files)))
    if len(set(fractions)) == 1:
        yield _divide(next(_all_pieces(files)), share, files[0])[split]
        return
    low, high = jsonl.divide(fractions, {"validation": share})[split]
    yield from (piece for piece in _all_pieces(files) if low <= jsonl.fraction(piece) < high)


def _divide(piece: str, share: float, path: Path) -> dict[str, str]:
    """Returns a piece as two parts, train and validation.

    The validation part begins after a line end and has about `share` of the text.

    Raises:
      ValueError: the piece has only one line of text.
    """
    ends = [index + 1 for index, character in enumerate(piece) if character == "\n"]
    ends = [end for end in ends if piece[:end].strip() and piece[end:].strip()]
    if not ends:
        raise ValueError(
            f"{path} has only one line of text and no line to hold out: add lines, name a file in data.options.validation_path, "
            f"or hold nothing out with data.options.validation_fraction=0.0 and data.eval_split=train."
        )
    end = min(ends, key=lambda index: abs(index - (1 - share) * len(piece)))
    return {"train": piece[:end], "validation": piece[end:]}


def _all_pieces(files: list[Path]) -> Iterator[str]:
    return (piece for file in files for piece in _pieces(file) if piece.strip())


def _pieces(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig") as file:  # "-sig" removes the byte order mark that Windows writes
            while piece := file.read(PIECE):
                yield piece + file.readline(PIECE)  # adds the rest of the line, but at most PIECE characters
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as UTF-8 text ({error}).") from error
