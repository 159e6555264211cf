"""A lock for an address, so that only one run uses it at a time. The lock is an object that its run renews regularly.

Object stores have no locks, but those of Google and Amazon can refuse to write an object that already exists. A run
that finds such an object watches it. If the object is renewed meanwhile, another run is active. If it is not renewed
for STALE seconds, its run was killed, and the new run takes over. No clocks are compared.

Some cases are not covered. A run can be silent for STALE seconds because its host was suspended or its network was
down. If another run has then taken over, the first run notices this only at its next check. It checks before it copies
anything and before each checkpoint, but a write in progress continues. The same can happen if two runs take over at the
same moment, or if an S3-compatible store does not support the condition.
"""

import contextlib
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

from kd_jax.storage import storing

LOCK = "lock"
RENEW, STALE, LOOK = 15.0, 60.0, 2.0  # seconds between renewals, until a lock is stale, between looks


class Taken(OSError):
    """The error of a run whose address another run has taken over."""


@contextlib.contextmanager
def held(system: Any, root: str, url: str) -> Iterator[Callable[[], None]]:
    """Holds an address, and yields a function that raises Taken if another run has taken the address over.

    Args:
      system: fsspec's file system of the address.
      root: the path of the address in that file system.
      url: the address, for messages.

    Raises:
      ValueError: another run uses the address; the message names the run.
    """
    path = f"{root}/{LOCK}"
    owner = f"process {os.getpid()} on {socket.gethostname()}, {uuid.uuid4().hex[:8]}"

    def read() -> str:
        try:
            return system.cat_file(path).decode(errors="replace").strip()
        except FileNotFoundError:
            return ""

    def write(mode: str) -> None:
        now = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
        system.pipe_file(path, f"{owner}, last heard of at {now} UTC\n".encode(), mode=mode)

    def check() -> None:
        if not (there := read()).startswith(owner):
            raise Taken(f"another run has taken {url} over since this one was last heard of ({there or 'it is gone'}).")

    def renew() -> None:
        while not ended.wait(RENEW):
            with contextlib.suppress(Exception):  # network errors are reported when files are copied
                check()
                write("overwrite")

    with storing(url):
        system.makedirs(root, exist_ok=True)
        while True:
            with contextlib.suppress(FileExistsError):
                write("create")
                break
            if (found := read()) and _left(read, found, url):
                system.rm_file(path)
    ended = threading.Event()
    thread = threading.Thread(target=renew, name="kd_jax.storage.remote_lease", daemon=True)
    thread.start()
    try:
        yield check
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(Exception):  # a lock that remains becomes stale and is taken over
            check()
            system.rm_file(path)


def _left(read: Callable[[], str], found: str, url: str) -> bool:
    """Returns True if the lock is unchanged after STALE seconds, and False if it is deleted meanwhile.

    Prints why it waits.

    Raises:
      ValueError: the lock changed, so another run is active.
    """
    say = lambda text: tqdm.write(f"kd_jax: {text}", file=sys.stderr)
    say(f"{url}/{LOCK} is that of {found}; for up to {STALE:g} s this waits to see whether that run is still there.")
    deadline = time.monotonic() + STALE
    while time.monotonic() < deadline:
        time.sleep(LOOK)
        if not (now := read()):
            return False
        if now != found:
            raise ValueError(
                f"the work directory {url} is in use by another run ({now}). Wait for it, stop it, or choose another --workdir."
            )
    say(f"it is not, and {url} is taken over.")
    return True
