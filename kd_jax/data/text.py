"""Plain text files, for packing to length."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from kd_jax import remote
from kd_jax.data import jsonl

PIECE = 64 * 1024


def source(
    path: str | tuple[str, ...], validation_fraction: float = 0.02
) -> tuple[str, dict[str, Callable[[], Iterable[dict[str, str]]]]]:
    """Splits train and validation, of files cut at line ends into documents of about 64 Ki characters (at most twice as many).

    Args:
      path: a file, a pattern such as 'books/*.txt', or several of them.
      validation_fraction: the share of pieces that is held out, by a hash of their text.

    Raises:
      ValueError: a pattern that matches no file, or a file that is not UTF-8.
    """
    patterns = [path] if isinstance(path, str) else list(path)
    files: list[Path] = []
    for pattern in patterns:
        matches = remote.matches(pattern)
        if not matches:
            raise ValueError(f"no file matches data.options.path={pattern!r}.")
        files += map(remote.local_file, matches)

    def rows(held_out: bool) -> Iterator[dict[str, str]]:
        for file in files:
            for piece in _pieces(file):
                if (jsonl.fraction(piece) < validation_fraction) == held_out:
                    yield {"response": piece}

    fingerprint = jsonl.digest(files, f"text {validation_fraction}")
    return fingerprint, {"train": lambda: rows(False), "validation": lambda: rows(True)}


def _pieces(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as file:
            while piece := file.read(PIECE):
                yield piece + file.readline(PIECE)  # to the line's end, but no further than as much again
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as UTF-8 text ({error}).") from error
