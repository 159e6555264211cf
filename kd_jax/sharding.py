"""Where arrays live: one mesh with three axes, and one table from a parameter's path to its PartitionSpec."""

import math
import re
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")
# Rows of a batch are divided over both of these; parameters are divided over fsdp and tensor.
BATCH = P(("data", "fsdp"))

# The first match counts. Optimiser states carry their parameter's path as a suffix, so one table places them too.
# Matrices that read the residual stream are [D, out], those that write it [in, D]: D goes to fsdp, the other to tensor.
RULES = (
    (r"embed/embedding$", P("tensor", "fsdp")),
    (r"positions/embedding$", P(None, "fsdp")),
    (r"head/kernel$", P("fsdp", "tensor")),
    (r"(query|key|value|gate|up)/kernel$", P("fsdp", "tensor")),
    (r"(query|key|value|gate|up)/bias$", P("tensor")),
    (r"(output|down)/kernel$", P("tensor", "fsdp")),
    (r"(output|down)/bias$", P()),
    (r"norm/(scale|bias)$", P()),
)
# A teacher may lie otherwise: what stands for a rule's axis. It has no gradient and no optimiser, so that there may be room for
# it to be whole, which saves gathering it in every step; or none at all, so that even those divide it that have a copy of the
# student each.
LAYOUTS: dict[str, dict[str, Any]] = {
    "student": {},
    "spread": {"fsdp": ("data", "fsdp")},
    "tensor": {"fsdp": None},
    "whole": {"fsdp": None, "tensor": None},
}


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Any = None) -> Mesh:
    """The mesh: `data` copies of the model, each divided `fsdp` ways by parameter and `tensor` ways by matrix.

    Args:
      data: size of the axis over which the batch alone is divided; -1: whatever the other two leave.
      fsdp: size of the axis over which both the batch and the parameters are divided.
      tensor: size of the axis over which matrices are divided and rows are not.
      devices: all of JAX's by default.

    Raises:
      ValueError: sizes that do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    known = math.prod(size for size in sizes if size != -1)
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
        raise ValueError(
            f"mesh {dict(zip(AXES, sizes, strict=True))} needs sizes of at least 1, and at most one -1 for 'the rest'."
        )
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"mesh {dict(zip(AXES, (data, fsdp, tensor), strict=True))} does not fit {len(devices)} devices: "
            f"the sizes must multiply to {len(devices)}; -1 for one of them stands for whatever the others leave."
        )
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def tree_shardings(mesh: Mesh, tree: Any, layout: str = "student") -> Any:
    """The sharding of every array of a tree of parameters, of an optimiser's state, or of both.

    An axis of the mesh that does not divide an array's dimension is left out there, and the dimension is whole on
    each of that axis's devices: an odd vocabulary costs memory, not an error.

    Args:
      mesh: as from `make_mesh`.
      tree: arrays or ShapeDtypeStructs; a matrix in int8 and its scales lie as the matrix.
      layout: one of LAYOUTS.

    Returns:
      The same tree with a NamedSharding in place of each array.

    Raises:
      ValueError: a path that no rule matches.
    """
    axes = LAYOUTS[layout]

    def place(path: Any, leaf: Any) -> NamedSharding:
        name = re.sub("/kernel/(qvalue|scale)$", "/kernel", path_name(path))
        if leaf.ndim == 0:
            return NamedSharding(mesh, P())
        for pattern, spec in RULES:
            if re.search(pattern, name):
                return NamedSharding(mesh, _fit(mesh, P(*(axes.get(axis, axis) for axis in spec)), leaf.shape))
        raise ValueError(f"no sharding rule matches the parameter {name!r} of shape {leaf.shape}; add one to RULES.")

    return jax.tree_util.tree_map_with_path(place, tree)


def for_lookup(mesh: Mesh | None, params: Any) -> Any:
    """Parameters whose embedding is whole over `fsdp`, as every other matrix is where it is used.

    Left to itself XLA looks the divided vectors up and then gathers the whole batch's.
    """
    if mesh is None or mesh.size == 1:
        return params
    whole = NamedSharding(mesh, _fit(mesh, P("tensor", None), params["embed"]["embedding"].shape))
    return params | {"embed": {"embedding": jax.lax.with_sharding_constraint(params["embed"]["embedding"], whole)}}


def with_shardings(tree: Any, shardings: Any) -> Any:
    """ShapeDtypeStructs that say where their arrays live."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of a batch's arrays: rows over data and fsdp, everything else whole."""
    return NamedSharding(mesh, BATCH)


def put_batch(mesh: Mesh, batch: dict[str, Any]) -> dict[str, jax.Array]:
    """One global array from each process's rows of it.

    Where a process's devices need rows of others, since `tensor` is wider than what it has, all rows go to all.
    """
    sharding, ways = batch_sharding(mesh), mesh.shape["data"] * mesh.shape["fsdp"]
    parts = set(map(str, sharding.addressable_devices_indices_map((ways,)).values()))
    if len(parts) * jax.process_count() == ways:
        return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}
    whole = {name: np.concatenate(multihost_utils.process_allgather(array)) for name, array in batch.items()}
    return {name: put_whole(mesh, array) for name, array in whole.items()}


def put_whole(mesh: Mesh, array: Any) -> jax.Array:
    """A global array, its rows divided as a batch's, of which every process has the whole."""
    return jax.make_array_from_callback(array.shape, batch_sharding(mesh), lambda index: array[index])


def fetch_whole(array: jax.Array) -> np.ndarray:
    """A global array as every process can hold it."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def from_first_process(number: int) -> int:
    """What process 0 says, on every process; all wait for it."""
    return number if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def least_of_processes(number: int) -> int:
    """The least of what the processes say, on every process; all wait for it."""
    return number if jax.process_count() == 1 else int(multihost_utils.process_allgather(np.int32(number)).min())


def text_from_first_process(text: str) -> str:
    """Returns the text of process 0 on every process; all wait for it."""
    if jax.process_count() == 1:
        return text
    content = np.frombuffer(text.encode(), np.uint8)
    whole = np.zeros(from_first_process(len(content)), np.uint8)  # on every process as long as that of the first
    whole[: len(content)] = content[: len(whole)]
    return np.asarray(multihost_utils.broadcast_one_to_all(whole)).tobytes().decode()


def path_name(path: Any) -> str:
    """'layers/0/mlp/up/kernel' for the path of a leaf."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def _fit(mesh: Mesh, spec: P, shape: tuple[int, ...]) -> P:
    if len(spec) > len(shape):
        return P()  # a state that optimisers such as adafactor keep in a factored shape: small, so whole
    ways = [math.prod(mesh.shape[axis] for axis in ((name,) if isinstance(name, str) else name or ())) for name in spec]
    return P(*(name if shape[i] % ways[i] == 0 else None for i, name in enumerate(spec)))
