"""The reader of a teacher's cache, for `readers`."""

import functools
import json

import jax
import numpy as np
from hypothesis import strategies as st

from kd_jax import sharding
from kd_jax.data import Tokenizer
from kd_jax.data.rows import from_pieces
from kd_jax.run.cache import cached_values, made_from
from kd_jax.settings import Settings
from kd_jax.teachers import cache_files as files
from kd_jax.teachers.cache_reading import Cache
from kd_jax.teachers.cached import KINDS
from tests.fuzz.mutations import documents
from tests.fuzz.readers_of_models import Safetensors
from tests.fuzz.readers_of_rows import ArrayRecord
from tests.fuzz.readers_of_text import TokenizerFiles

COUNTS = {"train": 9, "held_out": 3}
PART_ROWS = 4


@functools.cache
def rows(split):
    """Returns rows of a few tokens, with prompts of one or two tokens."""
    random = np.random.default_rng(len(split))
    pieces = [random.integers(0, 15, 3 + index % 4).astype(np.int32) for index in range(COUNTS[split])]
    prompts = np.array([1 + index % 2 for index in range(len(pieces))], np.int32)
    return from_pieces(pieces, prompts, prompts)


def make_cache(folder, kind, tokenizer, **teacher):
    """Writes a cache of these rows with invented values."""
    folder.mkdir(parents=True)
    manifest = {
        "version": files.VERSION, "kind": kind, "k": 0 if kind == "hidden" else 3, "power": 1.0, "seed": 0, "hidden_size": 4,
        "head": files.UNTIED, "head_hash": "", "part_rows": PART_ROWS,
        "teacher": {"path": "models/teacher", "fingerprint": "0123"} | teacher,
        "splits": {split: files.describe_rows(rows(split)) | {"temperature": 1.0} for split in COUNTS},
    } | made_from(Settings(), tokenizer)  # fmt: skip
    if kind == "hidden":
        matrix = np.ones((4, tokenizer.vocab_size), np.float32)
        manifest["head_hash"] = files.write_head(folder, files.UNTIED, matrix)
    files.write_tokenizer(folder, tokenizer)
    for split, part in files.all_parts(manifest):
        its = range(part * PART_ROWS, min((part + 1) * PART_ROWS, COUNTS[split]))
        files.write_part(files.part_path(folder, split, part), (_record(manifest, split, i) for i in its), kind)
    files.write_manifest(folder, manifest)


def _record(manifest, split, index):
    count = files.counted(rows(split), index)
    values = {name: np.ones((count, *shape), dtype) for name, (dtype, shape) in files.fields(manifest).items()}
    return files.record(manifest, split, rows(split), index, values)


class TeacherCache:
    """Damages manifest.json, the output matrix and the parts, and reads all rows."""

    share = 0.05
    values = (
        *COUNTS,
        *KINDS,
        2,
        3,
        4,
        9,
        2**16,
        2**17,
        2**24,
        10**18,
        "../head",
        "head.kernel",
        "embed.embedding",
        1.0,
        2.0,
    )

    def base(self, folder):
        TokenizerFiles().base(folder / "tokenizers")
        self.tokenizer = Tokenizer.load(folder / "tokenizers" / "wordlevel")
        for kind in KINDS:
            make_cache(folder / kind, kind, self.tokenizer)

    def inputs(self, folder):
        choices = []
        for kind in KINDS:
            manifest, part = (
                json.loads((folder / kind / files.MANIFEST).read_text(encoding="utf-8")),
                "train/000001.array_record",
            )
            spoilt = {
                files.MANIFEST: documents(manifest, (*manifest, *manifest["splits"]["train"]), self.values),
                part: ArrayRecord._bytes((folder / kind / part).read_bytes())
                | ArrayRecord._records(folder / kind / part),
            }
            if kind == "hidden":
                spoilt[files.HEAD] = Safetensors._file(folder / kind / files.HEAD)
            for name, contents in spoilt.items():
                choices.append(contents.map(lambda content, path=f"{kind}/{name}": {path: content}))
        return st.one_of(choices)

    def read(self, folder, changed):
        kind = next(iter(changed)).partition("/")[0]
        cache = Cache.open(folder / kind)
        mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
        assert len(jax.tree.leaves(cache.load_params(mesh, "whole"))) == (cache.teacher.kind == "hidden")
        for split in COUNTS:
            kept = cached_values(Settings(), self.tokenizer, {"teacher": cache}, split, rows(split))
            for index in range(COUNTS[split]):
                for name, values in kept.read(index).items():
                    assert values.shape == (files.counted(rows(split), index), *kept.fill_values[name].shape)
