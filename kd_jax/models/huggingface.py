"""Reads a Hugging Face folder: config.json and safetensors.

Each process reads only the slices that its devices need.
"""

import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from kd_jax.models import int8
from kd_jax.models.config import ModelConfig
from kd_jax.models.families import FAMILIES
from kd_jax.models.families.fields import Tensor, refuse_another_function
from kd_jax.models.folders import check_folder
from kd_jax.models.functional import Model, Params, Shardings, from_config
from kd_jax.models.safetensors_io import Reader, open_folder
from kd_jax.storage import untrusted


def load_config(path: str | os.PathLike[str]) -> ModelConfig:
    """Returns the `ModelConfig` of a Hugging Face folder, without reading the weights.

    The ids that end a text come from generation_config.json if they are given there, as in transformers' `generate`.
    Both files are treated as data: only the fields that are known here are read, and no field names code. `auto_map` is
    ignored, as transformers ignores it without trust_remote_code.

    Args:
      path: a folder with a config.json.
    Returns:
      The config. Its family is one of this project's families, so Mistral's is 'llama', with a sliding window.
    Raises:
      ValueError: the folder or a file does not exist, the folder belongs to an adapter, an architecture or a setting is
        not supported, or sizes do not fit.
    """
    check_folder(Path(path))
    file = Path(path) / "config.json"
    fields = untrusted.read_json(file)
    family = _family(file, fields)
    generation = file.with_name("generation_config.json")
    ids = fields | (untrusted.read_json(generation) if generation.exists() else {})
    if ids.get("pad_token_id") == -1:  # the first Llama folders write -1 for no pad token
        ids["pad_token_id"] = None
    try:
        refuse_another_function(fields)
        settings = FAMILIES[family].from_hf(fields)
        return ModelConfig(
            family=family,
            bos_id=ids.get("bos_token_id"),
            eos_id=ids.get("eos_token_id"),
            pad_id=ids.get("pad_token_id"),
            **settings,
        )
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _family(file: Path, fields: dict[str, Any]) -> str:
    kinds = {kind: name for name, family in FAMILIES.items() for kind in family.ARCHITECTURES}
    kind = fields.get("model_type")
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(f"{file}: model_type {untrusted.shown(kind)} is not supported; supported: {', '.join(kinds)}.")
    expected = FAMILIES[kinds[kind]].ARCHITECTURES[kind]
    architectures = fields.get("architectures") or [expected]
    if not isinstance(architectures, list) or expected not in architectures:
        raise ValueError(
            f"{file}: architectures {untrusted.shown(architectures)} is not supported; expected [{expected!r}]."
        )
    if fields.get("quantization_config"):
        raise ValueError(f"{file}: a quantization_config is in use; expected weights in float32, bfloat16 or float16.")
    return kinds[kind]


def load_pretrained(
    path: str | os.PathLike[str],
    *,
    dtype: DTypeLike = jnp.float32,
    shardings: Shardings | None = None,
    matrices_in_int8: bool = False,
    only: str = "",
) -> tuple[Model, Params]:
    """Loads a model and its parameters from a Hugging Face folder.

    Tensors are read and placed one at a time. With `shardings`, a process reads only the slices that its devices hold,
    each slice once. A model that fits on no single device or host can therefore be loaded.

    Args:
      path: a folder with config.json and model.safetensors, or model.safetensors.index.json and its files.
      dtype: the type of the parameters and of the computation, independent of the type on disk.
      shardings: a function from the abstract parameters (`Model.abstract_params`) to a tree of shardings. By default
        all parameters are on the default device, uncommitted.
      matrices_in_int8: True to convert each matrix of the layers to int8 and scales when it is read. Such a model
        cannot be trained.
      only: the prefix of the names of the parameters to read, such as 'layers/3/'. All other parameters stay abstract.
    Returns:
      The model, and a plain nested dict of arrays; matrices in int8 are `qwix.QArray`s.
    Raises:
      ValueError: something in the folder is unsupported, missing, superfluous, damaged, or of another shape.
    """
    folder = Path(path)
    config = load_config(folder)
    model = from_config(config, dtype=dtype, param_dtype=dtype)
    with open_folder(folder) as reader:
        # Check that the tensors exist before anything is allocated whose size comes from config.json.
        _check_depth(reader, config)
        layout = FAMILIES[config.family].tensors(config)
        names = _names_on_disk(reader, config, layout)
        _check_sizes(reader, config, names)
        abstract = model.abstract_params()
        placed = None if shardings is None else shardings(abstract)

        def place(path: Any, leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding | None = None) -> Any:
            key = jax.tree_util.keystr(path, simple=True, separator="/")
            if not key.startswith(only):
                return leaf
            tensor, name = layout[key], names[layout[key].name]
            _check_shape(reader, name, tensor, leaf.shape)
            small = matrices_in_int8 and int8.is_matrix(key)

            def slice_of(index: Any) -> np.ndarray:
                to = np.dtype(np.float32) if small else leaf.dtype  # float32, so that the values are not rounded twice
                return _read(reader, name, tensor, leaf.shape, index).astype(to, copy=False)

            if sharding is None:
                array = jnp.array(slice_of((slice(None),) * len(leaf.shape)))
            else:
                array = jax.make_array_from_callback(leaf.shape, sharding, _once(slice_of))
            return int8.quantise(array) if small else array

        trees = (abstract,) if placed is None else (abstract, placed)
        return model, jax.tree.map_with_path(place, *trees)


def _once(slice_of: Callable[[Any], np.ndarray]) -> Callable[[Any], np.ndarray]:
    """Returns a function like `slice_of` that reads each slice only once.

    Several devices may hold the same slice, and JAX asks for the slice of each device.
    """
    read: dict[str, np.ndarray] = {}

    def slice_read(index: Any) -> np.ndarray:
        if (key := str(index)) not in read:
            read[key] = slice_of(index)
        return read[key]

    return slice_read


def _check_depth(reader: Reader, config: ModelConfig) -> None:
    if config.num_layers > len(reader.names):
        raise ValueError(
            f"{reader.folder}: config.json asks for {config.num_layers} layers, and the files have {len(reader.names)} tensors."
        )


def _check_sizes(reader: Reader, config: ModelConfig, names: dict[str, str]) -> None:
    """Checks that no side of a parameter is longer than the largest tensor has numbers.

    The shapes that config.json asks for are then limited by the files themselves.
    """
    largest = max(math.prod(reader.shape(name)) for name in names.values())
    sizes = {name: getattr(config, name) for name in ("vocab_size", "hidden_size", "intermediate_size")}
    sizes["num_heads * head_dim"] = config.num_heads * config.head_dim
    sizes |= {"max_positions": config.max_positions} if config.learned_positions else {}
    for name, size in sizes.items():
        if size > largest:
            raise ValueError(
                f"{reader.folder}: config.json asks for {name} = {size}, and no tensor has more than {largest} numbers."
            )


def _names_on_disk(reader: Reader, config: ModelConfig, layout: dict[str, Tensor]) -> dict[str, str]:
    """Returns a dict from the family's name of each tensor to its name in this folder.

    No tensor may be missing or superfluous.
    """
    family = FAMILIES[config.family]
    # A checkpoint without an output matrix has the family's names without their prefix.
    bare = not any(name.startswith(family.PREFIX) for name in reader.names)
    found = {name if not bare or name == family.TIED else family.PREFIX + name: name for name in reader.names}
    wanted = {tensor.name for tensor in layout.values()}
    if missing := wanted - set(found):
        anywhere = reader.file(min(reader.names)) if reader.names else "the checkpoint"
        raise ValueError(
            f"{anywhere}: tensor {min(missing)!r} is missing, and {len(missing) - 1} more; a {config.family} "
            f"model with {config.num_layers} layers needs it."
        )
    for name in sorted(set(found) - wanted):
        if name == family.TIED:
            _check_tied(reader, found[name], found[layout["embed/embedding"].name])
        elif not any(re.fullmatch(pattern, name) for pattern in family.TOLERATED):
            raise ValueError(
                f"{reader.file(found[name])}: tensor {untrusted.shown(found[name])} has no place in a {config.family} model "
                f"with {config.num_layers} layers and the settings in config.json."
            )
    return {name: found[name] for name in wanted}


def _check_tied(reader: Reader, head: str, embedding: str) -> None:
    """Checks that an output matrix on disk equals the embedding, if config.json says that the two are tied."""
    shape = reader.shape(embedding)
    blocks = [
        (slice(row, min(row + 4096, shape[0])), slice(0, shape[1])) for row in range(0, shape[0], 4096)
    ]  # in blocks, because each matrix may be a large part of the model
    if reader.shape(head) != shape or not all(
        np.array_equal(reader.read(head, block), reader.read(embedding, block)) for block in blocks
    ):
        raise ValueError(
            f"{reader.file(head)}: tensor {head!r} differs from {embedding!r}, though tie_word_embeddings "
            "says that the two are one; set tie_word_embeddings to false to load both."
        )


def _check_shape(reader: Reader, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    expected = (*shape[:-1], shape[-1] * tensor.parts)
    expected = expected[::-1] if tensor.transposed else expected
    if reader.shape(name) != expected:
        raise ValueError(
            f"{reader.file(name)}: tensor {name!r} has shape {reader.shape(name)}; config.json asks for {expected}."
        )


def _read(reader: Reader, name: str, tensor: Tensor, shape: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
    """Returns a slice of one of this project's parameters, and reads only this slice."""
    bounds = [slice(*part.indices(size)) for part, size in zip(index, shape, strict=True)]
    offset = tensor.part * shape[-1]
    bounds[-1] = slice(bounds[-1].start + offset, bounds[-1].stop + offset)
    if tensor.transposed:
        return reader.read(name, tuple(bounds[::-1])).T
    return reader.read(name, tuple(bounds))
