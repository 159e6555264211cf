"""Reads a teacher's cache: checks that the cache is complete, and reads a row's record when the row is needed."""

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
from kd_jax.storage.untrusted import read_json, shown
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
    fills,
    identity,
    missing_parts,
    part_path,
    part_sizes,
    row_key,
)
from kd_jax.teachers.cached import CACHED, KINDS, Cached

SPLITS = ("train", "held_out")
OPEN_PARTS = 128  # number of files that are kept open for random reads


def check_manifest(path: Path, manifest: Manifest) -> None:
    """Checks that a manifest has all keys that are read later, with the right types and ranges."""
    kinds = {"head": str, "head_hash": str, "tokenizer": str, "template": str, "settings": dict, "splits": dict}
    for key, kind in (kinds | {"teacher": dict} | dict.fromkeys(LARGEST, int)).items():
        if type(value := manifest.get(key)) is not kind:
            raise ValueError(
                f"{path}: {key!r} is {shown(value)} and not of type {kind.__name__}; write the cache again."
            )
    least = {"k": 0 if manifest["kind"] == "hidden" else 1}
    for key, largest in (LARGEST | {"k": min(LARGEST["k"], manifest["vocab_size"] - 1)}).items():
        if not (low := least.get(key, 1)) <= manifest[key] <= largest:
            raise ValueError(
                f"{path}: {key}={shown(manifest[key])} is out of range, {low} to {largest}; write the cache again."
            )
    if manifest["head"] not in (TIED, UNTIED):
        raise ValueError(f"{path}: there is no output matrix {shown(manifest['head'])}; write the cache again.")
    if not isinstance(manifest["teacher"].get("path"), str):
        raise ValueError(f"{path}: the teacher has no path; write the cache again.")
    if set(manifest["splits"]) - set(SPLITS):
        raise ValueError(
            f"{path}: it has the splits {shown(list(manifest['splits']))}, not {SPLITS}; write the cache again."
        )
    for split in SPLITS:
        about = manifest["splits"].get(split)
        if not isinstance(about, dict) or {"rows", "tokens", "hash", "temperature"} - about.keys():
            raise ValueError(f"{path}: the split {split!r} is not described; write the cache again.")
        if type(about["rows"]) is not int or not 1 <= about["rows"] <= MAX_PARTS * manifest["part_rows"]:
            raise ValueError(
                f"{path}: the split {split!r} has {shown(about['rows'])} rows, in parts of {manifest['part_rows']}; at most "
                f"{MAX_PARTS} parts are read; choose another --part_rows."
            )
        if not isinstance(temperature := about["temperature"], int | float) or not 0 < temperature < 1e9:
            raise ValueError(f"{path}: the split {split!r} has the temperature {shown(temperature)}.")


@dataclasses.dataclass(frozen=True)
class Cache:
    """A complete cache.

    Attributes:
      folder: the folder of the cache.
      manifest: the manifest: the inputs from which the cache was made.
    """

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: Path) -> "Cache":
        """Reads the manifest, and checks that all parts exist.

        Raises:
          ValueError: the folder has no cache, a cache of another version, or an incomplete cache.
        """
        if not (folder / MANIFEST).exists():
            raise ValueError(
                f"{folder} has no {MANIFEST}: it is no cache that python -m kd_jax.cache_teacher has written."
            )
        manifest = read_json(folder / MANIFEST)
        if manifest.get("version") != VERSION or manifest.get("kind") not in KINDS:
            raise ValueError(
                f"{folder / MANIFEST} has version {shown(manifest.get('version'))} and kind {shown(manifest.get('kind'))}; this "
                f"kd_jax reads version {VERSION} of {', '.join(KINDS)}. Write the cache again."
            )
        check_manifest(folder / MANIFEST, manifest)
        if missing := missing_parts(folder, manifest):
            raise ValueError(
                f"{folder} is not complete: {len(missing)} of its parts are missing, the first one "
                f"{part_path(folder, *missing[0])}. The command that began it goes on where it was stopped."
            )
        return cls(folder, manifest)

    @property
    def kind(self) -> str:
        """The kind of the cache, one of `cached.KINDS`."""
        return self.manifest["kind"]

    @property
    def teacher(self) -> Cached:
        """The cached teacher, with which a step compares the student."""
        return CACHED[self.kind](self.manifest["head"] == TIED, self.manifest["teacher"]["path"])

    def load_params(self, mesh: jax.sharding.Mesh, layout: str) -> dict[str, dict[str, jax.Array]]:
        """Returns the output matrix on the mesh, in a tree like a model's; {} if the cache has no hidden states.

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
                raise ValueError(f"{path}: this is not the output matrix that was written; write the cache again.")
            check_header(path)
            with safe_open(path, framework="numpy") as file:
                matrix = file.get_slice(name)
                shape = tuple(matrix.get_shape())
                width, vocabulary = shape[::-1] if name == TIED else shape
                if width != self.manifest["hidden_size"] or vocabulary < self.manifest["vocab_size"]:
                    raise ValueError(
                        f"{path}: the output matrix has the shape {shape}, which fits no hidden state here."
                    )
                tree = {group: {leaf: jax.ShapeDtypeStruct(shape, jnp.float32)}}
                placed = sharding.tree_shardings(mesh, tree, layout)
                array = jax.make_array_from_callback(shape, placed[group][leaf], lambda index: matrix[index])
                return {group: {leaf: array}}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: the output matrix {name!r} cannot be read ({error}); write it again.") from error

    def absent(self) -> "Absent":
        """Returns the values beside rows that no cache has."""
        return Absent(fills(self.manifest))

    def refusal(self, lines: list[str]) -> str:
        """Returns the error message for a cache that does not fit the run."""
        return (
            f"the cache teacher.cache={str(self.folder)!r} does not fit this run. Write another one with python -m "
            f"kd_jax.cache_teacher, or take these back:\n  " + "\n  ".join(lines[:SHOWN])
        )


@dataclasses.dataclass(frozen=True)
class Absent:
    """A `data.Beside` without any values."""

    fills: Mapping[str, np.ndarray]

    def read(self, index: int) -> dict[str, np.ndarray]:
        """Returns an empty dict for any row."""
        return {}


class Kept:
    """A `data.Beside` of a cache, which reads the record of a row when needed and checks that it belongs to that row."""

    def __init__(self, cache: Cache, split: str, rows: data.Rows):
        self.fills = fills(cache.manifest)
        self._cache, self._split, self._rows = cache, split, rows
        self._fields, self._identity = fields(cache.manifest), identity(cache.manifest, split)
        self._open = functools.lru_cache(OPEN_PARTS)(self._open_part)

    def read(self, index: int) -> dict[str, np.ndarray]:
        """Returns the values at the counted tokens of a row, by name.

        Raises:
          ValueError: the record is damaged, or belongs to another row.
        """
        part, place = divmod(index, self._cache.manifest["part_rows"])
        path = part_path(self._cache.folder, self._split, part)
        try:
            return self._decode(self._open(part).read([place])[0], index)
        except (RuntimeError, IndexError, ValueError) as error:
            raise ValueError(
                f"{path}: the record of row {index} is damaged ({error}). Delete this file, and python -m kd_jax.cache_teacher "
                f"with the options of before writes it again."
            ) from error

    def _open_part(self, part: int) -> ArrayRecordReader:
        path = part_path(self._cache.folder, self._split, part)
        reader = ArrayRecordReader(
            str(path), "readahead_buffer_size:0,max_parallelism:0", file_reader_buffer_size=2**15
        )
        sizes = part_sizes(self._cache.manifest["splits"][self._split]["rows"], self._cache.manifest["part_rows"])
        if reader.num_records() != sizes[part]:
            raise ValueError(f"the file has {reader.num_records()} records in place of {sizes[part]}")
        return reader

    def _decode(self, content: bytes, index: int) -> dict[str, np.ndarray]:
        rows, count = self._rows, counted(self._rows, index)
        if len(content) < HEADER.itemsize:
            raise ValueError(f"it has {len(content)} bytes")
        header, start, found = np.frombuffer(content, HEADER, 1)[0], HEADER.itemsize, {}
        expected = row_key(self._identity, rows[index], int(rows.first_counted[index]))
        if header["row"] != index or header["key"].tobytes() != expected:
            raise ValueError(f"it is row {header['row']}'s, of other tokens or of another cache")
        shapes = {name: (count, *shape) for name, (_, shape) in self._fields.items()}
        size = start + sum(math.prod(shapes[name]) * dtype.itemsize for name, (dtype, _) in self._fields.items())
        if len(content) != size:
            raise ValueError(f"it has {len(content)} bytes in place of {size}")
        for name, (dtype, _) in self._fields.items():
            values = np.frombuffer(content, dtype, math.prod(shapes[name]), start).reshape(shapes[name])
            start, found[name] = start + values.nbytes, values
        if "teacher_ids" in found and found["teacher_ids"].max(initial=0) >= self._cache.manifest["vocab_size"]:
            raise ValueError("it has ids beyond the vocabulary")
        return found
