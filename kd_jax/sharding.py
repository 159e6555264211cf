"""Placement of arrays: one mesh with three axes, and one table from a parameter's path to its PartitionSpec."""

import math
import re
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import KeyPath
from jaxtyping import PyTree

AXES = ("data", "fsdp", "tensor")
# The rows of a batch are divided over both of these axes. Parameters are divided over fsdp and tensor.
BATCH = P(("data", "fsdp"))

# The first match counts. The path of an optimiser's state ends with the path of its parameter, so one table places
# both. Matrices that read the residual stream are [D, out], and matrices that write to it are [in, D]. D is divided
# over fsdp, the other axis over tensor. The matrices of experts have the number of the expert as their first axis.
RULES = (
    (r"embed/embedding$", P("tensor", "fsdp")),
    (r"positions/embedding$", P(None, "fsdp")),
    (r"head/kernel$", P("fsdp", "tensor")),
    (r"experts/(gate|up)/kernel$", P(None, "fsdp", "tensor")),
    (r"experts/down/kernel$", P(None, "tensor", "fsdp")),
    (r"(project_in|project_out|router)/kernel$", P("fsdp", None)),
    (r"(query|key|value|gate|up)/kernel$", P("fsdp", "tensor")),
    (r"(query|key|value|gate|up)/bias$", P("tensor")),
    (r"(output|down)/kernel$", P("tensor", "fsdp")),
    (r"(output|down)/bias$", P()),
    (r"norm/(scale|bias)$", P()),
)
# Replacements for the axes in RULES, by layout. A teacher has no gradient and no optimiser state, so it may fit into
# memory in another layout than the student's.
# student: sharded like the student.
# spread: also sharded over `data`, whose devices each hold a copy of the student. This layout needs the least memory.
# tensor: sharded over `tensor` only.
# whole: replicated. This layout saves gathering the teacher in every step.
LAYOUTS: dict[str, dict[str, tuple[str, ...] | None]] = {
    "student": {},
    "spread": {"fsdp": ("data", "fsdp")},
    "tensor": {"fsdp": None},
    "whole": {"fsdp": None, "tensor": None},
}


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh for `data` copies of the model.

    Each copy is divided `fsdp` ways by parameter and `tensor` ways by matrix.

    Args:
      data: the size of the axis over which only the batch is divided; -1 for the number of devices divided by the sizes
        of the other axes. One of the three sizes may be -1.
      fsdp: the size of the axis over which both the batch and the parameters are divided.
      tensor: the size of the axis over which matrices are divided and rows are not.
      devices: the devices of the mesh; by default all devices of JAX.

    Raises:
      ValueError: the product of the sizes is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    known = math.prod(size for size in sizes if size != -1)
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
        raise ValueError(
            f"mesh {dict(zip(AXES, sizes, strict=True))} needs sizes of at least 1, and at most one -1 for the size that is "
            f"computed from the number of devices."
        )
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"mesh {dict(zip(AXES, (data, fsdp, tensor), strict=True))} does not fit {len(devices)} devices: "
            f"the product of the sizes must be {len(devices)}; a size of -1 is computed from the other sizes."
        )
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def tree_shardings(mesh: Mesh, tree: PyTree, layout: str = "student") -> PyTree:
    """Returns the sharding of every array of a tree of parameters, of an optimiser's state, or of both.

    If the size of a mesh axis does not divide a dimension of an array, the dimension is replicated over that axis. An
    odd vocabulary therefore costs memory, but is no error.

    Args:
      mesh: the mesh from `make_mesh`.
      tree: arrays or ShapeDtypeStructs. A matrix in int8 and its scales are sharded like the matrix. The two factors of
        LoRA are divided like the rows and like the columns of their matrix.
      layout: a name in LAYOUTS.

    Returns:
      A tree of the same structure with a NamedSharding in place of each array.

    Raises:
      ValueError: no rule matches the path of an array.
    """
    axes = LAYOUTS[layout]

    def sharding_of(path: KeyPath, leaf: jax.Array | jax.ShapeDtypeStruct) -> NamedSharding:
        name = re.sub("/kernel/(qvalue|scale)$", "/kernel", path_name(path))
        matrix = re.sub("/lora_[ab]$", "", name)
        if leaf.ndim == 0:
            return NamedSharding(mesh, P())
        for pattern, spec in RULES:
            if re.search(pattern, matrix):
                # The rank of low-rank factors is small, and is not divided.
                divided = {"lora_a": (0,), "lora_b": (1,)}.get(name.rpartition("/")[2], range(len(spec)))
                names = [axes.get(axis, axis) if axis and i in divided else None for i, axis in enumerate(spec)]
                return NamedSharding(mesh, _fit(mesh, P(*names), leaf.shape))
        raise ValueError(f"no sharding rule matches the parameter {name!r} of shape {leaf.shape}; add one to RULES.")

    return jax.tree_util.tree_map_with_path(sharding_of, tree)


def for_lookup(mesh: Mesh | None, params: PyTree) -> PyTree:
    """Returns the parameters with an embedding that is not divided over `fsdp`.

    With a divided embedding, XLA would look up the divided vectors and then gather the vectors of the whole batch. Every
    other matrix is gathered over `fsdp` where the matrix is used. Parameters without an embedding, such as those of a
    cached teacher, and None are returned unchanged.
    """
    if mesh is None or mesh.size == 1 or not params or "embed" not in params:
        return params
    gathered = NamedSharding(mesh, _fit(mesh, P("tensor", None), params["embed"]["embedding"].shape))
    return params | {"embed": {"embedding": jax.lax.with_sharding_constraint(params["embed"]["embedding"], gathered)}}


def with_shardings(tree: PyTree, shardings: PyTree) -> PyTree:
    """Returns ShapeDtypeStructs of the arrays in a tree, with their shardings."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch's arrays: rows are divided over data and fsdp, other axes are replicated."""
    return NamedSharding(mesh, BATCH)


def put_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Returns one global array for each of a batch's arrays, assembled from the rows of each process.

    If `tensor` is wider than the devices of a process, these devices need rows of other processes. Then all rows are
    sent to all processes.
    """
    sharding, ways = batch_sharding(mesh), mesh.shape["data"] * mesh.shape["fsdp"]
    parts = set(map(str, sharding.addressable_devices_indices_map((ways,)).values()))
    if len(parts) * jax.process_count() == ways:
        return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}
    gathered = {name: np.concatenate(multihost_utils.process_allgather(array)) for name, array in batch.items()}
    return {name: put_whole(mesh, array) for name, array in gathered.items()}


def put_whole(mesh: Mesh, array: np.ndarray) -> jax.Array:
    """Returns a global array, with rows divided like the rows of a batch, from the complete array on every process."""
    return jax.make_array_from_callback(array.shape, batch_sharding(mesh), lambda index: array[index])


def fetch_whole(array: jax.Array) -> np.ndarray:
    """Returns a global array as a NumPy array on every process."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def barrier(name: str) -> None:
    """Waits until every process has called this function.

    Args:
      name: a description of the state before the call; the same on every process.
    """
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def from_first_process(number: int) -> int:
    """Returns the number of process 0 on every process. Every process waits for process 0."""
    return number if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def least_of_processes(number: int) -> int:
    """Returns the smallest of the processes' numbers on every process. Every process waits for all others."""
    return number if jax.process_count() == 1 else int(multihost_utils.process_allgather(np.int32(number)).min())


def text_from_first_process(text: str) -> str:
    """Returns the text of process 0 on every process. Every process waits for process 0."""
    if jax.process_count() == 1:
        return text
    content = np.frombuffer(text.encode(), np.uint8)
    padded = np.zeros(from_first_process(len(content)), np.uint8)  # on every process as long as the text of process 0
    padded[: len(content)] = content[: len(padded)]
    return np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes().decode()


def path_name(path: KeyPath) -> str:
    """Returns the path of a leaf as a text, such as 'layers/0/mlp/up/kernel'."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _fit(mesh: Mesh, spec: P, shape: tuple[int, ...]) -> P:
    """Returns the spec without the axes whose sizes do not divide the dimensions of a shape."""
    if len(spec) > len(shape):
        return P()  # a factored state of an optimiser such as adafactor, small enough to replicate
    ways = [math.prod(mesh.shape[axis] for axis in ((name,) if isinstance(name, str) else name or ())) for name in spec]
    return P(*(name if shape[i] % ways[i] == 0 else None for i, name in enumerate(spec)))
