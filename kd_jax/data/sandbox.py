"""Chat templates and tokenizers with regular expressions of their own, in processes that get neither our time nor our memory.

Jinja's sandbox keeps a template from Python's objects, but it may still loop for ever, or multiply a string until memory ends
(and already when it is compiled: Jinja computes what is constant); a regular expression may try more ways through a text than
there is time for. No check from outside stops one C call, so that another process works, with a limit on its memory, and is
ended if it takes too long. It is started once, and takes template after template, or tokenizer after tokenizer. This file is
both sides: started as a script it is that process.

Not covered: where the system knows no RLIMIT_AS (macOS), memory is bounded by the time limit and the limit on the text alone.
"""

import contextlib
import json
import math
import os
import resource
import selectors
import subprocess
import sys
import threading
import time
import weakref
from typing import Any, NoReturn

SECONDS = 10.0  # for a template or a text: 100,000 times what one needs
START_SECONDS = 60.0  # Python's, to start from a slow disk
MIB = 2**20
MEMORY = {"template": 512 * MIB, "tokenizer": 4096 * MIB}  # whose library has threads
CHARACTERS = MIB  # of a rendered text, and 16 times the message's own
BYTES_A_SECOND = MIB // 2  # that a tokenizer has more time for: of its own file and of texts


def render(template: str, variables: dict[str, Any] | None) -> str:
    """The template's text, as transformers' settings render it.

    Args:
      template: Jinja.
      variables: what it sees: values of JSON. None: the template is compiled only, and the text empty.
    Raises:
      ValueError: whatever goes wrong, as the end of a sentence on the template: it is not Jinja, it raised something, the
        sandbox refused it, or it took too much time, memory or text.
    """
    with _lock:
        return _value(_worker("template").ask({"template": template, "variables": variables}))


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
    """With a message that says all."""


class _Worker:
    """The process, from this side."""

    def __init__(self, kind: str) -> None:
        command = [sys.executable, "-P", os.path.abspath(__file__), kind]
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


# What follows runs in the other process.


def _serve(kind: str) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # writes no file
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY[kind], MEMORY[kind]))
    kept: dict[str, Any] = {}
    work = {"template": _rendered, "tokenizer": _tokenized}[kind]
    _reply({})
    for line in sys.stdin.buffer:
        try:
            _reply({"value": work(kept, **json.loads(line))})
        except MemoryError:
            _reply({"error": f"needed more than {MEMORY[kind] // MIB} MiB of memory"})
        except _Failed as error:
            _reply({"error": str(error)[:500]})
        except BaseException as error:  # of whatever kind: the template's own program raised it, or Rust panicked
            _reply({"error": f"{type(error).__name__}: {str(error)[:500]}"})


def _reply(answer: dict[str, Any]) -> None:
    sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
    sys.stdout.buffer.flush()


def _tokenized(kept: dict[str, Any], method: str, arguments: list[Any], content: str | None = None) -> Any:
    import tokenizers

    if content is not None:
        kept.clear()
        kept["tokenizer"] = tokenizers.Tokenizer.from_str(content)
        kept["tokenizer"].no_padding()
        kept["tokenizer"].no_truncation()
    found = getattr(kept["tokenizer"], method)(*arguments)
    if method == "encode_batch":
        return [(encoding.ids, encoding.offsets) for encoding in found]
    return [encoding.ids for encoding in found] if method == "encode_batch_fast" else found


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
    _serve(sys.argv[1])
