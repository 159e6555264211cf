"""The rows of a run as a teacher with a tokenizer of its own reads them, and their common spans with the student's rows."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from kd_jax import data
from kd_jax.data.alignment import ByteReader, Reading, common_spans
from kd_jax.data.encoding import Encoder
from kd_jax.prefixes import rollouts
from kd_jax.run.models import Models
from kd_jax.settings import Settings
from kd_jax.teachers.aligned import Aligned, AlignedRow, aligned_arrays

MULTIPLE = 8  # lengths of arrays are rounded up to a multiple of this number
MORE_TOKENS = 1.5  # room for a sampled response, in relation to the mean number of the teacher's tokens for a token
Texts = Sequence[dict[str, str]]


@dataclasses.dataclass(frozen=True)
class AlignedRows:
    """Aligns rows with a teacher, and makes the arrays of batches.

    Attributes:
      student: reads the student's tokens.
      teacher: reads the teacher's tokens.
      template: the format of the prompts of both models.
      texts: the row of the dataset of each row of the split, with as much of the prompt as the student reads.
      rows: the aligned rows of the split.
      length: the number of positions of the student.
      teacher_length: the number of positions of the teacher's lines.
    """

    student: ByteReader
    teacher: ByteReader
    template: data.Template
    texts: Texts
    rows: Sequence[AlignedRow]
    length: int
    teacher_length: int

    def of_lines(self, groups: Sequence[Sequence[int]], num_lines: int) -> dict[str, np.ndarray]:
        """Returns the arrays of a batch of the split, as in `data.LineArrays`. Each line has one row."""
        return self._arrays([self.rows[group[0]] for group in groups], num_lines)

    def with_arrays(self, rows: rollouts.Rows, indices: Int[np.ndarray, " M"]) -> rollouts.Rows:
        """Returns sampled rows with the arrays from which `of_rollouts` makes a batch.

        Args:
          rows: the sampled rows.
          indices: the index in the split of the row whose prompt each sampled row has.
        """
        parts = zip(rows["tokens"], rows["lengths"], rows["prompt_lengths"], strict=True)
        ids = [(tokens[:length], int(prompt_length)) for tokens, length, prompt_length in parts]
        texts = [self.texts[i] for i in indices]
        written = [
            self.student.written(self._stripped(row[prompt_length:]), before)
            for (row, prompt_length), before in zip(ids, self._prompts(self.student, texts), strict=True)
        ]
        aligned = self.align(ids, texts, written)
        return rows | {f"span_{name}": array for name, array in self._arrays(aligned, len(ids)).items()}

    def of_rollouts(self, rows: rollouts.Rows) -> dict[str, np.ndarray]:
        """Returns the arrays of a batch of rows from `with_arrays`."""
        names = self._arrays([], 0)
        return {name: rows[f"span_{name}"] for name in names}

    def without_spans(self, count: int) -> "AlignedRows":
        """Returns the maker of the same arrays for `count` rows that the teacher does not read."""
        return dataclasses.replace(self, rows=[_empty(self.length)] * count, texts=())

    def align(
        self, rows: Sequence[tuple[Int[np.ndarray, " L+1"], int]], texts: Texts,
        written: Sequence[tuple[bytes, Reading] | None],
    ) -> list[AlignedRow]:  # fmt: skip
        """Returns the rows as the teacher reads them. A row whose text is not known has no span.

        Args:
          rows: the ids of each row, and the length of the student's prompt.
          texts: the row of the dataset of each row.
          written: the text of each response, and the student's tokens of the text without end tokens.
        """
        responses = ["" if found is None else found[0].decode() for found in written]
        encoder = Encoder(self.teacher.tokenizer, self.template)
        shown = [{**text, "response": response} for text, response in zip(texts, responses, strict=True)]
        befores = self._prompts(self.teacher, texts)
        aligned = []
        for row, found, encoded, before in zip(rows, written, encoder.rows(shown), befores, strict=True):
            ids, prompt_length = row
            read = None if found is None else self.teacher.read(encoded.response, found[0], before)
            if found is None or read is None:
                aligned.append(_empty(len(ids) - 1))
                continue
            has_end = len(self._stripped(ids[prompt_length:])) < len(ids) - prompt_length
            end = [self.teacher.tokenizer.eos_id] if has_end else []
            prompt = np.array(encoded.prompt, np.int32)
            aligned.append(_align(ids, prompt_length, found[1], prompt, read, end, self.teacher_length))
        return aligned

    def _arrays(self, rows: Sequence[AlignedRow], num_lines: int) -> dict[str, np.ndarray]:
        pad_id = self.teacher.tokenizer.pad_id
        return aligned_arrays(
            rows, num_lines, length=self.length, teacher_length=self.teacher_length, pad_id=pad_id
        )  # fmt: skip

    def _stripped(self, ids: Int[np.ndarray, " R"]) -> list[int]:
        return self.student.tokenizer.strip_ends(ids.tolist())

    def _prompts(self, reader: ByteReader, texts: Texts) -> list[str]:
        """Returns the rendered prompts in the format of a model."""
        render = data.make_render(self.template, reader.tokenizer)
        return [render(text["prompt"], text["context"]) for text in texts]


def make_aligned_rows(
    config: Settings, loaded: Models, rows: data.Rows, texts: Texts, counts: dict[str, int], *, samples: bool
) -> AlignedRows | None:  # fmt: skip
    """Returns the aligned rows of a split; None if no term compares spans.

    Args:
      config: the config of the run.
      loaded: the models of the run.
      rows: the rows of the split.
      texts: the row of the dataset of each of `rows`. The column `written` replaces the response, if there is one.
      counts: the counts of the split, to which the rows without spans and the truncated rows are added.
      samples: True if the student will sample responses to the prompts of the rows.

    Raises:
      ValueError: no row has a common span.
    """
    if not isinstance(loaded.compared_teacher, Aligned) or loaded.writer is None:
        return None
    template, options = data.Template.of(config.data), config.data
    if options.long_prompts == "cut":  # the teacher reads as much of the prompt as the student
        encoder = Encoder(loaded.tokenizer, template, options.max_prompt_length, truncates=True)
        texts = [row for row, _ in encoder.fitted(texts)]
    student, teacher = ByteReader(loaded.tokenizer), ByteReader(loaded.writer.tokenizer)
    positions = loaded.writer.model.config.max_positions
    made = AlignedRows(student, teacher, template, texts, (), options.max_length, positions)
    ids = [(rows[i], int(rows.prompt_lengths[i])) for i in range(len(rows))]
    befores = made._prompts(student, texts)
    written = []
    for (row, prompt_length), text, before in zip(ids, texts, befores, strict=True):
        response = text.get("written", text["response"]).encode()
        found = student.read(made._stripped(row[prompt_length:]), response, before)
        whole = response[: int(found.ends.max(initial=0))].decode(errors="ignore").encode() if found else b""
        written.append(None if found is None else (whole, found))
    aligned = made.align(ids, texts, written)
    without = sum(not np.any(row.of_student >= 0) for row in aligned)
    if without == len(rows):
        raise ValueError(
            f"no row has a span that the tokenizers of the student and of the teacher ({config.teacher.path}) share. A tokenizer "
            f"that changes the text, for example to lower case, gives other bytes."
        )
    longest = max(len(row.tokens) - 1 for row in aligned)
    if samples:
        prompts = max(len(row.tokens) - int(np.sum(row.of_teacher >= 0)) for row in aligned)
        per_token = np.sum([np.sum(row.of_teacher >= 0) for row in aligned]) / max(
            1, np.sum([np.sum(row.of_student >= 0) for row in aligned])
        )
        longest = max(longest, prompts + int(MORE_TOKENS * max(1.0, per_token) * config.sampling.max_new_tokens))
    counts |= {"rows without common spans": without}
    return dataclasses.replace(
        made, rows=aligned, teacher_length=min(-(-longest // MULTIPLE) * MULTIPLE, positions)
    )  # fmt: skip


def _empty(length: int) -> AlignedRow:
    """Returns a row of `length` targets that the teacher does not read."""
    return AlignedRow(np.zeros(0, np.int32), np.zeros(0, np.int32), np.full(length, -1, np.int32))


def _align(
    ids: Int[np.ndarray, " L+1"], prompt_length: int, student: Reading, prompt: Int[np.ndarray, " P"], teacher: Reading,
    end: list[int], teacher_length: int,
) -> AlignedRow:  # fmt: skip
    """Returns a row with the spans of the response, and one span of no bytes for the end tokens of both rows.

    A token that begins in the prompt is in no span, because the prompts of both models may differ. Spans after the last
    position of the teacher are left out.
    """
    found = common_spans(student.ends, teacher.ends)[:, :4]
    if not (student.is_apart and teacher.is_apart):
        found = found[1:]
    if end:
        last = [len(student.ids), len(student.ids) + 1, len(teacher.ids), len(teacher.ids) + 1]
        found = np.concatenate([found, [last]])
    tokens = np.concatenate([prompt, teacher.ids, np.array(end, np.int32)])[: teacher_length + 1]
    of_student, of_teacher = np.full(len(ids) - 1, -1, np.int32), np.full(max(len(tokens) - 1, 0), -1, np.int32)
    # The target at position t is the token t + 1, and the first token of a row is no target.
    found = found + np.array([prompt_length - 1] * 2 + [len(prompt) - 1] * 2)
    is_used = (
        (found[:, 0] >= 0) & (found[:, 2] >= 0) & (found[:, 3] <= len(of_teacher)) & (found[:, 1] <= len(of_student))
    )
    for index, (start, stop, first, after) in enumerate(found[is_used].tolist()):
        of_student[start:stop], of_teacher[first:after] = index, index
    return AlignedRow(tokens, of_teacher, of_student)
