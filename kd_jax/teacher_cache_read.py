"""A teacher's cache on disk, read: whether it is whole, and a row's record when the row is wanted."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from safetensors import SafetensorError, safe_open

from kd_jax import data, sharding
from kd_jax.teacher_cache import KINDS, CachedTeacher
from kd_jax.teacher_cache_files import (
    HEAD,
    HEADER,
    MANIFEST,
    TIED,
    UNTIED,
    VERSION,
    Manifest,
    counted,
    fields,
    fills,
    missing_parts,
    part_path,
    part_sizes,
    row_hash,
)
from kd_jax.untrusted import read_json

OPEN_PARTS = 128  # files that are kept open for random reads


def _check_manifest(path: Path, manifest: Manifest) -> None:
    """Whether all is there that is read later, in its type and range."""
    kinds = {"k": int, "vocab_size": int, "hidden_size": int, "part_rows": int, "head": str, "tokenizer": str}
    kinds |= {"template": str, "settings": dict, "splits": dict}
    for key, kind in kinds.items():
        if not isinstance(manifest.get(key), kind):
            raise ValueError(
                f"{path}: {key!r} is {manifest.get(key)!r} and not of type {kind.__name__}; write the cache again."
            )
    low = 1 if manifest["kind"] != "hidden" else 0
    if not (
        low <= manifest["k"] < manifest["vocab_size"] and manifest["hidden_size"] > 0 and manifest["part_rows"] > 0
    ):
        raise ValueError(f"{path}: k, vocab_size, hidden_size or part_rows is out of range; write the cache again.")
    if manifest["head"] not in (TIED, UNTIED):
        raise ValueError(f"{path}: there is no output matrix {manifest['head']!r}; write the cache again.")
    for split in ("train", "held_out"):
        about = manifest["splits"].get(split)
        if not isinstance(about, dict) or {"rows", "tokens", "hash", "temperature"} - about.keys():
            raise ValueError(f"{path}: the split {split!r} is not described; write the cache again.")
        if not isinstance(about["rows"], int) or about["rows"] < 1:
            raise ValueError(f"{path}: the split {split!r} has {about['rows']!r} rows; write the cache again.")


@dataclasses.dataclass(frozen=True)
class Cache:
    """A complete cache.

    Attributes:
      folder: where it is.
      manifest: what it was made from.
    """

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: Path) -> "Cache":
        """Reads the manifest, and sees whether all parts are there.

        Raises:
          ValueError: no cache, one of another version, or one that is not complete.
        """
        if not (folder / MANIFEST).exists():
            raise ValueError(
                f"{folder} has no {MANIFEST}: it is no cache that python -m kd_jax.cache_teacher has written."
            )
        manifest = read_json(folder / MANIFEST)
        if manifest.get("version") != VERSION or manifest.get("kind") not in KINDS:
            raise ValueError(
                f"{folder / MANIFEST} has version {manifest.get('version')!r} and kind {manifest.get('kind')!r}; this kd_jax "
                f"reads version {VERSION} of {', '.join(KINDS)}. Write the cache again."
            )
        _check_manifest(folder / MANIFEST, manifest)
        if missing := missing_parts(folder, manifest):
            raise ValueError(
                f"{folder} is not complete: {len(missing)} of its parts are missing, the first one "
                f"{part_path(folder, *missing[0])}. The command that began it goes on where it was stopped."
            )
        return cls(folder, manifest)

    @property
    def kind(self) -> str:
        """Of `teacher_cache.KINDS`."""
        return self.manifest["kind"]

    @property
    def teacher(self) -> CachedTeacher:
        """What a step compares with."""
        return CachedTeacher(self.kind, self.manifest["head"] == TIED)

    def load_params(self, mesh: jax.sharding.Mesh, layout: str) -> Any:
        """The output matrix on the mesh, in the tree that it has in a model; {} where no hidden states are kept.

        Args:
          mesh: of the run.
          layout: as in `sharding.tree_shardings`.
        """
        if self.kind != "hidden":
            return {}
        path, name = self.folder / HEAD, self.manifest["head"]
        group, leaf = name.split(".")
        try:
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
        """Of rows that no cache knows: nothing."""
        return Absent(fills(self.manifest))

    def refusal(self, lines: list[str]) -> str:
        """What is said of a cache that does not fit."""
        return (
            f"the cache teacher.cache={str(self.folder)!r} does not fit this run. Write another one with python -m "
            f"kd_jax.cache_teacher, or take these back:\n  " + "\n  ".join(lines)
        )


@dataclasses.dataclass(frozen=True)
class Absent:
    """`data.Beside` with nothing in it."""

    fills: Mapping[str, np.ndarray]

    def read(self, index: int) -> dict[str, np.ndarray]:
        """Nothing of any row."""
        return {}


class Kept:
    """`data.Beside` of a cache: reads a record when its row is wanted, and looks whether it is that row's."""

    def __init__(self, cache: Cache, split: str, rows: data.Rows):
        self.fills = fills(cache.manifest)
        self._cache, self._split, self._rows = cache, split, rows
        self._fields = fields(cache.manifest)
        self._open = functools.lru_cache(OPEN_PARTS)(self._open_part)

    def read(self, index: int) -> dict[str, np.ndarray]:
        """The numbers of a row's tokens that count, by name.

        Raises:
          ValueError: a record that is damaged, or of another row.
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

    def _open_part(self, part: int) -> Any:
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
        expected = row_hash(rows[index], int(rows.first_counted[index]))
        if header["row"] != index or header["tokens"].tobytes() != expected:
            raise ValueError(f"it is row {header['row']}'s, with other tokens")
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
