"""A teacher's cache on disk: the records that are accepted, the valid values of a manifest, and the valid files."""

import json
import os
import shutil
import time

import pytest

from kd_jax import sharding
from kd_jax.data import Tokenizer
from kd_jax.run.cache import cached_values
from kd_jax.settings import Settings
from kd_jax.storage import directory
from kd_jax.teachers import cache_files as files
from kd_jax.teachers.cache_reading import Cache, CachedValues, check_manifest
from tests.fuzz.readers_of_caches import make_cache, rows
from tests.fuzz.readers_of_text import TokenizerFiles


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a cache of each kind."""
    folder = tmp_path_factory.mktemp("caches")
    TokenizerFiles().base(folder / "tokenizers")
    tokenizer = Tokenizer.load(folder / "tokenizers" / "wordlevel")
    for kind in ("hidden", "samples"):
        make_cache(folder / kind, kind, tokenizer)
    make_cache(folder / "other", "samples", tokenizer, fingerprint="4567")
    make_cache(folder / "moved", "samples", tokenizer, path="/mnt/elsewhere")
    return folder


@pytest.fixture
def cache(made, tmp_path):
    return shutil.copytree(made / "hidden", tmp_path / "cache")


def manifest_of(folder, **changes):
    """Changes the manifest on disk and returns it. A change "split__key" sets the key of that split."""
    manifest = json.loads((folder / files.MANIFEST).read_text())
    for name, value in changes.items():
        split, _, key = name.partition("__")
        if key:
            manifest["splits"].setdefault(split, {})[key] = value
        else:
            manifest[name] = value
    (folder / files.MANIFEST).write_text(json.dumps(manifest))
    return manifest


def test_a_part_of_another_teachers_cache_of_the_same_rows_is_not_taken(made, tmp_path):
    part, here = "train/000001.array_record", shutil.copytree(made / "samples", tmp_path / "cache")
    read = lambda: CachedValues(Cache.open(here), "train", rows("train")).read(5)
    mine = read()
    shutil.copy(made / "moved" / part, here / part)
    assert all((read()[name] == values).all() for name, values in mine.items())
    shutil.copy(made / "other" / part, here / part)
    with pytest.raises(
        ValueError, match=r"000001.array_record: .*row 5 is damaged \(the record is of row 5, with other tokens or of"
    ):
        read()


@pytest.mark.parametrize(
    "changes",
    [dict(tokenizer="0"), dict(template="0"), dict(power=0.5), dict(seed=1), dict(train__temperature=2.0)],
)  # fmt: skip
def test_records_are_of_one_tokenizer_template_and_way_to_draw(changes, made, tmp_path):
    here = shutil.copytree(made / "samples", tmp_path / "cache")
    manifest_of(here, **changes)
    with pytest.raises(ValueError, match="with other tokens or of another cache"):
        CachedValues(Cache.open(here), "train", rows("train")).read(0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(train__rows=10**18, part_rows=1), "'train' has 1000000000000000000 rows in parts of 1, but there"),
        (dict(held_out__rows=2**18 + 1), "'held_out' has 262145 rows in parts of 4"),
        (dict(held_out__rows=True), "'held_out' has True rows"),
        (dict(other__rows=1), r"the splits are \['train', 'held_out', 'other'\]"),
        (dict(kind="top_k", vocab_size=2**20, k=2**17), "k=131072 is out of range, 1 to 65536"),
        (dict(vocab_size=2**40), r"vocab_size=1099511627776 is out of range"),
        (dict(hidden_size=2**40), "hidden_size=1099511627776 is out of range"),
        (dict(train__temperature=10**400), "'train' has the temperature 10{17}.*0 *, but"),
        (dict(version=1), "manifest.json has version 1 and kind 'hidden', but this kd_jax reads version 2"),
        (dict(k="many" * 10**5), "'k' is 'manymany.*many' and not of type int"),
        (dict(kind="x" * 10**6), "kind 'xxx"),
        (dict(head="x" * 10**6), "head='xxx"),
        (dict(tokenizer="x" * 10**6), "tokenizer: 'xxx.*' in the cache"),
        (dict(settings={str(i): "x" * 100 for i in range(10**4)}, vocab_size=77), "vocab_size: 77 in the cache"),
    ],
)  # fmt: skip
def test_a_manifest_is_read_in_bounded_time_and_quoted_at_bounded_length(changes, words, cache, made):
    manifest_of(cache, **changes)
    tokenizer, started = Tokenizer.load(made / "tokenizers" / "wordlevel"), time.monotonic()
    with pytest.raises(ValueError, match=words) as error:
        cached_values(Settings(), tokenizer, {"teacher": Cache.open(cache)}, "train", rows("train"))
    assert time.monotonic() - started < 5 and len(str(error.value)) < 6000 and str(cache) in str(error.value)


def test_what_is_written_can_be_read(made):
    manifest = manifest_of(made / "samples")
    manifest["splits"]["train"]["rows"], manifest["part_rows"] = 2**21, 1
    with pytest.raises(ValueError, match="choose another --part_rows"):
        check_manifest(made, manifest)


def test_a_run_says_where_its_cache_is_of_another_teacher_than_its_config(made):
    teacher = Cache.open(made / "samples").teacher
    start, limits = "a cache of kind samples", "; no texts of the teacher and no KLs on student text are measured"
    assert teacher.described("") == teacher.described("models/teacher") == start + limits
    said = f"{start} of the teacher models/teacher (teacher.path=models/larger is not read){limits}"
    assert teacher.described("models/larger") == said


def head_of(folder):
    return Cache.open(folder).load_params(sharding.make_mesh(8, 1, 1), "whole")["head"]["kernel"]


def test_the_output_matrix_is_the_one_that_was_written(cache):
    assert (head_of(cache) == 1).all()
    content = (cache / files.HEAD).read_bytes()
    for spoilt in (content[:-1] + b"\1", (2**62).to_bytes(8, "little") + content[8:], content[:-4], b""):
        (cache / files.HEAD).write_bytes(spoilt)
        with pytest.raises(ValueError, match="head.safetensors is missing, or has other content than was written"):
            head_of(cache)
        manifest_of(cache, head_hash=files.file_digest(cache / files.HEAD))  # an attacker can also change the hash
        if spoilt[-1:] != b"\1":
            with pytest.raises(ValueError, match=r"head.safetensors: (not a complete|the output matrix)"):
                head_of(cache)
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].strip()
    header = header[:-1] + b"," + header[1:]
    (cache / files.HEAD).write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    manifest_of(cache, head_hash=files.file_digest(cache / files.HEAD))
    with pytest.raises(ValueError, match="the key 'head.kernel' appears twice"):
        head_of(cache)
    (cache / files.HEAD).unlink()
    os.mkfifo(cache / files.HEAD)
    with pytest.raises(ValueError, match="head.safetensors is missing, or has"):
        head_of(cache)


@pytest.mark.parametrize(
    "name", ["tokenizer_of_mine", "head.safetensors.bak", "manifest.json.txt", "head.safetensors.partial-x", "train"]
)
def test_only_what_a_call_can_have_left_is_taken_for_its_own(name, tmp_path):
    assert files.unknown_name(tmp_path / "nowhere") == ""
    for ours in (
        "tokenizer",
        "head.safetensors",
        "manifest.json.partial-12",
        "head.safetensors.partial-3",
        directory.LOCK,
    ):
        (tmp_path / ours).mkdir()
    assert files.unknown_name(tmp_path) == ""
    (tmp_path / name).mkdir()
    assert files.unknown_name(tmp_path) == name


def test_what_killed_calls_have_left_half_written_is_found_and_nothing_else(cache):
    left = [cache / "manifest.json.partial-1", cache / "train" / "000000.array_record.partial-23"]
    for path in (*left, cache / "notes.partial-of", cache / "train" / "my.partial-1"):
        path.write_text("")
    assert files.partials(cache) == left
