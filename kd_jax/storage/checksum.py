"""Checksums of arrays and files. The checksum of an array depends on no mesh and on no number of processes."""

import hashlib
import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree, UInt32

# The age of a file, in nanoseconds, from which its digest is remembered. A newer file may change again with the same
# time stamp.
SETTLED = 2 * 10**9
_digests: dict[tuple[int, ...], str] = {}  # a file's status -> the SHA-256 of its bytes


def checksums(tree: PyTree) -> PyTree:
    """Returns one number for each array of a tree, in a tree of the same structure.

    Args:
      tree: a tree of jax.Arrays of numbers or booleans, with any placement.

    Returns:
      Python integers below 2^32.

    Example:
      >>> checksums({"a": jnp.array([1.0, 2.0]), "b": jnp.array([2.0, 1.0])})
      {'a': 4286578688, 'b': 4269801472}
    """
    return jax.tree.map(int, jax.device_get(jax.jit(lambda tree: jax.tree.map(_checksum, tree))(tree)))


def _checksum(array: jax.Array) -> UInt32[jax.Array, ""]:
    """Returns the sum of the entries' bits, each times an odd number that depends on its position, modulo 2^32.

    The order of summation does not change the result.
    """
    bits = _bits(array)
    strides = np.cumprod((1, *bits.shape[:0:-1]), dtype=np.uint64).astype(np.uint32)[::-1]
    position = sum(
        jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * stride
        for axis, stride in enumerate(strides[: bits.ndim])
    )
    return jnp.sum(bits * (2 * position + 1), dtype=jnp.uint32)


def _bits(array: jax.Array) -> jax.Array:
    """Returns the bits of the entries as uint32. An array with 8 bytes per entry gains an axis of size 2."""
    if array.dtype == bool:
        return array.astype(jnp.uint32)
    size = array.dtype.itemsize
    bits = jax.lax.bitcast_convert_type(array, {1: jnp.uint8, 2: jnp.uint16}.get(size, jnp.uint32))
    return bits.astype(jnp.uint32)


def digest(*parts: object) -> str:
    """Returns the SHA-256 of texts, bytes or JSON values, in 64 hexadecimal digits.

    Args:
      *parts: a str is hashed as UTF-8, and bytes are hashed unchanged. Any other value is hashed as JSON with sorted
        keys, in which `str` of a value replaces a value that JSON does not have.

    Example:
      >>> digest({"b": 1, "a": 2})[:16]
      '21501dbaf73f5223'
    """
    total = hashlib.sha256()
    for part in parts:
        text = part if isinstance(part, str | bytes) else json.dumps(part, sort_keys=True, default=str)
        total.update(text.encode() if isinstance(text, str) else text)
    return total.hexdigest()


def file_digest(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes, in hexadecimal digits.

    A digest is remembered as long as the process runs, so a file with an unchanged status is read only once.
    """
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        if key in _digests:
            return _digests[key]
        started = time.time_ns()
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if started - status.st_ctime_ns > SETTLED:
        _digests[key] = sha256
    return sha256


def file_digests(paths: Iterable[Path]) -> list[str]:
    """Returns `file_digest` of each file, computed in parallel threads.

    On two cores the digest of 2 GiB in four files took 0.9 s, and 1.8 s with one thread.
    """
    with ThreadPoolExecutor() as threads:  # hashlib releases the interpreter's lock
        return list(threads.map(file_digest, paths))
