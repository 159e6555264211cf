"""Runs chat templates and unusual tokenizers in separate processes with limits on time and memory.

Jinja's sandbox keeps a template away from Python's objects. But a template may still loop for ever, or multiply a
string until memory is full. This can even happen during compilation, because Jinja evaluates constant expressions. A
regular expression may need too much time on a text. No check from outside can stop a call into C code. So another
process does the work, with a limit on its memory, and it is killed if it takes too long. The process is started once
and handles one template, or one tokenizer, after another. The program of the process is `sandbox_process.py`.

One case is not covered: on systems without RLIMIT_AS (macOS), only the time limit and the limit on the text bound the
memory.
"""

import json
import math
import os
import selectors
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

SECONDS = 10.0  # for a template or a text: 100,000 times the usual time
START_SECONDS = 60.0  # for the start of Python from a slow disk
MIB = 2**20
MEMORY = {"template": 512 * MIB, "tokenizer": 4096 * MIB}  # the tokenizers library has threads
BYTES_A_SECOND = MIB // 2  # a tokenizer gets a second more per so many bytes of its file and texts


def render(template: str, variables: dict[str, Any], date: str) -> str:
    """Returns the rendered template, as transformers renders it.

    Args:
      template: the Jinja template.
      variables: the values that the template may read, each a JSON value.
      date: the date, in ISO 8601 format, that `strftime_now` returns in place of the present date.
    Raises:
      ValueError: the template is not valid Jinja, raised an error, was refused by the sandbox, or needed too much time,
        memory or text. The message is the end of a sentence about the template.
    """
    with _lock:
        return _value(_worker("template").ask({"template": template, "variables": variables, "date": date}))


def names(template: str) -> list[str]:
    """Compiles the template, and returns the names of the variables that the template reads.

    The name `date` stands for a call of `strftime_now`, whose date is an argument of `render`.

    Args:
      template: the Jinja template.
    Raises:
      ValueError: the template fails, as in `render`.
    """
    with _lock:
        return _value(_worker("template").ask({"template": template}))


def tokenizer(content: bytes, method: str, *arguments: Any) -> Any:
    """Calls a method of a `tokenizers.Tokenizer` in the other process, and returns the result.

    The tokenizer neither pads nor truncates.

    Args:
      content: the content of tokenizer.json, in UTF-8.
      method: the name of the method. encode_batch returns ids and offsets, encode_batch_fast only ids.
      *arguments: the arguments of the method, as JSON values.
    Raises:
      ValueError: the call fails, as in `render`.
    """
    with _lock:
        worker = _worker("tokenizer")
        request = {"method": method, "arguments": arguments}
        if worker.holds != content:  # the process keeps the last tokenizer
            request["content"] = content.decode()
        reply = worker.ask(request, BYTES_A_SECOND)
        worker.holds = b"" if "error" in reply else content
        return _value(reply)


class _Failed(Exception):
    """A failure of the process, whose message is the end of a sentence."""


class _Worker:
    """The parent's handle of a sandbox process."""

    def __init__(self, kind: str) -> None:
        program = str(Path(__file__).with_name("sandbox_process.py").absolute())
        command = [sys.executable, "-P", program, kind, str(MEMORY[kind])]
        self._process: Any = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0,
            env=os.environ | {"RAYON_NUM_THREADS": "8"},  # each thread has memory of its own
        )  # fmt: skip
        self._owner, self._memory, self.holds = os.getpid(), MEMORY[kind], b""
        weakref.finalize(self, _end, self._process, self._owner)
        self._left = b""
        try:
            self._line(START_SECONDS)
        except (TimeoutError, EOFError) as error:
            _end(self._process, self._owner)
            raise RuntimeError(f"{' '.join(command)} did not start within {START_SECONDS:g} s.") from error

    def alive(self) -> bool:
        """Returns True if the process runs and belongs to this process. After a fork it belongs to the parent."""
        return self._owner == os.getpid() and self._process.poll() is None

    def ask(self, request: dict[str, Any], bytes_a_second: float = math.inf) -> dict[str, Any]:
        """Returns the reply to a request.

        Args:
          request: the request, as JSON values.
          bytes_a_second: the rate that sets the extra time for a long request.
        """
        question = json.dumps(request).encode() + b"\n"
        try:
            return json.loads(self._exchange(question, SECONDS + len(question) / bytes_a_second))
        except _Failed as error:
            _end(self._process, self._owner)
            return {"error": str(error)}
        except BaseException:  # the reply to an interrupted request must not be read as the next reply
            _end(self._process, self._owner)
            raise

    def _exchange(self, question: bytes, seconds: float) -> bytes:
        unwritten = memoryview(question)
        try:
            while unwritten:
                unwritten = unwritten[self._process.stdin.write(unwritten) :]
            return self._line(seconds)
        except (BrokenPipeError, EOFError) as error:
            raise _Failed(f"ended its process, which may use {self._memory // MIB} MiB of memory") from error
        except TimeoutError as error:
            raise _Failed(f"took longer than {seconds:.3g} s") from error

    def _line(self, seconds: float) -> bytes:
        """Returns the next line that the process writes.

        Raises:
          TimeoutError: no whole line arrives in the given seconds.
          EOFError: the process has ended.
        """
        until = time.monotonic() + seconds
        pieces = [self._left]
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in pieces[-1]:
                if not selector.select(max(0.0, until - time.monotonic())):
                    raise TimeoutError
                if not (piece := os.read(self._process.stdout.fileno(), 2**16)):
                    raise EOFError
                pieces.append(piece)
        line, _, self._left = b"".join(pieces).partition(b"\n")
        return line


def _end(process: Any, owner: int) -> None:
    if os.getpid() == owner:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


_lock = threading.Lock()
_workers: dict[str, _Worker] = {}


def _worker(kind: str) -> _Worker:
    if kind not in _workers or not _workers[kind].alive():
        _workers[kind] = _Worker(kind)
    return _workers[kind]


def _value(reply: dict[str, Any]) -> Any:
    if "error" in reply:
        raise ValueError(reply["error"])
    return reply["value"]
