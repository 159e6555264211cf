"""The views of a config, the columns of the dataset that they read, and the prompts of a model with a view, in tokens."""

import contextlib
import dataclasses
import inspect
import json
from collections.abc import Generator, Sequence

import numpy as np
from jaxtyping import Int

from kd_jax import data, views
from kd_jax.data import formats, jsonl
from kd_jax.data.builder import FIELDS, SOURCES
from kd_jax.data.by_turn import ByTurn
from kd_jax.data.encoding import Encoder
from kd_jax.data.options import dataset_options
from kd_jax.settings import Settings, name_of
from kd_jax.storage.checksum import digest
from kd_jax.storage.files import Json
from kd_jax.views import View

Ids = Int[np.ndarray, " P"]


def make_views(config: Settings) -> dict[str, View]:
    """Returns the views of the frozen models, by the name of the model.

    Raises:
      ValueError: a view is invalid; the message names the key.
    """
    found = {}
    for member, options in {"teacher": config.teacher, **config.members}.items():
        try:
            view = views.make_view(options.view)
        except ValueError as error:
            raise ValueError(f"{key_of_view(member)}: {error}") from error
        if view is not None:
            found[member] = view
    return found


def live_views(config: Settings) -> dict[str, View]:
    """Returns the views of the models that run. A cached model has read its prompts before the run."""
    options = {"teacher": config.teacher, **config.members}
    return {member: view for member, view in make_views(config).items() if not options[member].cache}


def key_of_view(member: str) -> str:
    """Returns the config key of the view of a frozen model."""
    return "teacher.view" if member == "teacher" else f"members.{member}.view"


def columns_read(config: Settings) -> dict[str, str]:
    """Returns the columns of the dataset that views and terms read: name -> a config key that names the column."""
    keys = {}
    for member, view in make_views(config).items():
        keys |= {column: key_of_view(member) for column in view.columns}
    for name, term in config.objective.terms.items():
        keys |= {column: f"objective.terms.{name}.where" for column in (term or {}).get("where", {})}
    return keys


def further_columns(config: Settings) -> tuple[str, ...]:
    """Returns `columns_read` without the columns that every dataset has."""
    return tuple(column for column in columns_read(config) if column not in FIELDS)


def options_of_rows(config: Settings) -> Json:
    """Returns `dataset_options` of the section data. A dataset with the option `columns` reads those of the config, too."""
    options, columns = dataset_options(config), further_columns(config)
    if columns and config.data.name in SOURCES and "columns" in inspect.signature(SOURCES[config.data.name]).parameters:
        options["columns"] = tuple(dict.fromkeys((*options.get("columns", ()), *columns)))
    return options


def format_of_rows(config: Settings, section: str = "data") -> formats.Format | None:
    """Returns the format of the rows of a dataset of the user's own, of the section data or text; None for another one."""
    name = config.text.name if section == "text" else config.data.name
    return jsonl.format_of(**dataset_options(config, section)) if name == "jsonl" else None


def is_plain_text(config: Settings, section: str = "data") -> bool:
    """Returns True if the rows of a section of the settings are plain text without prompts."""
    found, name = format_of_rows(config, section), config.text.name if section == "text" else config.data.name
    return name == "text" or (found is not None and found.name == "text")


def has_turns(config: Settings) -> bool:
    """Returns True if the rows of the dataset are conversations."""
    found = format_of_rows(config)
    return found is not None and found.has_turns


def rows_are_turns(config: Settings) -> bool:
    """Returns True if each turn of the assistant is a training row of its own, with all turns before as the prompt.

    This is so if a model answers the prompts of conversations, and all turns count.
    """
    return config.data.loss_on == "all" and name_of(config.prefixes) != "data" and has_turns(config)


def load_texts(config: Settings, split: str) -> data.Texts:
    """Returns the rows of a split of the dataset, with all columns that the config uses.

    Raises:
      ValueError: a row cannot be read, or lacks a column; the message names the key that names the column.
    """
    options = config.data
    try:
        rows = data.load(options.name, split=split, data_dir=options.data_dir or None, **options_of_rows(config))
    except formats.MissingFieldError as error:
        key = columns_read(config).get(error.column)
        if key is None or error.column in dataset_options(config).get("columns", ()):
            raise
        raise ValueError(str(error).replace(f"{formats.OF_COLUMNS} asks", f"{key} asks")) from error
    return ByTurn(rows) if split == options.train_split and rows_are_turns(config) else rows


def described_view(config: Settings, member: str, rows: data.Rows, split: str) -> Json:
    """Returns a model's view and a hash of the texts that it shows for some rows; {} without a view.

    Args:
      config: the config of a run.
      member: the name of the frozen model.
      rows: the rows of the split, before packing.
      split: the name of the split of the dataset.
    """
    if (view := make_views(config).get(member)) is None:
        return {}
    texts, options = load_texts(config, split), config.teacher if member == "teacher" else config.members[member]
    sources = range(len(rows)) if rows.sources is None else rows.sources
    shown = [row and row["prompt"] for row in view.rows([texts[int(i)] for i in sources])]
    return {"spec": json.dumps(options.view, sort_keys=True, default=dict), "texts": digest(json.dumps(shown))[:16]}


@dataclasses.dataclass(frozen=True)
class ViewOfMember:
    """The prompts that one frozen model reads.

    Attributes:
      key: the config key of the view, for messages.
      view: the view.
      encoder: renders and encodes rows, and truncates prompts that are too long for the model.
      prompts: the ids of the prompt of each row of a split; None for a row without a view.
      view_length: the number of positions of the model's lines in a batch.
      prompt_room: the largest number of tokens of the prompt of a sampled row; 0 if no rows are sampled.
    """

    key: str
    view: View
    encoder: Encoder
    prompts: Sequence[Ids | None] = ()
    view_length: int = 0
    prompt_room: int = 0

    def encode(
        self, rows: data.Rows, texts: Sequence[dict[str, str]], sampled: bool = False
    ) -> tuple[list[Ids | None], int]:
        """Returns the prompt of each row of a split, or None for a row without a view; and the number of truncated prompts.

        Args:
          rows: the rows as the student reads them.
          texts: the row of the dataset of each of `rows`.
          sampled: True if the responses of `rows` are ids that a model sampled, and not the encoded text of the dataset.

        Raises:
          ValueError: the response of a row does not end the text that the model reads, or a prompt has no token.
        """
        with self._named():
            shown = self.view.rows(texts)
            prompts: list[Ids | None] = [None] * len(texts)
            indices, truncated = [i for i, row in enumerate(shown) if row is not None], 0
            encoded = self.encoder.rows(
                [row | ({"response": ""} if sampled else {}) for row in shown if row is not None]
            )
            for i, one in zip(indices, encoded, strict=True):
                prompt, was_truncated = one.prompt, one.truncated
                if not sampled:
                    self._check_response(prompt, one.response, rows[i][rows.prompt_lengths[i] :].tolist())
                prompts[i], truncated = self._ids(prompt), truncated + was_truncated
        return prompts, truncated

    def _check_response(self, prompt: list[int], response: list[int], own: list[int]) -> None:
        """Checks that the tokens of a response after the view's prompt are those after the student's prompt."""
        # The student's response may be truncated, or has an end token that is not part of the text.
        length, decode = min(len(response), max(len(own) - 1, 0)), self.encoder.tokenizer.decode
        if response[:length] != own[:length]:
            raise ValueError(
                f"the response does not end the text that the model reads. After the prompt of the view, "
                f"{decode(prompt[-8:])!r}, the tokens of the response {decode(own[:10])!r} differ from the student's tokens. End "
                f"the template with the same characters as the student's prompt, such as {{prompt}} or a line break."
            )

    def _ids(self, prompt: list[int]) -> Ids:
        if not prompt:
            raise ValueError("a prompt of the view has no token; a view must show at least one.")
        return np.array(prompt, np.int32)

    @contextlib.contextmanager
    def _named(self) -> Generator[None]:
        """Puts the key of the view before the message of an error."""
        try:
            yield
        except ValueError as error:
            raise ValueError(f"{self.key}: {error}") from error

    def of_rollouts(
        self, texts: Sequence[dict[str, str]], responses: Sequence[str], group_size: int
    ) -> list[Ids | None]:
        """Returns the prompt of each sampled row, or None for a row without a view.

        Args:
          texts: the row of the dataset of each sampled row.
          responses: the texts of the responses.
          group_size: the number of neighbouring rows with the same prompt.
        """
        with self._named():
            shown = self.view.rows(texts, responses, group_size)
            encoded = self.encoder.rows([{**row, "response": ""} for row in shown if row is not None])
            return [None if row is None else self._ids(next(encoded).prompt) for row in shown]
