"""Reads and writes the adapters of PEFT: adapter_config.json and adapter_model.safetensors.

References:
  PEFT, `LoraConfig <https://huggingface.co/docs/peft/package_reference/lora>`_.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from jaxtyping import PyTree
from safetensors.numpy import save_file

from kd_jax import sharding
from kd_jax.models.families import FAMILIES
from kd_jax.models.families.fields import Tensor
from kd_jax.models.folders import ADAPTER
from kd_jax.models.functional import Model
from kd_jax.models.safetensors_io import Reader, open_file
from kd_jax.models.trained import EMBEDDING, Lora, find_targets, leaves_of, modules, owners
from kd_jax.storage import untrusted, writing_whole
from kd_jax.storage.checksum import digest, file_digests
from kd_jax.storage.files import AnyPath, Json

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
# The fields that `read_config` reads, and fields that change nothing: they describe the training or the file, or they
# have a meaning only beside another field, which is refused.
READ = ("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "target_modules", "init_lora_weights")
WITHOUT_EFFECT = (
    "base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping", "peft_version", "fan_in_fan_out",
    "megatron_core", "qalora_group_size", "runtime_config",
)  # fmt: skip
# Ways to begin that leave the base model unchanged. The others, such as 'pissa', subtract the first product from it.
BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter in a folder, which fits a model.

    Attributes:
      lora: the rank, the scale and the targets; `dropout` is that of the adapter's own training.
      read: returns the trained arrays of `Lora`, in float32.
    """

    lora: Lora
    read: Callable[[], PyTree]


def fingerprint(folder: Path) -> str:
    """Returns a hash of the adapter's files; "" if a file is missing."""
    files = [folder / ADAPTER, folder / WEIGHTS]
    if not all(file.is_file() for file in files):
        return ""
    return digest(*(f"{file.name} {text}\n" for file, text in zip(files, file_digests(files), strict=True)))[:16]


def open_adapter(folder: Path, model: Model, base: str, key: str) -> Adapter:
    """Opens an adapter for a model, and checks it without reading the factors.

    Args:
      folder: the folder of the adapter.
      model: the base model.
      base: the path of the base model's folder, which the adapter must name; "" for a model without a folder.
      key: the setting that names the folder, for the messages.

    Raises:
      ValueError: the folder or a file does not exist or is damaged; the adapter needs a function that kd_jax does not
        have, which the message names; or the adapter belongs to another model.
    """
    untrusted.check_folder(folder, key)
    where = f"{key}: {folder}"
    for name in (ADAPTER, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(
                f"{where}: the folder has no {name}; expected an adapter of PEFT with {ADAPTER} and {WEIGHTS}."
            )
    fields = untrusted.read_json(folder / ADAPTER)
    _refuse_unknown(where, fields)
    _check_base(where, fields, base)
    names = modules(model)
    with open_file(folder, WEIGHTS) as reader:
        found = _targets(where, reader, names)
        lora = Lora(
            rank=int(_number(where, fields, "r", int)), alpha=_number(where, fields, "lora_alpha", float),
            dropout=float(fields.get("lora_dropout") or 0.0), root=bool(fields.get("use_rslora")),
            owners=owners(found, names),
        )  # fmt: skip
        _check_named(where, fields, model, set(found))
        _check_shapes(where, reader, lora, model)
    return Adapter(lora, lambda: _read(folder, lora, model))


def save_adapter(path: AnyPath, lora: Lora, trained: PyTree, model: Model, base: str) -> None:
    """Writes a folder that PEFT opens on the base model. All processes must call this function; the first one writes.

    Args:
      path: the folder to create.
      lora: the rank, the scale and the targets.
      trained: the trained arrays.
      model: the base model.
      base: the path of the base model's folder; "" for a model without a folder.

    Raises:
      ValueError: the folder is not empty.
    """
    arrays = {name: sharding.fetch_whole(leaf) for name, leaf in leaves_of(trained).items()}
    if jax.process_index() > 0:
        return
    target = Path(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists and is not an empty folder; choose another path or remove it first.")
    tensors = {}
    for name in dict.fromkeys(modules(model)[path] for path in lora.owners):
        tensors |= _on_disk(name, lora, arrays, model)
    with writing_whole(target) as partial:
        partial.mkdir()
        (partial / ADAPTER).write_text(json.dumps(_fields(lora, model, base), indent=2) + "\n", encoding="utf-8")
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})


def _on_disk(name: str, lora: Lora, arrays: Mapping[str, np.ndarray], model: Model) -> dict[str, np.ndarray]:
    """Returns the two tensors of a module. A part of the module that is not a target has a second factor of zeros."""
    parts, shapes = _parts(model)[name], leaves_of(model.abstract_params())
    path = next(path for path in parts if path in lora.owners)
    lora_b = np.zeros((lora.rank, sum(shapes[path].shape[1] for path in parts)), np.float32)
    for target in parts:
        if target in lora.owners:
            lora_b[:, _columns(model, target)] = arrays[f"{target}/lora_b"]
    pair = zip(_keys(name, path), (arrays[f"{lora.owners[path]}/lora_a"], lora_b), strict=True)
    return {key: np.ascontiguousarray(factor.T, dtype=np.float32) for key, factor in pair}


def _fields(lora: Lora, model: Model, base: str) -> Json:
    """Returns the content of adapter_config.json."""
    names = modules(model)
    named = dict.fromkeys(names[path] for path in lora.owners)
    short = dict.fromkeys(name.rpartition(".")[2] for name in named)
    # PEFT adds an adapter to every module whose name ends like an entry of the list.
    is_unique = {name for name in names.values() if name.rpartition(".")[2] in short} == set(named)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.root,
        "use_dora": False,
        "bias": "none",
        # transformers has the matrices of some families, such as GPT-2, as [in, out].
        "fan_in_fan_out": any(not _tensor(model, path).transposed for path in lora.owners if path != EMBEDDING),
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": list(short if is_unique else named),
    }


def _refuse_unknown(where: str, fields: Json) -> None:
    """Refuses an adapter of another kind, and each field that would need a function that kd_jax does not have."""
    if fields.get("peft_type", "LORA") != "LORA":
        raise ValueError(
            f"{where}: peft_type {untrusted.printable(fields['peft_type'])} is not implemented; only LORA is."
        )
    if fields.get("bias", "none") != "none":
        raise ValueError(f"{where}: bias={untrusted.printable(fields['bias'])} is not implemented; only 'none' is.")
    if fields.get("init_lora_weights", True) not in BEGINNINGS:
        raise ValueError(
            f"{where}: init_lora_weights={untrusted.printable(fields['init_lora_weights'])} is not implemented, because the "
            f"base model of such an adapter differs from the model that it names. Merge the adapter with PEFT first."
        )
    for name, value in fields.items():
        if name not in (*READ, *WITHOUT_EFFECT) and value:
            raise ValueError(
                f"{where}: {untrusted.printable(name)}={untrusted.printable(value)} is not implemented. kd_jax has LoRA with "
                f"one rank and one alpha, with or without use_rslora. Merge the adapter with PEFT first (merge_and_unload)."
            )


def _check_base(where: str, fields: Json, base: str) -> None:
    """Checks that the adapter names the base model, by the last part of the name."""
    named = fields.get("base_model_name_or_path")
    if not isinstance(named, str) or not named or not base:
        return
    parts = Path(base).parts
    # A folder of the hub's cache is models--ORG--NAME/snapshots/REVISION.
    known = {parts[-1].partition("@")[0], *(part.rpartition("--")[2] for part in parts if part.startswith("models--"))}
    if Path(named).name.partition("@")[0].lower() not in {name.lower() for name in known}:
        raise ValueError(
            f"{where}: the adapter belongs to the base model {untrusted.printable(named)}, and student.path is {base!r}. Set "
            f"student.path to the base model of the adapter; or if the two are the same model, correct "
            f"base_model_name_or_path in {ADAPTER}."
        )


def _targets(where: str, reader: Reader, names: Mapping[str, str]) -> list[str]:
    """Returns the paths of the parameters that have factors in the file, and refuses any other tensor."""
    by_name: dict[str, list[str]] = {}
    for path, name in names.items():
        by_name.setdefault(name, []).append(path)
    expected = {key: name for name, paths in by_name.items() for key in _keys(name, paths[0])}
    # PEFT also writes the embedding and the output matrix of the base model if they are targets.
    copies = {f"{PREFIX}{name}.base_layer.weight" for name in by_name}
    tensors = reader.names - copies
    for tensor in sorted(tensors):
        if tensor not in expected:
            module = re.sub(r"\.lora_\w+(\.weight)?$", "", tensor.removeprefix(PREFIX))
            raise ValueError(
                f"{where}: tensor {untrusted.printable(tensor)} belongs to no matrix of the base model, so the adapter is for "
                f"another model, or the module {untrusted.printable(module)} cannot have an adapter in kd_jax. The modules are "
                f"{', '.join(dict.fromkeys(re.sub(r'^.*[.][0-9]+[.]', '', name) for name in names.values()))}."
            )
    found = {expected[tensor] for tensor in tensors}
    for name in sorted(found):
        if missing := [key for key in _keys(name, by_name[name][0]) if key not in tensors]:
            raise ValueError(f"{where}: tensor {missing[0]!r} is missing in {WEIGHTS}.")
    if not found:
        raise ValueError(f"{where}: {WEIGHTS} has no tensors.")
    return [path for name in by_name if name in found for path in by_name[name]]


def _check_named(where: str, fields: Json, model: Model, found: set[str]) -> None:
    """Checks that every module that target_modules names has factors."""
    named = fields.get("target_modules")
    patterns = [named] if isinstance(named, str) else named
    if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(f"{where}: target_modules={untrusted.printable(named)} must be a list of names.")
    if missing := sorted(set(find_targets(patterns, model, f"{where}: target_modules")) - found):
        raise ValueError(
            f"{where}: target_modules names {modules(model)[missing[0]]!r}, which has no tensors in {WEIGHTS}; the file is "
            f"incomplete, or the adapter is for another model."
        )


def _check_shapes(where: str, reader: Reader, lora: Lora, model: Model) -> None:
    for name, paths in _parts(model).items():
        if not (found := [path for path in paths if path in lora.owners]):
            continue
        rows, columns = _shape(model, paths)
        for key, shape in zip(_keys(name, found[0]), ((lora.rank, rows), (columns, lora.rank)), strict=True):
            if reader.shape(key) != shape:
                raise ValueError(
                    f"{where}: tensor {key!r} has shape {reader.shape(key)}, and a rank of {lora.rank} on the base model needs "
                    f"{shape}; the adapter is for another model."
                )


def _read(folder: Path, lora: Lora, model: Model) -> PyTree:
    """Returns the trained arrays of an adapter, in float32."""
    arrays: dict[str, np.ndarray] = {}
    with open_file(folder, WEIGHTS) as reader:
        whole = lambda key: reader.read(key, tuple(slice(0, size) for size in reader.shape(key))).astype(np.float32).T
        for name, paths in _parts(model).items():
            if not any(path in lora.owners for path in paths):
                continue
            lora_a, lora_b = map(whole, _keys(name, paths[0]))
            arrays[f"{paths[0]}/lora_a"] = lora_a
            for path in paths:
                arrays[f"{path}/lora_b"] = np.ascontiguousarray(lora_b[:, _columns(model, path)])
    return unflatten_dict(arrays, sep="/")


def _keys(name: str, path: str) -> tuple[str, str]:
    """Returns the names of the two tensors of a module."""
    if path == EMBEDDING:
        return f"{PREFIX}{name}.lora_embedding_A", f"{PREFIX}{name}.lora_embedding_B"
    return f"{PREFIX}{name}.lora_A.weight", f"{PREFIX}{name}.lora_B.weight"


def _parts(model: Model) -> dict[str, list[str]]:
    """Returns the name of each module -> the paths of its parameters, in the order of the parts of its tensor."""
    parts: dict[str, list[str]] = {}
    for path, name in sorted(modules(model).items(), key=lambda item: _tensor(model, item[0]).first):
        parts.setdefault(name, []).append(path)
    return parts


def _tensor(model: Model, path: str) -> Tensor:
    """Returns the tensor on disk of a parameter of `modules`."""
    tensor = FAMILIES[model.config.family].tensors(model.config)[path]
    assert isinstance(tensor, Tensor)  # `modules` has no stack of tensors
    return tensor


def _columns(model: Model, path: str) -> np.ndarray:
    """Returns the indices of a parameter's columns among the columns of the tensor on disk."""
    tensor, width = _tensor(model, path), leaves_of(model.abstract_params())[path].shape[1]
    of_group = tensor.first + np.arange(width // tensor.groups)
    return (np.arange(tensor.groups)[:, None] * tensor.columns + of_group).reshape(-1)


def _shape(model: Model, paths: list[str]) -> tuple[int, int]:
    """Returns the shape [in, out] of a module whose parts are the parameters at `paths`."""
    shapes = leaves_of(model.abstract_params())
    return shapes[paths[0]].shape[0], sum(shapes[path].shape[1] for path in paths)


def _number(where: str, fields: Json, name: str, kind: type[int] | type[float]) -> int | float:
    value = fields.get(name)
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 2**31
    if not is_number or (kind is int and not isinstance(value, int)):
        raise ValueError(f"{where}: {name}={untrusted.printable(value)} must be a positive number.")
    return kind(value)
