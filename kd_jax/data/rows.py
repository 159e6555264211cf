"""Token rows of different lengths, and the two ways to fill a batch with more than one of them a row."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Int


@dataclasses.dataclass(frozen=True)
class Rows:
    """Token rows of different lengths, end to end in one array.

    Attributes:
      tokens: all rows' ids.
      offsets: row i is tokens[offsets[i] : offsets[i + 1]].
      prompt_lengths: how many of a row's first tokens are its prompt.
      first_counted: the position in the row of its first token that the loss counts; what follows counts too.
    """

    tokens: Int[np.ndarray, " T"]
    offsets: Int[np.ndarray, " N+1"]
    prompt_lengths: Int[np.ndarray, " N"]
    first_counted: Int[np.ndarray, " N"]

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    def __getitem__(self, index: int) -> Int[np.ndarray, " L"]:
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


class Beside(Protocol):
    """Numbers of the tokens that count, which are kept beside the rows and read with them.

    Attributes:
      fills: the numbers of a position, by name, where there are none: their shape and type are all positions'.
    """

    @property
    def fills(self) -> Mapping[str, np.ndarray]: ...

    def read(self, index: int) -> Mapping[str, np.ndarray]:
        """Of some or all names the numbers of row `index`, an entry for each of its tokens that count."""
        ...


@dataclasses.dataclass(frozen=True)
class Packed:
    """Several rows in each row of a batch, apart from one another: see `pack_rows`.

    Attributes:
      rows: what is packed.
      groups: indices of the rows that share a row of a batch.
    """

    rows: Rows
    groups: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.groups)


def from_pieces(
    pieces: Sequence[Int[np.ndarray, " L"]], prompt_lengths: Int[np.ndarray, " N"], first: Int[np.ndarray, " N"]
) -> Rows:
    """Rows out of one array each."""
    offsets = np.zeros(len(pieces) + 1, np.int64)
    np.cumsum([len(piece) for piece in pieces], out=offsets[1:])
    tokens = np.concatenate(pieces) if pieces else np.zeros(0, np.int32)
    return Rows(tokens, offsets, prompt_lengths, first)


def join(rows: Rows, *, max_length: int) -> Rows:
    """Rows end to end, prompts included, cut anew into rows of max_length + 1 of which every token counts.

    A language model learns most from a batch without padding: short rows waste most of one. A row then begins in the middle of
    an example, and attention sees across the end tokens.

    Args:
      rows: as from `tokenize`.
      max_length: tokens of a model's input.
    Returns:
      The rows. They overlap by one token, so that each token is a target once.
    """
    starts = range(0, len(rows.tokens) - 1, max_length)
    zeros = np.zeros(len(starts), np.int32)
    return from_pieces([rows.tokens[start : start + max_length + 1] for start in starts], zeros, zeros)


def pack_rows(rows: Rows, *, max_length: int) -> Packed:
    """Rows put together, the longest first and each where least room is left, so that little of a batch is padding.

    Nothing changes but the padding: in a batch their segments say which tokens belong together, attention and positions
    are kept apart, and the loss is that of the rows unpacked. What a batch holds is more rows than its size says.

    Args:
      rows: as from `tokenize`.
      max_length: tokens of a model's input.
    """
    lengths = np.diff(rows.offsets) - 1
    groups: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # room left -> groups
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = max(int(lengths[index]), 1)
        room = next((room for room in range(length, max_length + 1) if with_room.get(room)), None)
        if room is None:
            place, room = len(groups), max_length
            groups.append([])
        else:
            place = with_room[room].pop()
        groups[place].append(index)
        with_room.setdefault(room - length, []).append(place)
    return Packed(rows, tuple(map(tuple, groups)))
