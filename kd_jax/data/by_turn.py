"""The turns of the assistant as rows of their own: for each turn, all turns before as the prompt."""

import json
from collections.abc import Iterator

import numpy as np

from kd_jax.data.formats import MESSAGES
from kd_jax.data.rows import Texts
from kd_jax.data.turns import answered


class ByTurn:
    """The rows of a source, with one row for each turn of the assistant in a conversation.

    Row i has the columns of the conversation. Its response is the turn, and its column `messages` ends with the turn.

    Example:
      >>> turns = [{"role": role, "content": role[0] + str(i)} for i in (1, 2) for role in ("user", "assistant")]
      >>> row = {"prompt": "u2", "context": "", "response": "a2", "messages": json.dumps(turns)}
      >>> [(row["prompt"], row["response"]) for row in ByTurn([row])]
      [('u1', 'a1'), ('u2', 'a2')]
    """

    def __init__(self, source: Texts):
        self._source = source
        indices = [_answered(source[index]) for index in range(len(source))]
        self._rows = np.repeat(np.arange(len(source)), [len(of_row) for of_row in indices])
        self._turns = np.array([index for of_row in indices for index in of_row], np.int32)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, str]:
        if not 0 <= index < len(self):
            raise IndexError(f"there is no row {index}; there are {len(self)} rows.")
        row, turn = self._source[int(self._rows[index])], int(self._turns[index])
        if turn < 0:
            return row
        messages = json.loads(row[MESSAGES])[: turn + 1]
        return row | {
            "prompt": messages[-2]["content"], "response": messages[-1]["content"],
            MESSAGES: json.dumps(messages, ensure_ascii=False),
        }  # fmt: skip

    def __iter__(self) -> Iterator[dict[str, str]]:
        return (self[index] for index in range(len(self)))


def _answered(row: dict[str, str]) -> list[int]:
    """Returns the indices of the assistant's turns that have a prompt; [-1] for a row that is no conversation."""
    return answered(json.loads(row[MESSAGES])) if row.get(MESSAGES) else [-1]
