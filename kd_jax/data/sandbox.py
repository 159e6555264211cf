"""Chat templates and tokenizers with regular expressions of their own, in processes that get neither our time nor our memory.

Jinja's sandbox keeps a template from Python's objects, but it may still loop for ever, or multiply a string until memory ends
(and already when it is compiled: Jinja computes what is constant); a regular expression may try more ways through a text than
there is time for. No check from outside stops one C call, so that another process works, with a limit on its memory, and is
ended if it takes too long. It is started once, and takes template after template, or tokenizer after tokenizer. Its program is
`sandbox_process.py`.

Not covered: where the system knows no RLIMIT_AS (macOS), memory is bounded by the time limit and the limit on the text alone.
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

SECONDS = 10.0  # for a template or a text: 100,000 times what one needs
START_SECONDS = 60.0  # Python's, to start from a slow disk
MIB = 2**20
MEMORY = {"template": 512 * MIB, "tokenizer": 4096 * MIB}  # whose library has threads
BYTES_A_SECOND = MIB // 2  # that a tokenizer has more time for: of its own file and of texts


def render(template: str, variables: dict[str, Any], date: str) -> str:
    """Returns the template's text, as transformers renders it.

    Args:
      template: Jinja.
      variables: the values that the template may read, each of them a value of JSON.
      date: the date, in the form of ISO 8601, that `strftime_now` gives in place of the present one.
    Raises:
      ValueError: whatever goes wrong, as the end of a sentence on the template: it is not Jinja, it raised something, the
        sandbox refused it, or it took too much time, memory or text.
    """
    with _lock:
        return _value(_worker("template").ask({"template": template, "variables": variables, "date": date}))


def names(template: str) -> list[str]:
    """Compiles the template, and returns the names of the variables that the template reads.

    The name `date` stands for a call of `strftime_now`, whose date `render` is given.

    Args:
      template: Jinja.
    Raises:
      ValueError: as for `render`.
    """
    with _lock:
        return _value(_worker("template").ask({"template": template}))


def tokenizer(content: bytes, method: str, *arguments: Any) -> Any:
    """What a method of a `tokenizers.Tokenizer` gives, which is neither padded nor truncated.

    Args:
      content: its tokenizer.json, in UTF-8.
      method: its name. encode_batch gives ids and offsets, encode_batch_fast ids alone.
      *arguments: values of JSON.
    Raises:
      ValueError: whatever goes wrong, as for `render`.
    """
    with _lock:
        worker = _worker("tokenizer")
        request = {"method": method, "arguments": arguments}
        if worker.holds != content:  # the process keeps the last one
            request["content"] = content.decode()
        reply = worker.ask(request, BYTES_A_SECOND)
        worker.holds = b"" if "error" in reply else content
        return _value(reply)


class _Failed(Exception):
    """A failure of the process, whose message is the end of a sentence."""


class _Worker:
    """The process, from this side."""

    def __init__(self, kind: str) -> None:
        program = str(Path(__file__).with_name("sandbox_process.py").absolute())
        command = [sys.executable, "-P", program, kind, str(MEMORY[kind])]
        self._process: Any = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0,
            env=os.environ | {"RAYON_NUM_THREADS": "8"},  # each has memory of its own
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
        """Whether it can be asked, and by this process: after a fork it is the parent's."""
        return self._owner == os.getpid() and self._process.poll() is None

    def ask(self, request: dict[str, Any], bytes_a_second: float = math.inf) -> dict[str, Any]:
        """The reply; to a question that is long there is more time, if so many bytes need a second."""
        question = json.dumps(request).encode() + b"\n"
        try:
            return json.loads(self._exchange(question, SECONDS + len(question) / bytes_a_second))
        except _Failed as error:
            _end(self._process, self._owner)
            return {"error": str(error)}
        except BaseException:  # an interrupted question must not answer the next one
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
        """The next line that the process writes."""
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
