"""Functions that read and write a folder of safetensors files, one tensor at a time."""

import contextlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from kd_jax.storage import storing, untrusted

MAX_HEADER = 32 * untrusted.MIB  # the largest header or index in bytes, enough for some 300,000 tensors
_NAME = re.compile(r"[\w-][\w.-]{0,200}\.safetensors", re.ASCII)
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# The type on disk -> the type in NumPy. Importing jax.numpy registers bfloat16 (ml_dtypes) with NumPy.
_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16, "F64": np.float64}
_QUANTISED = ("I8", "U8", "F8", "F6", "F4", "I4", "U4")  # the prefixes of the type names of quantised weights


class _Slice(Protocol):
    """A tensor of an open file, whose values are not read yet."""

    def get_dtype(self) -> str: ...

    def get_shape(self) -> list[int]: ...

    def __getitem__(self, index: tuple[slice, ...], /) -> np.ndarray: ...


class _File(Protocol):
    """An open safetensors file."""

    def keys(self) -> list[str]: ...

    def get_slice(self, name: str, /) -> _Slice: ...


class Reader:
    """The tensors of a folder by name. Only `read` reads values, and only the requested slice.

    Attributes:
      folder: the folder of the files.
    """

    def __init__(self, files: Mapping[str, _File], owners: Mapping[str, str], folder: Path):
        self._files, self._owners, self.folder = files, owners, folder

    @property
    def names(self) -> set[str]:
        """The names of all tensors."""
        return set(self._owners)

    def file(self, name: str) -> Path:
        """Returns the file that holds the tensor."""
        return self.folder / self._owners[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the tensor's shape, from the header.

        Raises:
          ValueError: the tensor's type is not float32, bfloat16, float16 or float64.
        """
        tensor = self._slice(name)
        if (kind := tensor.get_dtype()) not in _DTYPES:
            quantised = "Quantised checkpoints are not supported: use a checkpoint in float32, bfloat16 or float16."
            raise ValueError(
                f"{self.file(name)}: tensor {untrusted.printable(name)} has type {kind}; expected one of {', '.join(_DTYPES)}. "
                f"{quantised if kind.startswith(_QUANTISED) else 'A weight is a floating-point number.'}"
            )
        return tuple(tensor.get_shape())

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Returns the tensor's values at `index`, which has a slice for each axis with its ends within the shape."""
        try:
            return self._slice(name)[index]
        except SafetensorError as error:
            raise ValueError(
                f"{self.file(name)}: tensor {untrusted.printable(name)} cannot be read ({untrusted.clip(str(error))})."
            ) from error

    def _slice(self, name: str) -> _Slice:
        return self._files[self._owners[name]].get_slice(name)


def weight_files(folder: Path) -> list[Path]:
    """Returns the files that `open_folder` reads, including the index and missing files.

    Without weights the list is empty.
    """
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    if not (folder / INDEX).exists():
        return []
    return [folder / INDEX, *(folder / name for name in sorted(set(_read_index(folder / INDEX).values())))]


@contextlib.contextmanager
def open_folder(folder: Path) -> Iterator[Reader]:
    """Opens `model.safetensors`, or the files that `model.safetensors.index.json` lists.

    Raises:
      ValueError: neither file exists; a file is missing, damaged or outside the folder; or index and files disagree.
    """
    with contextlib.ExitStack() as stack:
        if (folder / SINGLE).exists():
            files = {SINGLE: _open(folder / SINGLE, stack)}
            owners = {name: SINGLE for name in files[SINGLE].keys()}
        elif (folder / INDEX).exists():
            owners = _read_index(folder / INDEX)
            files = {name: _open(folder / name, stack) for name in sorted(set(owners.values()))}
            _check_index(folder, owners, {name: set(file.keys()) for name, file in files.items()})
        else:
            pickled = sorted(file.name for file in folder.glob("*.bin"))
            hint = (
                f" The folder has {untrusted.clip(', '.join(pickled))}: pickled files can run code when read, so they are "
                "refused; convert them to safetensors first (transformers' save_pretrained writes them)."
            )
            raise ValueError(f"{folder}: the folder has neither {SINGLE} nor {INDEX}.{hint if pickled else ''}")
        yield Reader(files, owners, folder)


@contextlib.contextmanager
def open_file(folder: Path, name: str) -> Iterator[Reader]:
    """Opens one file of a folder.

    Raises:
      ValueError: the file is damaged.
    """
    with contextlib.ExitStack() as stack:
        file = _open(folder / name, stack)
        yield Reader({name: file}, dict.fromkeys(file.keys(), name), folder)


def _open(file: Path, stack: contextlib.ExitStack) -> _File:
    if not file.is_file():
        raise ValueError(f"{file}: the file is missing, but {INDEX} lists this file.")
    try:
        check_header(file)
        return stack.enter_context(safe_open(file, framework="numpy"))
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror or error}).") from error
    except SafetensorError as error:
        raise ValueError(
            f"{file}: not a complete safetensors file ({untrusted.clip(str(error))}); download or write the file again."
        ) from error


def check_header(file: Path) -> None:
    """Checks that the header is strict JSON and not longer than the file, before safetensors reads the file.

    safetensors does not check this. safetensors checks that the shape, type and offsets of a tensor agree, and that the
    tensors fill the file without gap or overlap. Memory of a tensor's size is allocated only after these checks.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        untrusted.refuse_pointer(file, stream.read(len(untrusted.LFS)))
        stream.seek(0)
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(
                f"{file}: not a complete safetensors file (a header of {length} bytes in a file of {size}); download or write the "
                f"file again."
            )
        if length > MAX_HEADER:
            raise ValueError(f"{file}: the header has {length} bytes; at most {MAX_HEADER} are read.")
        header = untrusted.parse_json(stream.read(length), str(file))
    if not isinstance(header, dict):
        raise ValueError(f"{file}: not a safetensors file (the header is no JSON object).")


def _read_index(file: Path) -> dict[str, str]:
    """Returns tensor name -> file name, from an index."""
    owners = untrusted.read_json(file, MAX_HEADER).get("weight_map")
    if not isinstance(owners, dict) or not owners:
        raise ValueError(f"{file}: expected a 'weight_map' from tensor names to file names.")
    for name, owner in owners.items():
        if not isinstance(owner, str) or not _NAME.fullmatch(owner):
            raise ValueError(
                f"{file}: tensor {untrusted.printable(name)} has the file {untrusted.printable(owner)}; expected the name of a "
                ".safetensors file beside the index, of letters, digits and . _ -"
            )
    return owners


def _check_index(folder: Path, owners: Mapping[str, str], names_in_files: Mapping[str, set[str]]) -> None:
    """Checks that the index and the files have the same tensors."""
    for name, owner in owners.items():
        if name not in names_in_files[owner]:
            raise ValueError(
                f"{folder / owner}: tensor {untrusted.printable(name)} is missing, but {INDEX} names this file for the tensor."
            )
    for owner, names in names_in_files.items():
        if surplus := names - set(owners):
            raise ValueError(f"{folder / owner}: tensor {untrusted.printable(min(surplus))} is not listed in {INDEX}.")


def write_folder(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: np.dtype,
    tensor: Callable[[str], np.ndarray],
    max_shard_bytes: int,
) -> None:
    """Writes the tensors file by file, with the tensors of only one file in memory at a time.

    Args:
      folder: an existing folder.
      shapes: every tensor's name and shape.
      dtype: the type of all tensors.
      tensor: a function from a name to the tensor's values, C-contiguous.
      max_shard_bytes: the largest size of a file in bytes. A single tensor may be larger.
    """
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    shards = _shards(sizes, max_shard_bytes)
    owners = {}
    for i, names in enumerate(shards):
        file = SINGLE if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        # transformers refuses a file whose metadata does not name PyTorch's layout.
        tensors = {name: tensor(name) for name in names}
        with storing(folder / file):
            save_file(tensors, folder / file, metadata={"format": "pt"})
        owners |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": owners}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(sizes: Mapping[str, int], limit: int) -> Sequence[Sequence[str]]:
    """Returns the tensor names of each file, so that a file has at most `limit` bytes or one tensor."""
    shards, filled = [[]], 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards
