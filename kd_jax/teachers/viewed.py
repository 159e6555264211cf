"""A teacher that reads another prompt than the student, and the arrays of a batch from which this teacher reads.

Student and teacher read the same response. The logits that predict a token of the response are at different positions in
the two rows, so the teacher's hidden states are gathered at the student's positions.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from kd_jax.teachers.online import HiddenModel, Online, outputs_of
from kd_jax.teachers.protocol import Outputs, Teacher

HAS_VIEW = "has_view"  # name of a batch's array [B, L]: True at the tokens of rows that have a view


class ViewedRow(NamedTuple):
    """A row as the student reads it, and the prompt that the teacher reads.

    Attributes:
      tokens: the ids of the student's row: prompt and response.
      prompt_length: the number of the prompt's tokens in `tokens`.
      prompt: the ids of the teacher's prompt; None for the student's prompt.
    """

    tokens: Int[np.ndarray, " L+1"]
    prompt_length: int
    prompt: Int[np.ndarray, " P"] | None

    @property
    def of_teacher(self) -> Int[np.ndarray, " T+1"]:
        """The ids of the row that the teacher reads."""
        if self.prompt is None:
            return self.tokens
        return np.concatenate([self.prompt, self.tokens[self.prompt_length :]])


def view_arrays(
    lines: Sequence[Sequence[ViewedRow]], num_lines: int, *, length: int, view_length: int, pad_id: int, member: str,
    packed: bool = False,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Returns the arrays of a batch from which `Viewed` reads.

    Args:
      lines: the rows in each line of the batch, one after another.
      num_lines: the number B of lines of the batch. Lines beyond `lines` are padding.
      length: the number L of the student's positions.
      view_length: the number T of the teacher's positions, at least that of the longest line of the teacher.
      pad_id: the padding token.
      member: the name of the frozen model.
      packed: True if a line may have several rows.

    Returns:
      The teacher's tokens [B, T]; True where there is a token [B, T], or int32 segments with `packed`, as in
      `data.batches`; and the teacher's position [B, L] for each of the student's positions. Positions that predict a
      token of the prompt have no counterpart, and get the position 0.

    Raises:
      ValueError: a line of the teacher is longer than `view_length`.
    """
    tokens = np.full((num_lines, view_length), pad_id, np.int32)
    segments = np.zeros((num_lines, view_length), np.int32)
    positions = np.zeros((num_lines, length), np.int32)
    for i, rows in enumerate(lines):
        start = view_start = 0
        for segment, row in enumerate(rows, start=1):
            inputs = row.of_teacher[:-1]
            end, view_end = start + len(row.tokens) - 1, view_start + len(inputs)
            if view_end > view_length:
                raise ValueError(f"a line of the teacher has {view_end} tokens or more, and view_length={view_length}.")
            tokens[i, view_start:view_end], segments[i, view_start:view_end] = inputs, segment
            first = start + max(row.prompt_length - 1, 0)  # predicts the first token of the response
            positions[i, first:end] = np.arange(view_end - (end - first), view_end)
            start, view_start = end, view_end
    mask = segments if packed else segments > 0
    return {_key(member, "tokens"): tokens, _key(member, "mask"): mask, _key(member, "positions"): positions}


@dataclasses.dataclass(frozen=True)
class Viewed(Online):
    """A model that reads the arrays of `view_arrays` in place of the student's tokens.

    Attributes:
      model: the model.
      member: the name of the frozen model.
    """

    model: HiddenModel
    member: str = "teacher"

    def outputs(self, params: PyTree, batch: Mapping[str, Array]) -> Outputs:
        """Returns the model's hidden states, gathered at the student's positions, and its output matrix.

        Raises:
          ValueError: the batch lacks the arrays of the view.
        """
        names = [_key(self.member, part) for part in ("tokens", "mask", "positions")]
        if missing := [name for name in names if name not in batch]:
            raise ValueError(
                f"the model {self.member} has a view, but the batch has no {missing[0]}. Make the batch with a run's feed or "
                f"with teachers.viewed.view_arrays, or use on_new_text() for text without a view."
            )
        tokens, mask, positions = (batch[name] for name in names)
        hidden = self.model.hidden(params, tokens, mask)
        return outputs_of(self.model, params, jnp.take_along_axis(hidden, positions[..., None], axis=1))

    def on_new_text(self) -> Teacher:
        """Returns the same model without the view."""
        return Online(self.model)


def _key(member: str, part: str) -> str:
    return f"teacher_view_{member}_{part}"
