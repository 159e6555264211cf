"""Writes a teacher's cache: the manifest, the output matrix, and a record with the values of each row."""

import errno
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from safetensors.numpy import save_file

from kd_jax import data
from kd_jax.storage import is_partial, storing, write_whole, writing_whole
from kd_jax.storage.checksum import digest, file_digest
from kd_jax.storage.directory import LOCK
from kd_jax.storage.files import Json
from kd_jax.storage.untrusted import clip, printable

MANIFEST, HEAD, TOKENIZER = "manifest.json", "head.safetensors", "tokenizer"
TIED, UNTIED = "embed.embedding", "head.kernel"  # names of the output matrix, as in a model's parameters
VERSION = 2  # in version 1 the hash of a record did not depend on the teacher, and the output matrix had no hash
# The header of a record: the row's index, the row's key, and the number of counted tokens.
HEADER = np.dtype([("row", "<u8"), ("key", "u1", 16), ("count", "<u8")])
# The largest allowed values in a manifest.
LARGEST = {"k": 2**16, "vocab_size": 2**24, "hidden_size": 2**20, "part_rows": 2**32}
MAX_PARTS = 2**16  # the largest number of parts of a split; a reader checks that the file of each part exists
SHOWN = 20  # the largest number of differences that a message lists
Manifest = Json
Fields = dict[str, tuple[np.dtype, tuple[int, ...]]]  # name of an array -> type and shape for one token


def fields(manifest: Manifest) -> Fields:
    """Returns the type and shape of each array for one token, by the name in a batch and in the order of a record."""
    k, ids = manifest["k"], np.dtype("<u2" if manifest["vocab_size"] <= 2**16 else "<u4")
    number = np.dtype("<f4")
    by_kind: dict[str, Fields] = {
        "hidden": {"teacher_hidden": (np.dtype("<u2"), (manifest["hidden_size"],))},  # the bits of bfloat16
        "top_k": {"teacher_ids": (ids, (k,)), "teacher_log_probs": (number, (k + 1,))},
        "samples": {
            "teacher_ids": (ids, (k,)), "teacher_weights": (number, (k,)), "teacher_entropy": (number, ()),
        },
    }  # fmt: skip
    return by_kind[manifest["kind"]]


def fill_values(manifest: Manifest) -> dict[str, np.ndarray]:
    """Returns the values of a batch at positions that do not count.

    The values are finite, because a loss may be computed over them. For top_k they are a distribution.
    """
    values = {}
    for name, (dtype, shape) in fields(manifest).items():
        values[name] = np.zeros(shape, np.int32 if name == "teacher_ids" else dtype)
    if manifest["kind"] == "top_k":
        values["teacher_ids"] += np.arange(manifest["k"], dtype=np.int32)
        values["teacher_log_probs"] -= np.log(np.float32(manifest["k"] + 1))
    return values


def identity(manifest: Manifest, split: str) -> bytes:
    """Returns a hash of the manifest's entries that decide the values of a record. The teacher's path is not included."""
    excluded = ("splits", "settings", "part_rows", "head_hash")  # these keys decide the rows and the files of the rows
    content = {name: value for name, value in manifest.items() if name not in excluded}
    content["teacher"] = {name: value for name, value in manifest["teacher"].items() if name != "path"}
    about = manifest["splits"][split]
    content["split"] = [split, float(about["temperature"]), *([about["view"]] if about.get("view") else [])]
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode()).digest()


def row_key(identity: bytes, rows: data.Rows, index: int) -> bytes:
    """Returns the hash of a row's tokens, the positions of its counted tokens, and the identity of the teacher."""
    first_counted = np.array([rows.first_counted[index]], "<i8").tobytes()
    several = b"" if rows.counted is None else rows.targets_counted(index).tobytes()
    content = first_counted + rows[index].astype("<i4").tobytes() + identity + several
    return hashlib.blake2b(content, digest_size=HEADER["key"].shape[0]).digest()


def describe_rows(rows: data.Rows) -> Json:
    """Returns the number of rows, the number of counted tokens, and a hash of all rows."""
    arrays = [array.astype("<i8").tobytes() for array in (rows.tokens, rows.offsets, rows.first_counted)]
    arrays += [] if rows.counted is None else [rows.counted.tobytes()]
    tokens = sum(counted(rows, index) for index in range(len(rows)))
    return {"rows": len(rows), "tokens": tokens, "hash": digest(*arrays)[:16]}


def counted(rows: data.Rows, index: int) -> int:
    """Returns the number of a row's counted tokens. As in `data.batches`, the first token of a row is never a target."""
    return int(rows.targets_counted(index).sum())


def differences(written: object, wanted: object, prefix: str = "") -> list[str]:
    """Returns a line for each value that differs between a cache's manifest and the values that are needed now."""
    if isinstance(written, Mapping) and isinstance(wanted, Mapping):
        keys = [*written, *(key for key in wanted if key not in written)]
        lines = (differences(written.get(key), wanted.get(key), f"{prefix}.{key}" if prefix else key) for key in keys)
        return [line for entry in lines for line in entry]
    return (
        [] if written == wanted else [f"{clip(prefix, 80)}: {printable(written)} in the cache, {printable(wanted)} now"]
    )


def unknown_name(folder: Path) -> str:
    """Returns the first name in an unfinished cache that kd_jax does not write; "" if there is no such name."""
    known = rf"{re.escape(HEAD)}(\.partial-\d+)?|{re.escape(MANIFEST)}\.partial-\d+|{TOKENIZER}|{LOCK}"
    names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    return next((name for name in names if not re.fullmatch(known, name)), "")


def partials(folder: Path) -> list[Path]:
    """Returns the partial files of calls that were killed."""
    paths = [*folder.glob("*.partial-*"), *folder.glob("*/*.array_record.partial-*")]
    return [path for path in paths if is_partial(path)]


def part_sizes(count: int, part_rows: int) -> list[int]:
    """Returns the number of rows in each of the files into which `count` rows are divided."""
    return [min(part_rows, count - start) for start in range(0, count, part_rows)]


def part_path(folder: Path, split: str, part: int) -> Path:
    """Returns the path of a part of the rows."""
    return folder / split / f"{part:06d}.array_record"


def all_parts(manifest: Manifest) -> list[tuple[str, int]]:
    """Returns every part, as (split, number)."""
    return [
        (split, part)
        for split, about in manifest["splits"].items()
        for part in range(len(part_sizes(about["rows"], manifest["part_rows"])))
    ]


def missing_parts(folder: Path, manifest: Manifest) -> list[tuple[str, int]]:
    """Returns the parts that are not written yet."""
    return [part for part in all_parts(manifest) if not part_path(folder, *part).is_file()]


def write_part(path: Path, records: Iterable[bytes], kind: str) -> None:
    """Writes the records of a part, completely or not at all. Each record has a checksum."""
    # A group has one record, for random reads. Hidden states do not compress; token ids and padded samples do.
    options, count = f"group_size:1,{'uncompressed' if kind == 'hidden' else 'zstd:3'}", 0
    with writing_whole(path) as partial:
        with storing(path):
            writer = ArrayRecordWriter(str(partial), options)
        for record in records:  # the iterator computes the records, so its errors must not count as storage errors
            with storing(path):
                writer.write(record)
            count += 1
        with storing(path):
            writer.close()
            if ArrayRecordReader(str(partial)).num_records() != count:
                raise OSError(errno.ENOSPC, f"fewer than the {count} records were written; the disk may be full")


def record(
    manifest: Manifest, split: str, rows: data.Rows, index: int, values: Mapping[str, np.ndarray]
) -> bytes:  # fmt: skip
    """Returns the record of a row.

    Args:
      manifest: the manifest, which defines the arrays of a record.
      split: 'train' or 'held_out'.
      rows: the rows of the split.
      index: the index of the row.
      values: name -> array [counted tokens, ...].
    """
    header = np.zeros((), HEADER)
    header["row"], header["count"] = index, counted(rows, index)
    key = row_key(identity(manifest, split), rows, index)
    header["key"] = np.frombuffer(key, np.uint8)
    arrays = []
    for name, (dtype, shape) in fields(manifest).items():
        if values[name].shape != (header["count"], *shape):
            raise ValueError(
                f"row {index}: {name} has the shape {values[name].shape}, but must have {(header['count'], *shape)}."
            )
        arrays.append(values[name].astype(dtype).tobytes())
    return header.tobytes() + b"".join(arrays)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest, completely or not at all."""
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")


def write_head(folder: Path, name: str, matrix: np.ndarray) -> str:
    """Writes the output matrix, completely or not at all, and returns its `file_digest`."""
    with storing(folder / HEAD), writing_whole(folder / HEAD) as partial:
        save_file({name: np.ascontiguousarray(matrix)}, partial)
    return file_digest(folder / HEAD)


def write_tokenizer(folder: Path, tokenizer: data.Tokenizer) -> None:
    """Writes the tokenizer, and the ids of the special tokens, because tokenizer.json does not name all of them."""
    tokenizer.save(folder / TOKENIZER)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.end_ids, "pad_token_id": tokenizer.pad_id}
    (folder / TOKENIZER / "generation_config.json").write_text(json.dumps(ids) + "\n", encoding="utf-8")
