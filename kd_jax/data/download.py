"""Files from the web, by address and checksum."""

import hashlib
import os
import sys
import urllib.request
from pathlib import Path

from kd_jax import storage
from kd_jax.checksum import file_digest


def fetch(url: str, sha256: str = "") -> Path:
    """The file at an address, downloaded once, and refused unless it hashes to what is known of it.

    Args:
      url: best of a revision, whose bytes cannot change.
      sha256: of the bytes. Empty: nobody here knows it. Then the first download is trusted; its SHA-256 is printed and kept
        beside the file, as `sha256sum --check` reads it, and every later use and download is held to it.

    Raises:
      ValueError: a download, or a file from an earlier one, with another checksum.
      ConnectionError: no download.
    """
    folder = Path("~/.cache/kd_jax").expanduser()
    target = folder / f"{(sha256 or hashlib.sha256(url.encode()).hexdigest())[:12]}-{url.rpartition('/')[2]}"
    record = target.with_name(f"{target.name}.sha256")
    known = sha256 or (record.read_text(encoding="utf-8")[:64] if record.exists() else "")
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Renamed when it is whole and right, so that two may download at once.
        partial = target.with_suffix(f".{os.getpid()}")
        try:
            with storage.room(partial):
                urllib.request.urlretrieve(url, partial)
            found = sha256_of(partial)
            if known and found != known:
                kept = (
                    "" if sha256 else f" That is what {record} has of an earlier one: delete it to trust the new one."
                )
                raise ValueError(
                    f"the file from {url} hashes to {found}, not to {known}; it was cut off or replaced.{kept}"
                )
            if not known:
                storage.write_text(record, f"{found}  {target.name}\n")
                print(f"{url} is trusted at its first download; from now on it must hash to {found}.", file=sys.stderr)
                known = found
            partial.rename(target)
        except storage.StorageError:
            raise
        except OSError as error:
            raise ConnectionError(
                f"{url} could not be downloaded ({error}). Download it elsewhere, and name the file in data.options.path "
                f"(--data_path of kd_jax.evaluate)."
            ) from error
        finally:
            partial.unlink(missing_ok=True)
    if sha256_of(target) != known:
        raise ValueError(
            f"{target} does not hash to {known or 'what was recorded of it'} (any more); delete it to download it again."
        )
    return target


def sha256_of(path: Path) -> str:
    """Of a file's bytes."""
    return file_digest(path)
