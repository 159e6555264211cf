"""The tfds builder: rows of texts, built once for each content and read at random.

A row has name, prompt, context, response, and the further columns of its dataset.
"""

import contextlib
import dataclasses
import inspect
import itertools
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import tensorflow_datasets as tfds

from kd_jax import storage
from kd_jax.data import docstrings, dolly, gsm8k, instructions, jsonl, text
from kd_jax.data.formats import MESSAGES
from kd_jax.resolve import nearest
from kd_jax.settings.value_types import EXPECTED
from kd_jax.storage import remote, untrusted
from kd_jax.storage.files import AnyPath, Json

Row = Mapping[str, str]
DEFAULT_DIR = str(tfds.core.constants.DATA_DIR)
SIGN = "dataset_info.json"  # copied last, so that a copied dataset with this file is complete
FIELDS = jsonl.ROW
AnyRow = TypeVar("AnyRow", bound=Mapping[str, Any])
Splits = Mapping[str, Callable[[], Iterable[AnyRow]]]  # split -> () -> rows
Source = Callable[..., tuple[str, Splits[AnyRow]]]  # (**options) -> (fingerprint of the content, splits)
SOURCES: dict[str, Source[Row]] = {
    "docstrings": docstrings.source,
    "dolly": dolly.source,
    "gsm8k": gsm8k.source,
    "jsonl": jsonl.source,
    "text": text.source,
}
# The further columns of a dataset. A source with an option `columns` also has the columns that this option names.
COLUMNS: dict[str, tuple[str, ...]] = {
    "docstrings": docstrings.COLUMNS,
    "dolly": dolly.COLUMNS,
    "gsm8k": gsm8k.COLUMNS,
}
# Sources for evaluation only, whose rows have prompt, context and references. The rows are read directly from a file.
EVALUATION: dict[str, Source[Json]] = {name: partial(instructions.source, name) for name in instructions.FILES}


@dataclasses.dataclass
class RowsConfig(tfds.core.BuilderConfig):
    """The configuration of a dataset. Its name contains the fingerprint, so that changed content is built again.

    Attributes:
      splits: the splits of the dataset's source.
      columns: the names of the columns in addition to `FIELDS`.
      source: the name of the dataset and its options, for messages.
    """

    splits: Splits[Row] = dataclasses.field(default_factory=dict, repr=False)
    columns: tuple[str, ...] = ()
    source: str = dataclasses.field(default="", repr=False)


class KdJaxRows(tfds.core.GeneratorBasedBuilder):
    """Builds rows of prompts and responses as array_record files, without TensorFlow."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        fields = (*FIELDS, *self.builder_config.columns)
        features = tfds.features.FeaturesDict({field: tfds.features.Text() for field in fields})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[int, dict[str, str]]]]:
        generators = {}
        for split, rows in self.builder_config.splits.items():
            remaining = iter(rows())
            for first in remaining:  # tfds cannot write a split without rows: such a split is omitted
                generators[split] = self._generate_examples(itertools.chain([first], remaining))
                break
        if not generators:
            raise ValueError(f"the dataset {self.builder_config.source} has no rows in any split: is its file empty?")
        return generators

    def _create_builder_config(self, builder_config: RowsConfig, version: object) -> RowsConfig:
        return builder_config  # tfds would warn that its fixed list lacks the config

    def _generate_examples(self, rows: Iterable[Row]) -> Iterator[tuple[int, dict[str, str]]]:
        for index, row in enumerate(rows):
            further = {column: row[column] for column in self.builder_config.columns}
            yield index, {field: row.get(field, "") for field in FIELDS} | further


class _Decoded:
    """A sequence of rows as dicts of str, because tfds without TensorFlow returns bytes."""

    def __init__(self, source: Sequence[Mapping[str, bytes]], folder: AnyPath):
        self._source, self._folder = source, folder

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, str]:
        if not 0 <= index < len(self):
            raise IndexError(f"there is no row {index}; the split has {len(self)} rows.")
        with _named(self._folder):
            return {field: value.decode() for field, value in self._source[index].items()}

    def __iter__(self) -> Iterator[dict[str, str]]:
        return (self[i] for i in range(len(self)))


@contextlib.contextmanager
def _named(folder: AnyPath) -> Iterator[None]:
    """Turns any error about a built dataset, such as a wrong checksum, into a ValueError that names the folder."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"{folder}: the built dataset cannot be read back ({type(error).__name__}: {untrusted.clip(str(error))}); "
            f"delete that folder, and the dataset is built again."
        ) from error


def open_builder(data_dir: str | None, config: RowsConfig) -> KdJaxRows:
    """Returns the builder of a dataset. If the dataset has been built, the builder has read dataset_info.json."""
    with _named(f"{data_dir or DEFAULT_DIR}/{KdJaxRows.name}/{config.name}"):
        return KdJaxRows(data_dir=data_dir, config=config, file_format="array_record")


def read_back(builder: tfds.core.DatasetBuilder, split: str) -> _Decoded:
    """Returns the rows of a split that has been built.

    Args:
      builder: the builder of the dataset.
      split: the name of the split.

    Returns:
      A sequence of rows with the columns of `columns`, each a str.

    Raises:
      ValueError: the split is empty, its files are damaged or outside the dataset's folder, or the number of rows
        differs from dataset_info.json.
    """
    folder = builder.data_path
    sizes = {known_split: info.num_examples for known_split, info in builder.info.splits.items()}
    if not sizes.get(split):
        name = builder.builder_config.name.rpartition("-")[0]
        raise ValueError(
            f"the split {split!r} of {name} is empty; rows of each split: {sizes}, in {folder}. Give the dataset more data or a "
            f"file of held-out rows, or choose another split (data.train_split, data.eval_split)."
        )
    with _named(folder):
        for file in builder.info.splits[split].filepaths:
            if file.parent != folder:
                raise ValueError(f"dataset_info.json names the file {file}, outside the folder")
        source = builder.as_data_source(split=split)
        if len(source) != sizes[split]:
            raise ValueError(f"{len(source)} rows of {split}, and dataset_info.json says {sizes[split]}")
    return _Decoded(source, folder)


def load(name: str, *, split: str, data_dir: str | None = None, **options: object) -> _Decoded:
    """Returns the rows of a split, and builds the dataset first if it is not on disk.

    The folder of a dataset appears only when the dataset is complete, so no incomplete dataset is read. The name of the
    folder contains the fingerprint of the content, so no outdated dataset is read.

    Args:
      name: the dataset, a name in `SOURCES`.
      split: the split: train, validation or test, if the dataset has it.
      data_dir: the folder or address of built datasets; None means the default folder of tensorflow_datasets.
      **options: keyword arguments of the dataset's `source` function.

    Returns:
      A sequence of rows with the columns of `columns`, each a str.

    Raises:
      ValueError: the name, an option or the split is unknown, the split is empty, or a row cannot be read.
      OSError: the dataset cannot be written, for example because the disk is full.
    """
    if name in EVALUATION:
        raise ValueError(
            f"the dataset {name} is for evaluation only, with python -m kd_jax.evaluate --data={name}; the datasets for "
            f"training and validation are {', '.join(SOURCES)}."
        )
    fingerprint, splits = _open(name, SOURCES, split, options)
    further = (*_further(name, options), *_of_turns(name, options))
    source = f"{name}({', '.join(f'{option}={value!r}' for option, value in options.items())})"
    # pyrefly: ignore[unexpected-keyword]  # tfds hides that its BuilderConfig is a dataclass
    config = RowsConfig(name=f"{name}-{fingerprint}", splits=splits, columns=further, source=source)
    address = data_dir if data_dir and remote.is_remote(data_dir) else ""
    data_dir = str(remote.stand_in(address)) if address else data_dir
    builder = open_builder(data_dir, config)
    if address and not builder.data_path.exists():  # array_record can only use local files
        address += f"/{builder.data_path.relative_to(data_dir)}"
        remote.fetch_folder(address, builder.data_path, SIGN)
        builder = open_builder(data_dir, config)
    if not builder.data_path.exists():
        try:
            with storage.storing(builder.data_path):
                builder.download_and_prepare()
        except OSError:
            # tfds builds in a temporary folder and renames it. Renaming fails if another process was faster.
            if not builder.data_path.exists():
                raise
        if address:
            remote.store_folder(builder.data_path, address, SIGN)
        builder = open_builder(data_dir, config)
    return read_back(builder, split)


def fingerprint(name: str, *, split: str, **options: object) -> str:
    """Returns the fingerprint of a dataset's content. The dataset is not built.

    Args:
      name, split, **options: the arguments of `load`.

    Raises:
      ValueError: the name, an option, the split or a file is wrong, as in `load`.
    """
    return _open(name, SOURCES, split, options)[0]


def columns(name: str, **options: object) -> tuple[str, ...]:
    """Returns the names of a dataset's columns. The dataset is not built, and no file is read.

    Args:
      name: the dataset, a name in `SOURCES`.
      **options: keyword arguments of the dataset's `source` function.

    Raises:
      ValueError: the name or an option is unknown, an option has the wrong type, or a column's name is not allowed.

    Example:
      >>> columns("gsm8k")
      ('name', 'prompt', 'context', 'response', 'answer')
      >>> columns("jsonl", path="rows.jsonl", columns=("domain",))
      ('name', 'prompt', 'context', 'response', 'domain')
    """
    _check(name, SOURCES, options)
    further = _further(name, options)
    jsonl.check_columns(further)
    return (*FIELDS, *further)


def _further(name: str, options: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the names of the columns in addition to `FIELDS`."""
    return (*COLUMNS.get(name, ()), *options.get("columns", ()))


def _of_turns(name: str, options: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the column of a conversation's turns, if the rows are conversations."""
    return (MESSAGES,) if name == "jsonl" and jsonl.format_of(**options).has_turns else ()


def load_references(name: str, *, split: str, data_dir: str | None = None, **options: object) -> list[Json]:
    """Returns the rows of a split for evaluation. Each row has prompt, context and references.

    Args:
      name: a name in `EVALUATION`, or a name in `SOURCES`. The response of a row of `SOURCES` is the only reference.
      split, data_dir, **options: the arguments of `load`.

    Returns:
      The rows. The references of a row are a list of texts that are all good answers.
    """
    if name in SOURCES:
        return [
            row | {"references": [row["response"]]} for row in load(name, split=split, data_dir=data_dir, **options)
        ]
    return [dict(row) for row in _open(name, SOURCES | EVALUATION, split, options)[1][split]()]


def splits(name: str, **options: object) -> tuple[str, ...]:
    """Returns the names of the splits that a dataset has with these options.

    Args:
      name: the name of a dataset for training or for evaluation.
      **options: keyword arguments of the dataset's `source` function.
    """
    return tuple(_open(name, SOURCES | EVALUATION, None, options)[1])


def _open(
    name: str, sources: Mapping[str, Source[AnyRow]], split: str | None, options: Mapping[str, object]
) -> tuple[str, Splits[AnyRow]]:
    """Checks a dataset's name, options and split, and returns the dataset's fingerprint and splits."""
    _check(name, sources, options)
    fingerprint, splits = sources[name](**options)
    if split is not None and split not in splits:
        raise ValueError(f"the dataset {name} has no split {split!r}; the splits are {', '.join(splits)}.")
    return fingerprint, splits


def _check(name: str, sources: Mapping[str, Source[AnyRow]], options: Mapping[str, object]) -> None:
    """Checks a dataset's name and options."""
    if name not in sources:
        raise ValueError(f"there is no dataset {name!r}{nearest(name, sources)}; known: {', '.join(sources)}.")
    known = inspect.signature(sources[name]).parameters
    for option in options:
        if option not in known:
            raise ValueError(
                f"the dataset {name} has no option {option!r}{nearest(option, known)}; the options are {', '.join(known)}."
            )
    missing = [p.name for p in known.values() if p.default is p.empty and p.name not in options]
    if missing:
        raise ValueError(f"the dataset {name} needs data.options.{missing[0]}, which is not set.")
    for option, value in options.items():
        if not _fits(value, known[option].annotation):
            raise ValueError(
                f"data.options.{option}={value!r} of the dataset {name} must be {_in_words(known[option].annotation)}."
            )


def _fits(value: object, annotation: Any) -> bool:
    """Returns True if a value has the annotated type: str, int, float, bool, a tuple of str, or a union of these."""
    if isinstance(annotation, types.UnionType):
        return any(_fits(value, kind) for kind in typing.get_args(annotation))
    if typing.get_origin(annotation) is tuple:
        return isinstance(value, tuple | list) and all(isinstance(entry, str) for entry in value)
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, annotation)


def _in_words(annotation: Any) -> str:
    """Returns the annotated type in words, for a message."""
    if isinstance(annotation, types.UnionType):
        return " or ".join(map(_in_words, typing.get_args(annotation)))
    if typing.get_origin(annotation) is tuple:
        return "a tuple of texts, such as ('a', 'b')"
    return EXPECTED[annotation]
