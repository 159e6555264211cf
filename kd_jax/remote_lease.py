"""One run at a time at an address: an object there says whose it is, and its run writes it anew as long as it lives.

Stores have no locks, but those of Google and Amazon can refuse to write an object that exists already. Who finds one watches it:
what is renewed meanwhile is somebody's, what is not for STALE seconds was left by a kill, and is taken over. No clocks are compared.

What remains: a run that was silent for so long, its host suspended or its network down, and was taken over, learns it only at its
next look, which is before whatever it copies and before each checkpoint. What it was writing then goes on, and so it does
where two take over within the same moment, or where a store that speaks S3 does not know the condition.
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
RENEW, STALE, LOOK = 15.0, 60.0, 2.0  # seconds between renewals, without one until it is taken over, and between looks


class Taken(OSError):
    """Another run has the address."""


@contextlib.contextmanager
def held(system: Any, root: str, url: str) -> Iterator[Callable[[], None]]:
    """Holds an address, whose path in the file system is `root`; gives what raises Taken once another run has it.

    Raises:
      ValueError: another run is in it; it is named.
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
            with contextlib.suppress(Exception):  # of the network; whoever copies something says it
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
    thread = threading.Thread(target=renew, name="kd_jax.remote_lease", daemon=True)
    thread.start()
    try:
        yield check
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(Exception):  # what stays is taken over
            check()
            system.rm_file(path)


def _left(read: Callable[[], str], found: str, url: str) -> bool:
    """Whether what was found is still as it was after STALE seconds; it may also go. Says what takes so long."""
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
