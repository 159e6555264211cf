"""What all commands share: whatever ends one is a paragraph without a traceback, and Ctrl-C says what is kept."""

import contextlib
import io
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator

from kd_jax import storage

INTERRUPTED = 130  # the exit code of shells for a command that Ctrl-C has ended
_watched = threading.Event()  # a thread ends the process at the second Ctrl-C


def start() -> None:
    """Prepares the terminal: characters that its encoding lacks are replaced, and a full disk is said once.

    Of several threads that a full disk stops, the one that was asked to write says so in a paragraph. A notebook calls no command,
    so that nothing is changed there.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    logging.getLogger("absl").addFilter(lambda record: not (record.exc_info and storage.is_full(record.exc_info[1])))
    before = threading.excepthook
    threading.excepthook = lambda failed: None if storage.is_full(failed.exc_value) else before(failed)


@contextlib.contextmanager
def ends_well(name: str, kept: Callable[[], str]) -> Iterator[None]:
    """Ends a command with a paragraph for an error of the user's, and with a line and the code 130 for Ctrl-C.

    Args:
      name: of the command, which begins the paragraph.
      kept: gives what is kept where Ctrl-C ends the command, as a clause.
    """
    with second_interrupt(name, kept):
        try:
            yield
        except (ValueError, FloatingPointError, OSError) as error:
            sys.exit(f"{name}: {error}")
        except KeyboardInterrupt:
            print(f"\n{name}: interrupted; {kept()}.", file=sys.stderr)
            sys.exit(INTERRUPTED)


@contextlib.contextmanager
def second_interrupt(name: str, kept: Callable[[], str]) -> Iterator[None]:
    """Ends the process at once at the second Ctrl-C, also while the main thread is in a compiler or waits for a disk.

    Python calls a signal's handler only between two of its own instructions, and calls it once for two signals that come
    meanwhile. The operating system's part of the handler writes a byte for each signal, which a thread reads.

    Args:
      name: of the command.
      kept: as in `ends_well`.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    here, there = socket.socketpair()
    there.setblocking(False)
    before = signal.set_wakeup_fd(there.fileno(), warn_on_full_buffer=False)

    def watch() -> None:
        count = 0
        while signals := here.recv(64):
            count += signals.count(signal.SIGINT)
            if count > 1:
                line = f"\n{name}: interrupted twice, and stopped at once; {kept()}.\n"
                os.write(2, line.encode(sys.stderr.encoding or "utf-8", errors="replace"))
                os._exit(INTERRUPTED)  # closes nothing: what is whole has its name already

    thread = threading.Thread(target=watch, name="kd_jax.command", daemon=True)
    thread.start()
    _watched.set()
    try:
        yield
    finally:
        _watched.clear()
        signal.set_wakeup_fd(before)
        there.close()
        thread.join()
        here.close()


def watched() -> bool:
    """Whether the second Ctrl-C ends the process as `second_interrupt` says, so that no handler has to do it."""
    return _watched.is_set()
