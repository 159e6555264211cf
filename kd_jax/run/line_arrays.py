"""The further arrays of a run's batches: the rows that models with a view read, and the rows that a term's `where` counts."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Int

from kd_jax import data
from kd_jax.data.encoding import Encoder
from kd_jax.objectives import Term
from kd_jax.prefixes import rollouts
from kd_jax.run.aligned_rows import AlignedRows, make_aligned_rows
from kd_jax.run.models import Models
from kd_jax.run.view_prompts import ViewOfMember, key_of_view, live_views
from kd_jax.settings import Settings
from kd_jax.storage.untrusted import clip
from kd_jax.teachers.aligned import Aligned
from kd_jax.teachers.viewed import HAS_VIEW, ViewedRow, view_arrays
from kd_jax.views import View

MULTIPLE = 8  # lengths of arrays are rounded up to a multiple of this number
SHOWN = 10  # the largest number of a column's values in a message
FURTHER_TOKENS = 256  # room in the prompt of a view over rollouts for the words around a rollout, and for feedback


@dataclasses.dataclass(frozen=True)
class LineArrays:
    """Makes the further arrays of batches of a split.

    Attributes:
      rows: the rows as the student reads them, before packing.
      texts: the row of the dataset of each of `rows`, for views over rollouts; empty without such a view.
      views: the views of the frozen models, by the name of the model.
      counted: True for each row whose columns have the values of `where`, by the name of the term.
      length: the number of positions of the student.
      tokenizer: the tokenizer.
      packed: True if a line of a batch may have several rows.
      aligned: the rows of a teacher with a tokenizer of its own, or None.
    """

    rows: data.Rows
    texts: Sequence[dict[str, str]]
    views: Mapping[str, ViewOfMember]
    counted: Mapping[str, Bool[np.ndarray, " N"]]
    length: int
    tokenizer: data.Tokenizer
    packed: bool = False
    aligned: AlignedRows | None = None

    def of_lines(self, groups: Sequence[Sequence[int]], num_lines: int) -> dict[str, np.ndarray]:
        """Returns the arrays of a batch of the dataset, as in `data.LineArrays`.

        The array `row` [B] is the index of the first row of each line; -1 for padding.
        """
        row = np.full(num_lines, -1, np.int32)
        row[: len(groups)] = [group[0] for group in groups]
        masks = {f"where_{term}": np.zeros((num_lines, self.length), bool) for term in self.counted}
        for line, group in enumerate(groups):
            ends = np.cumsum([len(self.rows[i]) - 1 for i in group])
            for i, end in zip(group, ends, strict=True):
                for term, counted in self.counted.items():
                    masks[f"where_{term}"][line, end - len(self.rows[i]) + 1 : end] = counted[i]
        viewed = lambda view, i: ViewedRow(self.rows[i], int(self.rows.prompt_lengths[i]), view.prompts[i])
        lines = {name: [[viewed(view, i) for i in group] for group in groups] for name, view in self.views.items()}
        of_spans = {} if self.aligned is None else self.aligned.of_lines(groups, num_lines)
        return {"row": row} | masks | self._view_arrays(lines, num_lines) | of_spans

    def with_arrays(
        self, rows: rollouts.Rows, indices: Int[np.ndarray, " M"], responses: Sequence[str], group_size: int
    ) -> rollouts.Rows:
        """Returns sampled rows with the arrays from which `of_rollouts` makes a batch.

        Args:
          rows: the sampled rows.
          indices: the index in `self.rows` of the row whose prompt each sampled row has.
          responses: the texts of the responses.
          group_size: the number of neighbouring sampled rows with the same prompt.
        """
        added = {f"where_{term}": counted[indices] for term, counted in self.counted.items()}
        for member, view in self.views.items():
            prompts = [view.prompts[i] for i in indices]
            if view.view.needs_rollouts:
                prompts = view.of_rollouts([self.texts[i] for i in indices], responses, group_size)
            added[f"view_{member}"] = np.full((len(indices), view.prompt_room), -1, np.int32)
            for line, prompt in enumerate(prompts):
                if prompt is not None:
                    added[f"view_{member}"][line, : len(prompt)] = prompt
        rows = {**rows, **added}
        return rows if self.aligned is None else self.aligned.with_arrays(rows, indices)

    def of_rollouts(self, rows: rollouts.Rows) -> dict[str, np.ndarray]:
        """Returns the arrays of a batch of rows from `with_arrays`."""
        repeated = lambda array: np.repeat(array[:, None], self.length, axis=1)
        masks = {f"where_{term}": repeated(rows[f"where_{term}"]) for term in self.counted}
        lines: dict[str, list[list[ViewedRow]]] = {}
        for member in self.views:
            parts = zip(rows["tokens"], rows["lengths"], rows["prompt_lengths"], rows[f"view_{member}"], strict=True)
            lines[member] = [
                [ViewedRow(tokens[:length], int(prompt_length), ids[ids >= 0] if ids[0] >= 0 else None)]
                for tokens, length, prompt_length, ids in parts
            ]
        of_spans = {} if self.aligned is None else self.aligned.of_rollouts(rows)
        return masks | self._view_arrays(lines, len(rows["lengths"])) | of_spans

    def without_columns(self, rows: data.Rows) -> "LineArrays":
        """Returns the maker of the same arrays for rows of the second stream, which have no view and no column."""
        views = {name: dataclasses.replace(view, prompts=[None] * len(rows)) for name, view in self.views.items()}
        counted = {term: np.zeros(len(rows), bool) for term in self.counted}
        aligned = None if self.aligned is None else self.aligned.without_spans(len(rows))
        return dataclasses.replace(self, rows=rows, texts=(), views=views, counted=counted, aligned=aligned)

    def _view_arrays(self, lines: Mapping[str, list[list[ViewedRow]]], num_lines: int) -> dict[str, np.ndarray]:
        arrays: dict[str, np.ndarray] = {}
        for member, of_member in lines.items():
            arrays |= view_arrays(
                of_member, num_lines, length=self.length, view_length=self.views[member].view_length,
                pad_id=self.tokenizer.pad_id, member=member, packed=self.packed,
            )  # fmt: skip
        if lines:
            arrays[HAS_VIEW] = np.zeros((num_lines, self.length), bool)
            for line, of_line in enumerate(zip(*lines.values(), strict=True)):
                end = 0
                for of_row in zip(*of_line, strict=True):  # the same row as each model reads it
                    start, end = end, end + len(of_row[0].tokens) - 1
                    arrays[HAS_VIEW][line, start:end] = all(row.prompt is not None for row in of_row)
        return arrays


def make_line_arrays(
    config: Settings, loaded: Models, rows: data.Rows | data.Packed, load_texts: Callable[[], data.Texts],
    counts: dict[str, int], *, members: Collection[str], terms: Sequence[Term] = (), samples: bool = False,
    sampled: bool = False,
) -> LineArrays | None:  # fmt: skip
    """Returns the maker of a split's further arrays; None if the split needs none.

    Args:
      config: the config of the run.
      loaded: the models of the run.
      rows: the rows of the split.
      load_texts: returns the rows of the dataset from which `rows` were made.
      counts: the counts of the split, to which the number of truncated prompts is added.
      members: the frozen models that read the rows.
      terms: the terms that count the rows.
      samples: True if the student will sample responses to the prompts of the rows.
      sampled: True if the responses of the rows are ids that a model sampled.

    Raises:
      ValueError: no row has the values of `where`, no row has a view, or a view does not fit a model.
    """
    views = {name: view for name, view in live_views(config).items() if name in members}
    wheres = {term.name: term.where for term in terms if term.where}
    has_spans = isinstance(loaded.compared_teacher, Aligned) and "teacher" in members
    if not views and not wheres and not has_spans:
        return None
    packed, single = isinstance(rows, data.Packed), rows.rows if isinstance(rows, data.Packed) else rows
    groups = rows.groups if isinstance(rows, data.Packed) else tuple((i,) for i in range(len(single)))
    texts, sources = load_texts(), np.arange(len(single)) if single.sources is None else single.sources
    of_rows = [texts[int(i)] for i in sources]
    counted = {name: _counted(name, where, of_rows) for name, where in wheres.items()}
    if views and config.data.long_prompts == "cut":  # a view shows as much of the prompt as the student reads
        template = data.Template.of(config.data)
        student = Encoder(loaded.tokenizer, template, config.data.max_prompt_length, truncates=True)
        of_rows = [row for row, _ in student.fitted(of_rows)]
    made = {}
    for name, view in views.items():
        made[name], truncated = _of_member(config, name, view, loaded, single, groups, of_rows, samples, sampled)
        without = sum(prompt is None for prompt in made[name].prompts)
        if without == len(single) and not view.needs_rollouts:
            raise ValueError(
                f"{key_of_view(name)}: no row has a view. A row has none if a column of the template is empty, or if a function "
                f"of your own returns None."
            )
        key = key_of_view(name)
        counts |= {
            f"prompts of {key} truncated": truncated,
            f"rows without {key}": 0 if view.needs_rollouts else without,
        }
    texts_of_rollouts = of_rows if any(view.needs_rollouts for view in views.values()) else ()
    aligned = make_aligned_rows(config, loaded, single, of_rows, counts, samples=samples) if has_spans else None
    return LineArrays(
        single, texts_of_rollouts, made, counted, config.data.max_length, loaded.tokenizer, packed, aligned
    )  # fmt: skip


def _of_member(
    config: Settings, member: str, view: View, loaded: Models, rows: data.Rows, groups: Sequence[Sequence[int]],
    texts: Sequence[dict[str, str]], samples: bool, sampled: bool,
) -> tuple[ViewOfMember, int]:  # fmt: skip
    """Returns the view of a frozen model with the prompts of all rows, and the number of truncated prompts."""
    key = key_of_view(member)
    model = loaded.require_teacher() if member == "teacher" else loaded.member_models[member]
    positions, new_tokens = model.config.max_positions, config.sampling.max_new_tokens if samples else 0
    responses = np.diff(rows.offsets) - rows.prompt_lengths
    longest_response = max(int(responses.max(initial=0)), new_tokens)
    limit = positions + 1 - longest_response
    if view.max_prompt_length:
        limit = min(limit, view.max_prompt_length)
    elif view.needs_rollouts:
        limit = min(limit, config.data.max_prompt_length + new_tokens + FURTHER_TOKENS)
    if limit < 1:
        raise ValueError(
            f"{key}: a response of {longest_response} tokens leaves no room for a prompt in the {positions} positions of the "
            f"{member}; lower data.max_length or sampling.max_new_tokens."
        )
    encoder = Encoder(loaded.tokenizer, data.Template.of(config.data), limit, truncates=True)
    made = ViewOfMember(key, view, encoder)
    prompts, truncated = made.encode(rows, texts, sampled)
    lengths = [int(n) if p is None else len(p) for p, n in zip(prompts, rows.prompt_lengths, strict=True)]
    longest, prompt_room = max(sum(lengths[i] + int(responses[i]) - 1 for i in group) for group in groups), 0
    if samples:
        prompt_room = _rounded(limit if view.needs_rollouts else max(lengths))
        longest = max(longest, max(limit if view.needs_rollouts else 0, *lengths) + new_tokens - 1)
    if longest > positions:
        raise ValueError(
            f"{key}: a line of the {member} has {longest} tokens, more than its {positions} positions. Set "
            f"{key}.max_prompt_length, or data.packing='none'."
        )
    view_length = max(min(_rounded(longest), positions), config.data.max_length if config.text.name else 0)
    return dataclasses.replace(made, prompts=prompts, view_length=view_length, prompt_room=prompt_room), truncated


def _rounded(length: int) -> int:
    return -(-length // MULTIPLE) * MULTIPLE


def _counted(
    name: str, where: Mapping[str, tuple[str, ...]], texts: Sequence[dict[str, str]]
) -> Bool[np.ndarray, " N"]:
    """Returns True for each row whose columns have the values that a term names."""
    for column, values in where.items():
        found = {text[column] for text in texts}
        if missing := [value for value in values if value not in found]:
            shown = ", ".join(clip(value) for value in sorted(found)[:SHOWN])
            more = f", and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
            raise ValueError(
                f"objective.terms.{name}.where: no row has {column}={missing[0]!r}; the values of the column are {shown}{more}."
            )
    counted = np.array([all(text[column] in values for column, values in where.items()) for text in texts], bool)
    if not counted.any():
        raise ValueError(
            f"objective.terms.{name}.where={dict(where)!r}: no row has a value of each column at the same time."
        )
    return counted
