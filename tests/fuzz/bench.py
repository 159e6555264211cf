"""Tests one input at a time: adds the input to valid files, reads and judges them, and restores the valid files."""

import gc
import hashlib
import json
import time
import traceback
import zlib
from collections import Counter
from pathlib import Path

import hypothesis
from hypothesis import HealthCheck, Phase, settings

from tests.fuzz.readers import READERS

CORPUS = Path(__file__).parent / "corpus"
MESSAGE = 3000  # largest number of characters of an error
LARGE = 2**20  # bytes


class Bench:
    """A reader and the folder that it reads.

    Attributes:
      counts: the number of inputs by outcome. "loaded" means no error, "refused" means the project's own error, which
        names the folder, and "found" means any other error.
      slowest: the longest time for an input, in seconds.
    """

    def __init__(self, name, folder):
        self.name, self.folder, self.reader = name, Path(folder) / "files", READERS[name]
        self.current = Path(folder) / "current"  # a file with the names of the current input's files
        self.reader.base(self.folder)
        self.counts, self.slowest, self._right, self._seen = Counter(), 0.0, {}, set()

    def judge(self, files):
        """Reads the files. Returns a description of any wrong behaviour of the reader, and otherwise an empty text."""
        for name, content in files.items():
            path = self.folder / name
            if name not in self._right:
                self._right[name] = path.read_bytes() if path.exists() else None
            path.write_bytes(content)
        self.current.write_text("\n".join(files), encoding="utf-8")
        started, wrong, outcome = time.perf_counter(), "", "loaded"
        try:
            self.reader.read(self.folder, files)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            outcome = "refused"
            if type(error) is not ValueError or str(self.folder) not in str(error) or len(str(error)) > MESSAGE:
                outcome = "found"
                wrong = f"{type(error).__name__}: {str(error)[:300]} {_place(error)}"
        self.slowest = max(self.slowest, time.perf_counter() - started)
        self.counts[outcome] += 1
        for name in files:
            if self._right[name] is None:
                (self.folder / name).unlink()
            else:
                (self.folder / name).write_bytes(self._right[name])
        if sum(map(len, files.values())) > LARGE:
            gc.collect()  # a reference cycle in the traceback of an error holds the memory of the input
        return wrong

    def fuzz(self, seed, inputs, before=lambda: None, after=lambda files, wrong: None):
        """Tests new inputs of the seed. Every input differs from all before, although Hypothesis repeats inputs."""
        goal, rounds = len(self._seen) + inputs, 0
        while len(self._seen) < goal:

            @hypothesis.seed(seed * 1000 + rounds)
            @settings(
                max_examples=goal - len(self._seen) + 10, database=None, deadline=None, phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            @hypothesis.given(self.reader.inputs(self.folder))
            def one(files):
                digest = hashlib.blake2b(digest_size=8)
                for name, content in sorted(files.items()):
                    digest.update(name.encode() + b"\0" + content)
                key = digest.digest()
                if key not in self._seen and len(self._seen) < goal:
                    self._seen.add(key)
                    before()
                    after(files, self.judge(files))

            one()
            rounds += 1


def keep(path, files, wrong):
    """Saves an input and the finding."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"found": wrong, "files": {k: packed(v) for k, v in files.items()}}, indent=1) + "\n")


def kept(path):
    """Returns the files of an input that `keep` has saved."""
    return {name: unpacked(content) for name, content in json.loads(path.read_text(encoding="utf-8"))["files"].items()}


def packed(content):
    """Returns bytes as text that a diff can show: in Latin-1, or compressed where that is much shorter."""
    small = zlib.compress(content, 9)
    return f"zlib:{small.hex()}" if len(small) * 2 + 100 < len(content) else f"text:{content.decode('latin-1')}"


def unpacked(text):
    kind, _, rest = text.partition(":")
    return zlib.decompress(bytes.fromhex(rest)) if kind == "zlib" else rest.encode("latin-1")


def _place(error):
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/kd_jax/" in f.filename]
    return f"[{Path(frames[-1].filename).name}: {frames[-1].line}]" if frames else ""
