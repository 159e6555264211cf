"""Shared behaviour of all commands.

An error ends a command with one paragraph and without a traceback. After Ctrl-C the command names the results that
remain.
"""

import contextlib
import copy
import io
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from absl import flags

from kd_jax import command_help, storage

INTERRUPTED = 130  # the exit code that shells use for a command ended by Ctrl-C
_watched = threading.Event()  # set while a thread waits for the second Ctrl-C


def start() -> None:
    """Prepares the terminal: unencodable characters are replaced, and a full disk is reported only once.

    A full disk can stop several threads. Only the thread whose caller asked for the write reports the error, in a
    paragraph. A notebook does not call this function, so a notebook is not changed.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    logging.getLogger("absl").addFilter(lambda record: not (record.exc_info and storage.is_full(record.exc_info[1])))
    before = threading.excepthook
    threading.excepthook = lambda failed: None if storage.is_full(failed.exc_value) else before(failed)


def parse(
    name: str, declared: flags.FlagValues, argv: Sequence[str], *, about: str, required: Sequence[str] = (),
    positional: str = "", defaults: Mapping[str, str] | None = None,
) -> tuple[dict[str, Any], list[str]]:  # fmt: skip
    """Returns the values of a command's flags by name, and the positional arguments.

    With --help the function prints the help and exits with 0. An error in the flags ends the process with one paragraph.

    Args:
      name: the name of the command, such as evaluate.
      declared: the declared flags, which are not changed.
      argv: the command line, without the name of the program.
      about: the usage and the purpose of the command, for the help.
      required: the flags that must be given.
      positional: the name of the positional arguments, of which at least one must be given; "" if there are none.
      defaults: descriptions of defaults that the declaration does not have, by flag.
    """
    if command_help.ASKED & set(argv):
        print(command_help.of_flags(name, about, _meanings(declared, defaults or {})))
        sys.exit(0)
    values = copy.deepcopy(declared)
    values.set_gnu_getopt(True)  # flags may follow positional arguments
    try:
        rest = values([name, *argv])[1:]
    except flags.Error as error:
        sys.exit(f"kd_jax.{name}: {str(error).removeprefix('flag ').replace('the key takes', 'the flag takes')}")
    missing = [f"--{flag}" for flag in required if values[flag].value is None]
    if missing or (positional and not rest):
        needed = " and ".join(missing) if missing else f"at least one {positional}"
        sys.exit(
            f"kd_jax.{name}: {needed} {'are' if len(missing) > 1 else 'is'} needed. For example: python -m kd_jax.{name} "
            f"{command_help.EXAMPLES[name][0]}. --help lists all flags."
        )
    if rest and not positional:
        sys.exit(f"kd_jax.{name}: {rest[0]!r} is no flag; flags look like --{next(iter(declared))}=VALUE.")
    return {flag: values[flag].value for flag in values}, rest


def _meanings(declared: flags.FlagValues, defaults: Mapping[str, str]) -> dict[str, str]:
    """Returns the help texts of flags, each with the choices and the default value."""
    meanings = {}
    for name in declared:
        flag = declared[name]
        default = defaults.get(name) or ("" if flag.default in (None, "") else repr(flag.default))
        choices = getattr(flag.parser, "enum_values", ())
        meaning = f"{flag.help.partition('>: ')[2]} One of {', '.join(choices)}." if choices else flag.help
        meanings[name] = f"{meaning} [{default}]" if default else meaning
    return meanings


@contextlib.contextmanager
def ends_well(name: str, remaining: Callable[[], str]) -> Iterator[None]:
    """Ends a command with a paragraph for a user's error, and with a line and the exit code 130 for Ctrl-C.

    Args:
      name: the name of the command, which begins the paragraph.
      remaining: a function that returns a clause on the results that remain after Ctrl-C.
    """
    with second_interrupt(name, remaining):
        try:
            yield
        except (ValueError, FloatingPointError, OSError) as error:
            sys.exit(f"{name}: {error}")
        except KeyboardInterrupt:
            print(f"\n{name}: interrupted; {remaining()}.", file=sys.stderr)
            sys.exit(INTERRUPTED)


@contextlib.contextmanager
def second_interrupt(name: str, remaining: Callable[[], str]) -> Iterator[None]:
    """Ends the process at once at the second Ctrl-C, even while the main thread is in a compiler or waits for a disk.

    Python calls a signal handler only between two Python instructions, and only once for several signals. But for each
    signal the interpreter's C handler writes a byte to a socket at once. A thread reads these bytes.

    Args:
      name: the name of the command.
      remaining: the argument of `ends_well`.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)

    def watch() -> None:
        count = 0
        while signals := reader.recv(64):
            count += signals.count(signal.SIGINT)
            if count > 1:
                line = f"\n{name}: interrupted twice, and stopped at once; {remaining()}.\n"
                os.write(2, line.encode(sys.stderr.encoding or "utf-8", errors="replace"))
                os._exit(INTERRUPTED)  # no file has to be closed, because complete files already have their final names

    thread = threading.Thread(target=watch, name="kd_jax.command", daemon=True)
    thread.start()
    _watched.set()
    try:
        yield
    finally:
        _watched.clear()
        signal.set_wakeup_fd(before)
        writer.close()
        thread.join()
        reader.close()


def watched() -> bool:
    """Returns True if `second_interrupt` ends the process at the second Ctrl-C, so that no other handler is needed."""
    return _watched.is_set()
