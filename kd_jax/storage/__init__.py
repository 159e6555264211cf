"""Files, work directories and checkpoints, on a disk or at an address such as gs://bucket/run.

The functions of `files` may be imported from this package. The modules are imported by name: `checkpoint` (the states
of a run), `directory` (the work directory of a run), `remote` (addresses), `hub` and `hub_upload` (the Hugging Face
hub), `checksum` and `untrusted` (files of other people).
"""

from kd_jax.storage.files import (
    StorageError,
    is_full,
    is_partial,
    read_json_lines,
    room,
    space_left,
    storing,
    write_json_lines,
    write_whole,
    writing_whole,
)

__all__ = [
    "StorageError",
    "is_full",
    "is_partial",
    "read_json_lines",
    "room",
    "space_left",
    "storing",
    "write_json_lines",
    "write_whole",
    "writing_whole",
]
