"""Writes a Hugging Face folder that transformers opens unchanged, and that `load_pretrained` reads bit for bit."""

import json
from pathlib import Path
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.typing import DTypeLike

from kd_jax.models.config import ModelConfig
from kd_jax.models.families import FAMILIES
from kd_jax.models.families.fields import Stack, Tensor
from kd_jax.models.functional import Model, Params
from kd_jax.models.lora import FrozenMatrix, merged
from kd_jax.models.safetensors_io import write_folder
from kd_jax.storage import writing_whole
from kd_jax.storage.files import AnyPath, Json


class _Part(NamedTuple):
    """A parameter, or a row of a parameter, and the tensor on disk that holds the numbers."""

    key: str
    tensor: Tensor
    row: int | None

    def shape(self, arrays: dict[str, jax.Array]) -> tuple[int, ...]:
        """Returns the shape of the parameter, or of the row."""
        return arrays[self.key].shape if self.row is None else arrays[self.key].shape[1:]


class SavesItself(Protocol):
    """The method that `save_pretrained` needs of a tokenizer."""

    def save(self, folder: Path, /) -> object:
        """Writes the tokenizer's files into the folder."""


def save_pretrained(
    path: AnyPath,
    model: Model,
    params: Params,
    tokenizer: SavesItself | None = None,
    *,
    dtype: DTypeLike | None = None,
    max_shard_bytes: int = 5 * 2**30,
) -> None:
    """Writes a folder that `AutoModelForCausalLM.from_pretrained` and `load_pretrained` open unchanged.

    The folder is written under a temporary name and then renamed, so no incomplete folder appears. Parameters that are
    sharded over processes are gathered one tensor at a time. All processes must call this function, and only the first
    process writes.

    Args:
      path: the folder to create; missing parent folders are created, too.
      model: the model whose config is written.
      params: the model's parameters. The products of low-rank factors are added to the matrices.
      tokenizer: a tokenizer that is saved beside the weights, or None.
      dtype: the type on disk; by default the type of the embedding.
      max_shard_bytes: the largest size of a file in bytes. Larger weights are split over several files with an index.

    Raises:
      ValueError: the folder is not empty, or the parameters do not belong to this model.
    """
    target = Path(path)
    arrays = _arrays_of(model, params)
    stored_dtype = np.dtype(jnp.dtype(arrays["embed/embedding"].dtype if dtype is None else dtype))
    if jax.process_index() > 0 and any(_is_shared(array) for array in arrays.values()):
        _write_weights(None, model.config, arrays, stored_dtype, max_shard_bytes)
        return
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists and is not an empty folder; choose another path or remove it first.")
    with writing_whole(target) as partial:
        partial.mkdir()
        _write_json(partial / "config.json", _config_fields(model.config, stored_dtype))
        _write_json(partial / "generation_config.json", _generation_fields(model.config))
        _write_weights(partial, model.config, arrays, stored_dtype, max_shard_bytes)
        if tokenizer is not None:
            tokenizer.save(partial)


def _arrays_of(model: Model, params: Params) -> dict[str, jax.Array]:
    """Returns the parameters by name, such as 'layers/0/mlp/up/kernel', after a check of the shapes."""
    arrays, expected = (
        {
            jax.tree_util.keystr(path, simple=True, separator="/"): leaf
            for path, leaf in jax.tree.leaves_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, FrozenMatrix))
        }
        for tree in (params, model.abstract_params())
    )
    for key in sorted(arrays.keys() | expected.keys()):
        shape, expected_shape = (tree[key].shape if key in tree else None for tree in (arrays, expected))
        if shape != expected_shape:
            raise ValueError(f"the parameter {key!r} has shape {shape}; the model's config asks for {expected_shape}.")
    return arrays


def _is_shared(array: object) -> bool:
    """Returns True if this process holds only a part of an array."""
    return isinstance(array, jax.Array) and not array.is_fully_addressable


def _write_weights(
    folder: Path | None, config: ModelConfig, arrays: dict[str, jax.Array], dtype: np.dtype, max_shard_bytes: int
) -> None:
    """Gathers each tensor, and writes it if there is a folder. All processes gather the tensors in the same order."""
    parts: dict[str, list[_Part]] = {}  # the name of each tensor on disk -> the parameters in this tensor
    for key, stored in FAMILIES[config.family].tensors(config).items():
        for row, tensor in enumerate(stored.parts):
            parts.setdefault(tensor.name, []).append(_Part(key, tensor, row if isinstance(stored, Stack) else None))

    def gathered(part: _Part) -> np.ndarray:
        array = merged(arrays[part.key]) if isinstance(arrays[part.key], FrozenMatrix) else arrays[part.key]
        array = array if part.row is None else array[part.row]
        is_divided = _is_shared(array) and not array.is_fully_replicated
        numbers = np.asarray(multihost_utils.process_allgather(array, tiled=True) if is_divided else array)
        return numbers.astype(dtype, copy=False)

    def values(name: str) -> np.ndarray:
        joined = _joined([(part.tensor, gathered(part)) for part in parts[name]])
        return np.ascontiguousarray(joined.T if parts[name][0].tensor.transposed else joined)

    shapes = {name: first.tensor.shape(first.shape(arrays)) for name, (first, *_) in parts.items()}
    if folder is None:
        for name in shapes:  # the order in which `write_folder` asks for the tensors
            values(name)
        return
    write_folder(folder, shapes, dtype, values, max_shard_bytes)


def _joined(parts: list[tuple[Tensor, np.ndarray]]) -> np.ndarray:
    """Returns the columns of a tensor on disk, from the columns of each of the parameters in this tensor."""
    first, array = parts[0]
    if not first.columns:
        return array
    joined = np.empty((*array.shape[:-1], first.groups, first.columns), array.dtype)
    for tensor, array in parts:
        columns = array.reshape(*array.shape[:-1], tensor.groups, -1)
        joined[..., tensor.first : tensor.first + columns.shape[-1]] = columns
    return joined.reshape(*joined.shape[:-2], -1)


def _config_fields(config: ModelConfig, dtype: np.dtype) -> Json:
    family = FAMILIES[config.family]
    return {
        "model_type": config.family,
        "architectures": [family.ARCHITECTURES[config.family]],
        **family.to_hf(config),
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_id,
        "pad_token_id": config.pad_id,
        "torch_dtype": dtype.name,  # transformers 5 calls the field dtype and still reads this name
    }


def _generation_fields(config: ModelConfig) -> Json:
    ids = {"bos_token_id": config.bos_id, "eos_token_id": config.eos_id, "pad_token_id": config.pad_id}
    return {name: value for name, value in ids.items() if value is not None}


def _write_json(file: Path, fields: Json) -> None:
    file.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
