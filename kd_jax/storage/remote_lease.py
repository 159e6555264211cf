"""A lock for an address, so that only one run uses it at a time. The lock is an object that its run renews regularly.

Object stores have no locks, but the stores of Google and Amazon can refuse to replace an existing object. A run that
finds the lock of another run waits. If the lock is renewed meanwhile, the other run is active. If the lock is not
renewed for STALE seconds, the other run was killed, and the new run takes over. No clocks are compared.

Some cases are not covered. A run can be silent for STALE seconds because the host was suspended or the network was
down. If another run has then taken over, the first run notices this only at the next check. A run checks before each
copy and before each checkpoint, but a write in progress continues. The same can happen if two runs take over at the
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

from fsspec import AbstractFileSystem
from tqdm import tqdm

from kd_jax.storage import storing

LOCK = "lock"
RENEW, STALE, LOOK = 15.0, 60.0, 2.0  # seconds between renewals, until a lock is stale, between looks


class Taken(OSError):
    """The error of a run whose address another run has taken over."""


@contextlib.contextmanager
def held(system: AbstractFileSystem, root: str, url: str) -> Iterator[Callable[[], None]]:
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
            content = system.cat_file(path)
        except FileNotFoundError:
            return ""
        return (content.decode(errors="replace") if isinstance(content, bytes) else content).strip()

    def write(mode: str) -> None:
        now = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
        system.pipe_file(path, f"{owner}, last heard of at {now} UTC\n".encode(), mode=mode)

    def check() -> None:
        if not (content := read()).startswith(owner):
            raise Taken(f"another run has taken {url} over: the lock now names {content or 'no run'}.")

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
            if (content := read()) and _is_stale(read, content, url):
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


def _is_stale(read: Callable[[], str], content: str, url: str) -> bool:
    """Returns True if the lock is unchanged after STALE seconds, and False if the lock is deleted meanwhile.

    The reason for the wait is printed.

    Raises:
      ValueError: the lock changed, so another run is active.
    """
    report = lambda text: tqdm.write(f"kd_jax: {text}", file=sys.stderr)
    report(
        f"{url}/{LOCK} is the lock of {content}; this run waits up to {STALE:g} s to see whether that run is active."
    )
    deadline = time.monotonic() + STALE
    while time.monotonic() < deadline:
        time.sleep(LOOK)
        if not (now := read()):
            return False
        if now != content:
            raise ValueError(
                f"the work directory {url} is in use by another run ({now}). Wait for that run, stop that run, or choose another "
                f"--workdir."
            )
    report(f"that run is not active, and {url} is taken over.")
    return True
