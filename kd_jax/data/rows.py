"""Token rows of different lengths, and two ways to put several of these rows into one row of a batch."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Bool, Int


@dataclasses.dataclass(frozen=True)
class Rows:
    """Token rows of different lengths, concatenated in one array.

    Attributes:
      tokens: the ids of all rows.
      offsets: the boundaries of the rows: row i is tokens[offsets[i] : offsets[i + 1]].
      prompt_lengths: the number of prompt tokens at the start of each row.
      first_counted: the position in each row of the first token that the loss counts. All later tokens count, too.
      sources: the index in the dataset of each row's text; None for rows that are not rows of a dataset.
      counted: for rows in which the loss counts several parts, True for each of `tokens` that the loss counts;
        `prompt_lengths` then ends before the last part. None if `first_counted` is enough.
      examples: the name of a count of dropped or truncated rows -> a phrase that shows one such row.
    """

    tokens: Int[np.ndarray, " T"]
    offsets: Int[np.ndarray, " N+1"]
    prompt_lengths: Int[np.ndarray, " N"]
    first_counted: Int[np.ndarray, " N"]
    sources: Int[np.ndarray, " N"] | None = None
    counted: Bool[np.ndarray, " T"] | None = None
    examples: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    def __getitem__(self, index: int) -> Int[np.ndarray, " L"]:
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def targets_counted(self, index: int) -> Bool[np.ndarray, " L-1"]:
        """Returns True for each target of a row that the loss counts. A row's first token is never a target."""
        if self.counted is not None:
            return self.counted[self.offsets[index] + 1 : self.offsets[index + 1]]
        return np.arange(1, int(self.offsets[index + 1] - self.offsets[index])) >= self.first_counted[index]


class Texts(Protocol):
    """The rows of a dataset, such as a list of dicts.

    Each row has prompt, context and response, and may have further columns. All values are str.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, str]: ...


class TokenValues(Protocol):
    """Additional values of the counted tokens, such as a teacher's cache, which are read together with the rows.

    Attributes:
      fill_values: the values at positions that do not count, by name, each of the shape and type of one token's values.
    """

    @property
    def fill_values(self) -> Mapping[str, np.ndarray]: ...

    def read(self, index: int) -> Mapping[str, np.ndarray]:
        """Returns the values of row `index` for some or all names, with one entry for each counted token."""
        ...


class LineArrays(Protocol):
    """Additional arrays of a batch that are made from whole rows, such as the prompts of a teacher that sees more."""

    def of_lines(self, groups: Sequence[Sequence[int]], num_lines: int) -> Mapping[str, np.ndarray]:
        """Returns arrays [num_lines, ...] by name.

        Args:
          groups: the indices of the rows in each line of the batch, in order.
          num_lines: the number of lines. Lines beyond the groups are padding.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Packed:
    """Rows that share rows of a batch. Segments separate the rows, as described in `pack_rows`.

    Attributes:
      rows: the rows that are packed.
      groups: the indices of the rows that share a row of a batch.
    """

    rows: Rows
    groups: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.groups)


def from_pieces(
    pieces: Sequence[Int[np.ndarray, " L"]], prompt_lengths: Int[np.ndarray, " N"], first: Int[np.ndarray, " N"],
    sources: Int[np.ndarray, " N"] | None = None, counted: Sequence[Bool[np.ndarray, " L"]] | None = None,
) -> Rows:  # fmt: skip
    """Returns `Rows` made from one array per row, and optionally one array of the counted tokens per row."""
    offsets = np.zeros(len(pieces) + 1, np.int64)
    np.cumsum([len(piece) for piece in pieces], out=offsets[1:])
    tokens = np.concatenate(pieces) if pieces else np.zeros(0, np.int32)
    return Rows(tokens, offsets, prompt_lengths, first, sources, None if counted is None else np.concatenate(counted))


def join(rows: Rows, *, max_length: int) -> Rows:
    """Concatenates all rows, prompts included, and splits the result into rows of max_length + 1 tokens.

    All tokens of the new rows count. A batch without padding gives a language model more tokens to learn from, because
    short rows are mostly padding. A new row may begin in the middle of an example, and a token attends to the tokens
    before an end token, too.

    Args:
      rows: the rows from `tokenize`.
      max_length: the number of tokens of a model's input.

    Returns:
      The new rows. Adjacent rows overlap by one token, so that each token after the first is a target exactly once.
    """
    starts = range(0, len(rows.tokens) - 1, max_length)
    zeros = np.zeros(len(starts), np.int32)
    return from_pieces([rows.tokens[start : start + max_length + 1] for start in starts], zeros, zeros)


def pack_rows(rows: Rows, *, max_length: int) -> Packed:
    """Groups rows that together fit into one row of a batch, so that little of a batch is padding.

    The rows are placed in order of decreasing length, each into the group with the least room that suffices. Only the
    padding changes. The segments in a batch say which tokens belong together. Attention and positions are separate for
    each segment, so the loss equals the loss of the unpacked rows. A batch holds more rows than `batch_size`.

    Args:
      rows: the rows from `tokenize`.
      max_length: the number of tokens of a model's input.
    """
    lengths = np.diff(rows.offsets) - 1
    groups: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # room left -> groups
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = max(int(lengths[index]), 1)
        room = next((room for room in range(length, max_length + 1) if with_room.get(room)), None)
        if room is None:
            group, room = len(groups), max_length
            groups.append([])
        else:
            group = with_room[room].pop()
        groups[group].append(index)
        with_room.setdefault(room - length, []).append(group)
    return Packed(rows, tuple(map(tuple, groups)))
