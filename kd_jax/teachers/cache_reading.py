"""Reads a teacher's cache: checks that the cache is complete, and reads the record of a row when the row is needed."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from safetensors import SafetensorError, safe_open

from kd_jax import data, sharding
from kd_jax.models.safetensors_io import check_header
from kd_jax.storage.checksum import file_digest
from kd_jax.storage.untrusted import printable, read_json
from kd_jax.teachers.cache_files import (
    HEAD,
    HEADER,
    LARGEST,
    MANIFEST,
    MAX_PARTS,
    SHOWN,
    TIED,
    UNTIED,
    VERSION,
    Manifest,
    counted,
    fields,
    fill_values,
    identity,
    missing_parts,
    part_path,
    part_sizes,
    row_key,
)
from kd_jax.teachers.cached import CACHED, KINDS, Cached, name_in_batch

SPLITS = ("train", "held_out")
OPEN_PARTS = 128  # the number of files that are kept open for random reads
WRITE_AGAIN = "write the cache again."  # the end of a message about a manifest that this version cannot read


def key_of_cache(member: str) -> str:
    """Returns the config key of the cache of a frozen model."""
    return "teacher.cache" if member == "teacher" else f"members.{member}.cache"


def check_manifest(path: Path, manifest: Manifest) -> None:
    """Checks that a manifest has all keys that are read later, with values of the right types and ranges.

    Raises:
      ValueError: a key is missing, or a value is wrong; the message has the path, the key and the value.
    """
    kinds = {"head": str, "head_hash": str, "tokenizer": str, "template": str, "settings": dict, "splits": dict}
    for key, kind in (kinds | {"teacher": dict} | dict.fromkeys(LARGEST, int)).items():
        if type(value := manifest.get(key)) is not kind:
            raise ValueError(f"{path}: {key!r} is {printable(value)} and not of type {kind.__name__}; {WRITE_AGAIN}")
    least = {"k": 0 if manifest["kind"] == "hidden" else 1}
    for key, largest in (LARGEST | {"k": min(LARGEST["k"], manifest["vocab_size"] - 1)}).items():
        if not (low := least.get(key, 1)) <= manifest[key] <= largest:
            raise ValueError(
                f"{path}: {key}={printable(manifest[key])} is out of range, {low} to {largest}; {WRITE_AGAIN}"
            )
    if manifest["head"] not in (TIED, UNTIED):
        raise ValueError(f"{path}: head={printable(manifest['head'])} is not {TIED!r} or {UNTIED!r}; {WRITE_AGAIN}")
    cap = manifest.get("logit_cap")  # absent if the teacher has no cap
    if cap is not None and not (isinstance(cap, int | float) and 0 < cap < 1e9):
        raise ValueError(f"{path}: logit_cap={printable(cap)} is not a number above 0 and below 1e9; {WRITE_AGAIN}")
    if not isinstance(manifest["teacher"].get("path"), str):
        raise ValueError(f"{path}: the key 'teacher' has no text 'path'; {WRITE_AGAIN}")
    if set(manifest["splits"]) - set(SPLITS):
        raise ValueError(
            f"{path}: the splits are {printable(list(manifest['splits']))} and not {SPLITS}; {WRITE_AGAIN}"
        )
    for split in SPLITS:
        about = manifest["splits"].get(split)
        if not isinstance(about, dict) or (missing := {"rows", "tokens", "hash", "temperature"} - about.keys()):
            keys = "" if not isinstance(about, dict) else f", which lacks {', '.join(sorted(missing))}"
            raise ValueError(f"{path}: the split {split!r} is {printable(about)}{keys}; {WRITE_AGAIN}")
        if type(about["rows"]) is not int or not 1 <= about["rows"] <= MAX_PARTS * manifest["part_rows"]:
            raise ValueError(
                f"{path}: the split {split!r} has {printable(about['rows'])} rows in parts of {manifest['part_rows']}, but there "
                f"may be from 1 to {MAX_PARTS} parts; choose another --part_rows."
            )
        if not isinstance(temperature := about["temperature"], int | float) or not 0 < temperature < 1e9:
            raise ValueError(
                f"{path}: the split {split!r} has the temperature {printable(temperature)}, but a temperature is above 0 and below "
                f"1e9; {WRITE_AGAIN}"
            )


@dataclasses.dataclass(frozen=True)
class Cache:
    """A complete cache.

    Attributes:
      folder: the folder of the cache.
      manifest: the inputs from which the cache was made.
      member: the name of the frozen model that the cache replaces.
    """

    folder: Path
    manifest: Manifest
    member: str = "teacher"

    @classmethod
    def open(cls, folder: Path, member: str = "teacher") -> "Cache":
        """Reads the manifest, and checks that all parts exist.

        Args:
          folder: the folder of the cache.
          member: the name of the frozen model that the cache replaces.

        Raises:
          ValueError: the folder has no cache, a cache of another version, or an incomplete cache.
        """
        if not (folder / MANIFEST).exists():
            raise ValueError(
                f"{folder} has no {MANIFEST}, so it is no cache that python -m kd_jax.cache_teacher has written."
            )
        manifest = read_json(folder / MANIFEST)
        if manifest.get("version") != VERSION or manifest.get("kind") not in KINDS:
            raise ValueError(
                f"{folder / MANIFEST} has version {printable(manifest.get('version'))} and kind "
                f"{printable(manifest.get('kind'))}, but this kd_jax reads version {VERSION} of the kinds "
                f"{', '.join(KINDS)}; {WRITE_AGAIN}"
            )
        check_manifest(folder / MANIFEST, manifest)
        if missing := missing_parts(folder, manifest):
            raise ValueError(
                f"{folder} is not complete: {len(missing)} parts are missing, the first is {part_path(folder, *missing[0])}. "
                f"Repeat the command that began the cache; it writes only the missing parts."
            )
        return cls(folder, manifest, member)

    @property
    def kind(self) -> str:
        """The kind of the cache, one of `cached.KINDS`."""
        return self.manifest["kind"]

    @property
    def teacher(self) -> Cached:
        """The cached teacher, with which a step compares the student."""
        tied, path = self.manifest["head"] == TIED, self.manifest["teacher"]["path"]
        return CACHED[self.kind](tied, path, self.member, self.manifest.get("logit_cap"))

    def load_params(self, mesh: jax.sharding.Mesh, layout: str) -> dict[str, dict[str, jax.Array]]:
        """Returns a tree with the output matrix, placed on the mesh; {} if the cache has no hidden states.

        The tree has the structure of a model's parameters.

        Args:
          mesh: the mesh of the run.
          layout: the layout, as in `sharding.tree_shardings`.
        """
        if self.kind != "hidden":
            return {}
        path, name = self.folder / HEAD, self.manifest["head"]
        group, leaf = name.split(".")
        try:
            if not path.is_file() or file_digest(path) != self.manifest["head_hash"]:
                raise ValueError(f"{path} is missing, or has other content than was written; {WRITE_AGAIN}")
            check_header(path)
            with safe_open(path, framework="numpy") as file:
                matrix = file.get_slice(name)
                shape = tuple(matrix.get_shape())
                width, vocabulary = shape[::-1] if name == TIED else shape
                if width != self.manifest["hidden_size"] or vocabulary < self.manifest["vocab_size"]:
                    raise ValueError(
                        f"{path}: the output matrix has the shape {shape}, which does not fit hidden_size="
                        f"{self.manifest['hidden_size']} and vocab_size={self.manifest['vocab_size']}; {WRITE_AGAIN}"
                    )
                tree = {group: {leaf: jax.ShapeDtypeStruct(shape, jnp.float32)}}
                placed = sharding.tree_shardings(mesh, tree, layout)
                array = jax.make_array_from_callback(shape, placed[group][leaf], lambda index: matrix[index])
                return {group: {leaf: array}}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: the output matrix {name!r} cannot be read ({error}); {WRITE_AGAIN}") from error

    def no_values(self) -> "NoValues":
        """Returns the `data.TokenValues` of rows for which the cache has no values."""
        return NoValues(self.fill_values)

    @property
    def fill_values(self) -> dict[str, np.ndarray]:
        """The values of a batch at positions that do not count, by name."""
        return {name_in_batch(name, self.member): value for name, value in fill_values(self.manifest).items()}

    def refusal(self, lines: list[str]) -> str:
        """Returns the error message for a cache that does not fit the run."""
        return (
            f"the cache {key_of_cache(self.member)}={str(self.folder)!r} does not fit this run. Write another cache with python -m "
            f"kd_jax.cache_teacher, or undo these changes:\n  " + "\n  ".join(lines[:SHOWN])
        )


@dataclasses.dataclass(frozen=True)
class NoValues:
    """A `data.TokenValues` without any values."""

    fill_values: Mapping[str, np.ndarray]

    def read(self, index: int) -> dict[str, np.ndarray]:
        """Returns an empty dict for any row."""
        return {}


@dataclasses.dataclass(frozen=True)
class JoinedValues:
    """A `data.TokenValues` with the values of several caches.

    Attributes:
      parts: the values of each cache, whose names differ.
    """

    parts: tuple["CachedValues | NoValues", ...]

    @property
    def fill_values(self) -> dict[str, np.ndarray]:
        """The values at positions that do not count."""
        return {name: value for part in self.parts for name, value in part.fill_values.items()}

    def read(self, index: int) -> dict[str, np.ndarray]:
        """Returns the values at the counted tokens of a row, by name."""
        return {name: array for part in self.parts for name, array in part.read(index).items()}


class CachedValues:
    """A `data.TokenValues` of a cache. It reads the record of a row when needed, and checks that the record is of that row."""

    def __init__(self, cache: Cache, split: str, rows: data.Rows):
        self.fill_values = cache.fill_values
        self._cache, self._split, self._rows = cache, split, rows
        self._fields, self._identity = fields(cache.manifest), identity(cache.manifest, split)
        self._open = functools.lru_cache(OPEN_PARTS)(self._open_part)

    def read(self, index: int) -> dict[str, np.ndarray]:
        """Returns the values at the counted tokens of a row, by name.

        Raises:
          ValueError: the record is damaged, or belongs to another row.
        """
        part, position = divmod(index, self._cache.manifest["part_rows"])
        path = part_path(self._cache.folder, self._split, part)
        try:
            values = self._decode(self._open(part).read([position])[0], index)
        except (RuntimeError, IndexError, ValueError) as error:
            raise ValueError(
                f"{path}: the record of row {index} is damaged ({error}). Delete this file, and repeat the command that wrote "
                f"the cache."
            ) from error
        return {name_in_batch(name, self._cache.member): array for name, array in values.items()}

    def _open_part(self, part: int) -> ArrayRecordReader:
        path = part_path(self._cache.folder, self._split, part)
        reader = ArrayRecordReader(
            str(path), "readahead_buffer_size:0,max_parallelism:0", file_reader_buffer_size=2**15
        )
        sizes = part_sizes(self._cache.manifest["splits"][self._split]["rows"], self._cache.manifest["part_rows"])
        if reader.num_records() != sizes[part]:
            raise ValueError(f"the file has {reader.num_records()} records instead of {sizes[part]}")
        return reader

    def _decode(self, content: bytes, index: int) -> dict[str, np.ndarray]:
        rows, count = self._rows, counted(self._rows, index)
        if len(content) < HEADER.itemsize:
            raise ValueError(f"the record has {len(content)} bytes, fewer than a header's {HEADER.itemsize}")
        header, start = np.frombuffer(content, HEADER, 1)[0], HEADER.itemsize
        expected = row_key(self._identity, rows, index)
        if header["row"] != index or header["key"].tobytes() != expected:
            raise ValueError(f"the record is of row {header['row']}, with other tokens or of another cache")
        shapes = {name: (count, *shape) for name, (_, shape) in self._fields.items()}
        size = start + sum(math.prod(shapes[name]) * dtype.itemsize for name, (dtype, _) in self._fields.items())
        if len(content) != size:
            raise ValueError(f"the record has {len(content)} bytes instead of {size}")
        arrays = {}
        for name, (dtype, _) in self._fields.items():
            arrays[name] = np.frombuffer(content, dtype, math.prod(shapes[name]), start).reshape(shapes[name])
            start += arrays[name].nbytes
        if "teacher_ids" in arrays and arrays["teacher_ids"].max(initial=0) >= self._cache.manifest["vocab_size"]:
            raise ValueError("the record has ids beyond the vocabulary")
        return arrays
