"""Plain text files, for packing to length."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from kd_jax import remote
from kd_jax.data import jsonl

PIECE = 64 * 1024


def source(
    path: str | tuple[str, ...], validation_path: str | tuple[str, ...] = "", validation_fraction: float = 0.02
) -> tuple[str, dict[str, Callable[[], Iterable[dict[str, str]]]]]:
    """Splits train and validation, of files divided at line ends into pieces of about 64 Ki characters (at most twice as many).

    Args:
      path: a file, a pattern such as 'books/*.txt', or several of them.
      validation_path: the same, of held-out text; empty: a part of `path` is held out.
      validation_fraction: the share of pieces that is held out then, by a hash of their text. Above 0 both splits have at least
        one piece, and if there is one piece only, its last lines are held out. With 0 nothing is held out.

    Raises:
      ValueError: a pattern that matches no file, a file that is not UTF-8, no text at all, one line where some text is to be held
        out, or a share out of range.
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
        raise ValueError(f"data.options.path={path!r}: there is no text in it.")
    settings = f"text {len(training)} files, {'' if held_out else validation_fraction}, at least one"
    fingerprint = jsonl.digest(training + held_out, settings)
    return fingerprint, {"train": lambda: rows("train"), "validation": lambda: rows("validation")}


def _files(option: str, path: str | tuple[str, ...]) -> list[Path]:
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
    """The pieces of a split; a piece that is alone is divided."""
    fractions = list(map(jsonl.fraction, _all_pieces(files)))
    if len(set(fractions)) == 1:
        yield _divide(next(_all_pieces(files)), share, files[0])[split]
        return
    low, high = jsonl.divide(fractions, {"validation": share})[split]
    yield from (piece for piece in _all_pieces(files) if low <= jsonl.fraction(piece) < high)


def _divide(piece: str, share: float, path: Path) -> dict[str, str]:
    """A piece in two at the line end that leaves about the share behind it."""
    ends = [place + 1 for place, character in enumerate(piece) if character == "\n"]
    ends = [end for end in ends if piece[:end].strip() and piece[end:].strip()]
    if not ends:
        raise ValueError(
            f"{path} has one line of text only, and none to hold out: add lines, name a file in data.options.validation_path, or "
            f"hold nothing out with data.options.validation_fraction=0.0 and data.eval_split=train."
        )
    end = min(ends, key=lambda place: abs(place - (1 - share) * len(piece)))
    return {"train": piece[:end], "validation": piece[end:]}


def _all_pieces(files: list[Path]) -> Iterator[str]:
    return (piece for file in files for piece in _pieces(file) if piece.strip())


def _pieces(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig") as file:  # without the mark that Windows writes before the text
            while piece := file.read(PIECE):
                yield piece + file.readline(PIECE)  # to the line's end, but no further than as much again
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as UTF-8 text ({error}).") from error
