"""The fingerprint of a Hugging Face folder: a hash of the bytes from which a model is made."""

from pathlib import Path

from kd_jax.models.safetensors_io import weight_files
from kd_jax.storage.checksum import digest, file_digests

CONFIGS = ("config.json", "generation_config.json")


def fingerprint(folder: Path) -> str:
    """Returns a hash of the bytes of a folder's configs and weights, which depends on no path, mesh or dtype.

    The weights are read once, in parallel threads (see `checksum.file_digests`).

    Args:
      folder: a folder that `load_pretrained` accepts.

    Returns:
      Sixteen hexadecimal digits; "" if config.json or a file of the weights is missing.

    Raises:
      ValueError: the index of the weights cannot be read.
      OSError: a file cannot be read.
    """
    weights = weight_files(folder)
    files = [folder / name for name in CONFIGS if (folder / name).is_file()] + weights
    if not weights or not (folder / CONFIGS[0]).is_file() or not all(file.is_file() for file in weights):
        return ""
    lines = (f"{file.name} {digest}\n" for file, digest in zip(files, file_digests(files), strict=True))
    return digest(*lines)[:16]
