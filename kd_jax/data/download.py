"""Files from the web, by address and checksum."""

import hashlib
import os
import urllib.request
from pathlib import Path


def fetch(url: str, sha256: str) -> Path:
    """The file at an address, downloaded once, and refused unless it hashes to what is known of it.

    Args:
      url: of a revision, whose bytes cannot change.
      sha256: of the bytes.

    Raises:
      ValueError: a download, or a file from an earlier one, with another checksum.
      ConnectionError: no download.
    """
    target = Path("~/.cache/kd_jax").expanduser() / f"{sha256[:12]}-{url.rpartition('/')[2]}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        # Renamed when it is whole and right, so that two may download at once.
        partial = target.with_suffix(f".{os.getpid()}")
        try:
            urllib.request.urlretrieve(url, partial)
            found = sha256_of(partial)
            if found != sha256:
                raise ValueError(f"the file from {url} hashes to {found}, not to {sha256}; it was cut off or replaced.")
            partial.rename(target)
        except OSError as error:
            raise ConnectionError(
                f"{url} could not be downloaded ({error}). Download it elsewhere, and name the file in data.options.path."
            ) from error
        finally:
            partial.unlink(missing_ok=True)
    if sha256_of(target) != sha256:
        raise ValueError(f"{target} does not hash to {sha256} (any more); delete it to download it again.")
    return target


def sha256_of(path: Path) -> str:
    """Of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
