"""Reads a Hugging Face folder: config.json and safetensors.

Each process reads only the slices that its devices need.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import KeyPath
from jax.typing import DTypeLike
from jaxtyping import PyTree

from kd_jax.models import int8
from kd_jax.models.config import ModelConfig
from kd_jax.models.families import FAMILIES
from kd_jax.models.families.expert_fields import as_stored
from kd_jax.models.families.fields import Layout, Stack, Tensor, refuse_another_function
from kd_jax.models.folders import check_folder
from kd_jax.models.functional import Model, Params, Shardings, from_config
from kd_jax.models.safetensors_io import Reader, open_folder
from kd_jax.storage import hub, untrusted
from kd_jax.storage.files import AnyPath, Json

Index = tuple[slice, ...]  # a slice for each axis


def load_config(path: AnyPath) -> ModelConfig:
    """Returns the `ModelConfig` of a Hugging Face folder, without reading the weights.

    The ids that end a text come from generation_config.json if this file has them, as in transformers' `generate`. Only
    known fields of both files are read, and no field names code. `auto_map` is ignored, as in transformers without
    trust_remote_code.

    Args:
      path: a folder with a config.json, or an address such as hf://ORG/NAME.

    Returns:
      The config.

    Raises:
      ValueError: the folder or a file does not exist, the folder belongs to an adapter, an architecture or a setting is
        not supported, or sizes do not fit.
    """
    folder = hub.model(path, weights=False)
    check_folder(folder)
    file = folder / "config.json"
    fields = untrusted.read_json(file)
    family = _family(file, fields)
    generation = file.with_name("generation_config.json")
    ids = fields | (untrusted.read_json(generation) if generation.exists() else {})
    if ids.get("pad_token_id") == -1:  # the first Llama folders write -1 if there is no padding token
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


def _family(file: Path, fields: Json) -> str:
    """Returns the name of the family that config.json describes."""
    kinds = {kind: name for name, family in FAMILIES.items() for kind in family.ARCHITECTURES}
    kind = fields.get("model_type")
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(
            f"{file}: model_type {untrusted.printable(kind)} is not supported; supported: {', '.join(kinds)}."
        )
    expected = FAMILIES[kinds[kind]].ARCHITECTURES[kind]
    architectures = fields.get("architectures") or [expected]
    if not isinstance(architectures, list) or expected not in architectures:
        raise ValueError(
            f"{file}: architectures {untrusted.printable(architectures)} is not supported; expected [{expected!r}]."
        )
    if fields.get("quantization_config"):
        raise ValueError(f"{file}: a quantization_config is set; expected weights in float32, bfloat16 or float16.")
    return kinds[kind]


def load_pretrained(
    path: AnyPath,
    *,
    dtype: DTypeLike = jnp.float32,
    shardings: Shardings | None = None,
    matrices_in_int8: bool = False,
    only: str | Callable[[str], bool] = "",
) -> tuple[Model, Params]:
    """Loads a model and its parameters from a Hugging Face folder.

    Tensors are read and placed one at a time. With `shardings`, a process reads only the slices that its devices hold,
    each slice once. So a model can be loaded that is too large for one device or host.

    Args:
      path: a folder with config.json and model.safetensors, or model.safetensors.index.json and its files; or an address
        such as hf://ORG/NAME.
      dtype: the type of the parameters and of the computation, independent of the type on disk.
      shardings: a function from the abstract parameters (`Model.abstract_params`) to a tree of shardings. By default
        all parameters are on the default device, uncommitted.
      matrices_in_int8: True to convert each matrix of the layers to int8 and scales when it is read. Such a model
        cannot be trained.
      only: the prefix of the names of the parameters to read, such as 'layers/3/', or a function that returns True for
        these names. All other parameters stay abstract.

    Returns:
      The model, and a plain nested dict of arrays; matrices in int8 are `qwix.QArray`s.

    Raises:
      ValueError: a file, a field or a tensor of the folder is unsupported, missing, superfluous, damaged, or of another
        shape.
    """
    config = load_config(path)
    folder = hub.model(path)
    model = from_config(config, dtype=dtype, param_dtype=dtype)
    with open_folder(folder) as reader:
        # The tensors are checked before the sizes of config.json decide how much memory is allocated.
        _check_depth(reader, config)
        layout = as_stored(FAMILIES[config.family].tensors(config), reader.names, config)
        names = _names_on_disk(reader, config, layout)
        _check_sizes(reader, config, names)
        abstract = model.abstract_params()
        sharding_tree = None if shardings is None else shardings(abstract)

        def load_leaf(
            path: KeyPath, leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding | None = None
        ) -> PyTree:
            key = jax.tree_util.keystr(path, simple=True, separator="/")
            if not (key.startswith(only) if isinstance(only, str) else only(key)):
                return leaf
            stored = layout[key]
            _check_shape(reader, names, stored, leaf.shape)
            in_int8 = matrices_in_int8 and int8.is_matrix(key)
            dtype_read = np.dtype(np.float32) if in_int8 else leaf.dtype  # float32: the values are rounded only once

            def slice_of(index: Index) -> np.ndarray:
                return _read(reader, names, stored, leaf.shape, index).astype(dtype_read, copy=False)

            if sharding is None:
                array = jnp.array(slice_of((slice(None),) * len(leaf.shape)))
            else:
                array = jax.make_array_from_callback(leaf.shape, sharding, _once(slice_of))
            return int8.quantise(array) if in_int8 else array

        trees = (abstract,) if sharding_tree is None else (abstract, sharding_tree)
        return model, jax.tree.map_with_path(load_leaf, *trees)


def _once(slice_of: Callable[[Index], np.ndarray]) -> Callable[[Index | None], np.ndarray]:
    """Returns a function like `slice_of` that reads each slice only once.

    Several devices may hold the same slice, and JAX asks for the slice of each device.
    """
    slices: dict[str, np.ndarray] = {}

    def stored_slice(index: Index | None) -> np.ndarray:
        if (key := str(index)) not in slices:
            slices[key] = slice_of(index or ())
        return slices[key]

    return stored_slice


def _check_depth(reader: Reader, config: ModelConfig) -> None:
    if config.num_layers > len(reader.names):
        raise ValueError(
            f"{reader.folder}: config.json asks for {config.num_layers} layers, and the files have {len(reader.names)} tensors."
        )


def _check_sizes(reader: Reader, config: ModelConfig, names: dict[str, str]) -> None:
    """Checks that no side of a parameter is longer than the number of values in the largest tensor.

    So the sizes of the files limit the shapes that config.json can ask for.
    """
    largest = max(math.prod(reader.shape(name)) for name in names.values())
    sizes = {name: getattr(config, name) for name in ("vocab_size", "hidden_size", "intermediate_size", "expert_size")}
    sizes["num_heads * head_dim"] = config.num_heads * config.head_dim
    sizes |= {"max_positions": config.max_positions} if config.learned_positions else {}
    for name, size in sizes.items():
        if size > largest:
            raise ValueError(
                f"{reader.folder}: config.json asks for {name} = {size}, and no tensor has more than {largest} numbers."
            )


def _names_on_disk(reader: Reader, config: ModelConfig, layout: Layout) -> dict[str, str]:
    """Returns a dict from the family's name of each tensor to the name in this folder.

    No tensor may be missing or superfluous.
    """
    family = FAMILIES[config.family]
    # A checkpoint without an output matrix has the family's names without their prefix.
    bare = not any(name.startswith(family.PREFIX) for name in reader.names)
    on_disk = {name if not bare or name == family.TIED else family.PREFIX + name: name for name in reader.names}
    needed = {tensor.name for stored in layout.values() for tensor in stored.parts}
    if missing := needed - set(on_disk):
        file = reader.file(min(reader.names)) if reader.names else "the checkpoint"
        raise ValueError(
            f"{file}: tensor {min(missing)!r} is missing, and {len(missing) - 1} more; a {config.family} "
            f"model with {config.num_layers} layers needs this tensor."
        )
    for name in sorted(set(on_disk) - needed):
        if name == family.TIED:
            _check_tied(reader, on_disk[name], on_disk[layout["embed/embedding"].parts[0].name])
        elif not any(re.fullmatch(pattern, name) for pattern in family.TOLERATED):
            raise ValueError(
                f"{reader.file(on_disk[name])}: tensor {untrusted.printable(on_disk[name])} has no place in a {config.family} model "
                f"with {config.num_layers} layers and the settings in config.json."
            )
    return {name: on_disk[name] for name in needed}


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
            f"{reader.file(head)}: tensor {head!r} differs from {embedding!r}, although tie_word_embeddings "
            "says that the two are equal; set tie_word_embeddings to false to load both."
        )


def _check_shape(reader: Reader, names: dict[str, str], stored: Tensor | Stack, shape: tuple[int, ...]) -> None:
    of_part = shape[1:] if isinstance(stored, Stack) else shape
    for tensor in stored.parts:
        name, expected = names[tensor.name], tensor.shape(of_part)
        if reader.shape(name) != expected:
            raise ValueError(
                f"{reader.file(name)}: tensor {name!r} has shape {reader.shape(name)}; config.json asks for {expected}."
            )


def _read(
    reader: Reader, names: dict[str, str], stored: Tensor | Stack, shape: tuple[int, ...], index: Index
) -> np.ndarray:
    """Returns a slice of one of this project's parameters, and reads only the tensors and columns of this slice."""
    bounds = [slice(*part.indices(size)) for part, size in zip(index, shape, strict=True)]
    if isinstance(stored, Stack):
        rows = stored.parts[bounds[0]]
        return np.stack([_read(reader, names, tensor, shape[1:], tuple(bounds[1:])) for tensor in rows])
    width = shape[-1] // stored.groups  # the number of the parameter's columns in a group
    start, stop = bounds[-1].start, bounds[-1].stop
    columns = stored.columns or width
    if stored.groups == 1:
        bounds[-1] = slice(stored.first + start, stored.first + stop)
        return _read_tensor(reader, names[stored.name], stored, bounds)
    first, last = start // width, -(-stop // width)  # the groups that the slice touches, which are read as a whole
    bounds[-1] = slice(first * columns, last * columns)
    groups = _read_tensor(reader, names[stored.name], stored, bounds)
    groups = groups.reshape(*groups.shape[:-1], last - first, columns)[..., stored.first : stored.first + width]
    return groups.reshape(*groups.shape[:-2], -1)[..., start - first * width : stop - first * width]


def _read_tensor(reader: Reader, name: str, tensor: Tensor, bounds: list[slice]) -> np.ndarray:
    on_disk = tuple(bounds[::-1] if tensor.transposed else bounds)
    if tensor.row is None:
        numbers = reader.read(name, on_disk)
    else:
        numbers = reader.read(name, (slice(tensor.row, tensor.row + 1), *on_disk))[0]
    return numbers.T if tensor.transposed else numbers
