"""Chat templates, rendered in a process of their own: a downloaded program that gets neither our time nor our memory.

Jinja's sandbox keeps a template from Python's objects, but it may still loop for ever, or multiply a string until memory ends
(and already when it is compiled: Jinja computes what is constant). No check from outside stops one C call, so that another
process renders, with a limit on its memory, and is ended if it takes too long. It is started once, and takes template after
template. This file is both sides: started as a script it is that process.

Not covered: where the system knows no RLIMIT_AS (macOS), memory is bounded by the time limit and the limit on the text alone.
"""

import contextlib
import json
import os
import resource
import selectors
import subprocess
import sys
import threading
import time
import weakref
from typing import Any, NoReturn

SECONDS = 10.0  # a template's: 100,000 times what one needs
START_SECONDS = 60.0  # Python's, to start from a slow disk
MIB = 2**20
MEMORY = 512 * MIB
CHARACTERS = MIB  # of a rendered text, and 16 times the message's own


def render(template: str, variables: dict[str, Any] | None) -> str:
    """The template's text, as transformers' settings render it.

    Args:
      template: Jinja.
      variables: what it sees: values of JSON. None: the template is compiled only, and the text empty.
    Raises:
      ValueError: whatever goes wrong, as the end of a sentence on the template: it is not Jinja, it raised something, the
        sandbox refused it, or it took too much time, memory or text.
    """
    global _worker
    with _lock:
        if _worker is None or not _worker.alive():
            _worker = _Worker()
        reply = _worker.ask({"template": template, "variables": variables})
    if "error" in reply:
        raise ValueError(reply["error"])
    return reply["text"]


class _Failed(Exception):
    """With a message that says all."""


class _Worker:
    """The process, from this side."""

    def __init__(self) -> None:
        command = [sys.executable, "-P", os.path.abspath(__file__)]
        self._process: Any = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
        )
        self._owner = os.getpid()
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

    def ask(self, request: dict[str, Any]) -> dict[str, str]:
        try:
            return json.loads(self._exchange(json.dumps(request).encode() + b"\n"))
        except _Failed as error:
            _end(self._process, self._owner)
            return {"error": str(error)}
        except BaseException:  # an interrupted question must not answer the next one
            _end(self._process, self._owner)
            raise

    def _exchange(self, question: bytes) -> bytes:
        unwritten = memoryview(question)
        try:
            while unwritten:
                unwritten = unwritten[self._process.stdin.write(unwritten) :]
            return self._line(SECONDS)
        except (BrokenPipeError, EOFError) as error:
            raise _Failed(f"ended its process, which may use {MEMORY // MIB} MiB of memory") from error
        except TimeoutError as error:
            raise _Failed(f"took longer than {SECONDS:g} s") from error

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
_worker: _Worker | None = None


# What follows runs in the other process.


def _serve() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # writes no file
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    compiled: dict[str, Any] = {}
    _reply({})
    for line in sys.stdin.buffer:
        try:
            _reply({"text": _rendered(compiled, **json.loads(line))})
        except MemoryError:
            _reply({"error": f"needed more than {MEMORY // MIB} MiB of memory"})
        except Exception as error:  # of whatever kind: the template's own program raised it
            message = str(error)
            _reply(
                {"error": message[:500] if isinstance(error, _Failed) else f"{type(error).__name__}: {message[:500]}"}
            )


def _reply(answer: dict[str, str]) -> None:
    sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
    sys.stdout.buffer.flush()


def _rendered(compiled: dict[str, Any], template: str, variables: dict[str, Any] | None) -> str:
    import jinja2

    if template not in compiled:
        compiled.clear()
        try:
            compiled[template] = _environment().from_string(template)
        except jinja2.TemplateSyntaxError as error:
            raise _Failed(f"is not valid Jinja: line {error.lineno}: {error.message}") from error
    if variables is None:
        return ""
    limit = CHARACTERS + 16 * len(json.dumps(variables))
    pieces, length = [], 0
    try:
        for piece in compiled[template].generate(**variables):
            pieces.append(piece)
            length += len(piece)
            if length > limit:
                raise _Failed(f"writes more than {limit} characters")
    except jinja2.TemplateError as error:  # raise_exception and what the sandbox refuses, among others
        raise _Failed(str(error)) from error
    return "".join(pieces)


def _environment() -> Any:
    """With transformers' settings, so that a template gives here what it gives there."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment: Any = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    # No strftime_now: today's date in a prompt would change a resumed run's rows. Templates do without it.
    return environment


def _raise_exception(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    # Jinja's own escapes HTML.
    return json.dumps(value, ensure_ascii=False, indent=indent)


if __name__ == "__main__":
    _serve()
