"""One input at a time: put beside the files that are right, read, judged, and taken away again."""

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
MESSAGE = 3000  # characters of an error, at most
LARGE = 2**20  # bytes


class Bench:
    """A reader and the folder that it reads.

    Attributes:
      counts: of inputs, by what became of them: loaded, refused (by the project's own error, which names the folder) or found.
      slowest: the longest that an input took, in seconds.
    """

    def __init__(self, name, folder):
        self.name, self.folder, self.reader = name, Path(folder) / "files", READERS[name]
        self.current = Path(folder) / "current"  # the names of the files of the input that is being read
        self.reader.base(self.folder)
        self.counts, self.slowest, self._right, self._seen = Counter(), 0.0, {}, set()

    def judge(self, files):
        """What is wrong with how the files are read; empty if nothing is."""
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
            gc.collect()  # a refusal's traceback holds it, in a cycle: the next input's memory would not be its own
        return wrong

    def fuzz(self, seed, inputs, before=lambda: None, after=lambda files, wrong: None):
        """Fresh inputs, which the seed gives, each another than all before: Hypothesis likes to repeat itself."""
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
    """Writes an input down, with what was found."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"found": wrong, "files": {k: packed(v) for k, v in files.items()}}, indent=1) + "\n")


def kept(path):
    """The files of an input that `keep` wrote."""
    return {name: unpacked(content) for name, content in json.loads(path.read_text(encoding="utf-8"))["files"].items()}


def packed(content):
    """Bytes as a text that a diff can show: Latin-1, or compressed where that is much shorter."""
    small = zlib.compress(content, 9)
    return f"zlib:{small.hex()}" if len(small) * 2 + 100 < len(content) else f"text:{content.decode('latin-1')}"


def unpacked(text):
    kind, _, rest = text.partition(":")
    return zlib.decompress(bytes.fromhex(rest)) if kind == "zlib" else rest.encode("latin-1")


def _place(error):
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/kd_jax/" in f.filename]
    return f"[{Path(frames[-1].filename).name}: {frames[-1].line}]" if frames else ""
