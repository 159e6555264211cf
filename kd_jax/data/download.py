"""Downloads of files from the web, which are checked by their checksums."""

import sys
import urllib.request
from pathlib import Path

from kd_jax import storage
from kd_jax.storage.checksum import digest, file_digest


def fetch(url: str, sha256: str = "") -> Path:
    """Returns the local path of a file from the web. The file is downloaded once, and its checksum is verified.

    Args:
      url: the address, preferably of a fixed revision, whose bytes cannot change.
      sha256: the SHA-256 of the file's bytes. If empty, the first download is trusted. The SHA-256 of the first
        download is printed and stored beside the file, in the format of `sha256sum --check`. All later uses and
        downloads must match it.

    Raises:
      ValueError: the new download, or the file of an earlier download, has another checksum.
      ConnectionError: the download failed.
    """
    folder = Path("~/.cache/kd_jax").expanduser()
    target = folder / f"{(sha256 or digest(url))[:12]}-{url.rpartition('/')[2]}"
    record = target.with_name(f"{target.name}.sha256")
    known = sha256 or (record.read_text(encoding="utf-8")[:64] if record.exists() else "")
    if not target.exists():
        # The file is renamed once it is complete and verified, so that two processes may download it at once.
        try:
            with storage.writing_whole(target) as partial:
                with storage.room(partial):
                    urllib.request.urlretrieve(url, partial)
                downloaded = sha256_of(partial)
                if known and downloaded != known:
                    hint = f" {record} has the checksum of an earlier download: delete it to trust the new file."
                    raise ValueError(
                        f"the file from {url} has the SHA-256 {downloaded}; "
                        f"{known} was expected, so the file is incomplete or was replaced.{'' if sha256 else hint}"
                    )
                if not known:
                    storage.write_whole(record, f"{downloaded}  {target.name}\n")
                    print(
                        f"{url}: the first download is trusted; later downloads must have the SHA-256 {downloaded}.",
                        file=sys.stderr,
                    )
                    known = downloaded
        except storage.StorageError:
            raise
        except OSError as error:
            raise ConnectionError(
                f"{url} could not be downloaded ({error}). Download the file in another way, and name it in data.options.path "
                f"(--data_path of kd_jax.evaluate)."
            ) from error
    if sha256_of(target) != known:
        raise ValueError(
            f"{target} does not have the SHA-256 {known or f'in {record}'}; delete the file to download it again."
        )
    return target


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes."""
    return file_digest(path)
