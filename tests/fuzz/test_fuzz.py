"""Tests each reader with earlier findings of the fuzzer and with 200 new inputs. `python -m tests.fuzz` runs longer."""

import pytest

from tests.fuzz.bench import CORPUS, Bench, kept
from tests.fuzz.readers import READERS

FRESH = 200


@pytest.fixture(scope="module", params=READERS)
def bench(request, tmp_path_factory):
    return Bench(request.param, tmp_path_factory.mktemp(request.param))


def test_the_corpus_loads_or_is_refused(bench):
    paths = sorted((CORPUS / bench.name).glob("*.json"))
    assert paths, f"there is no corpus of {bench.name}"
    for path in paths:
        assert not bench.judge(kept(path)), path
    assert bench.slowest < 10


def test_unspoilt_files_load(bench):
    """Otherwise every input would be refused, with or without damage."""
    bench.counts.clear()
    first = sorted(path.relative_to(bench.folder) for path in bench.folder.rglob("*") if path.is_file())[0]
    assert not bench.judge({str(first): (bench.folder / first).read_bytes()})
    assert bench.counts == {"loaded": 1}


@pytest.mark.slow
def test_fresh_inputs_load_or_are_refused(bench):
    found = []
    bench.counts.clear()
    bench.fuzz(1, FRESH, after=lambda files, wrong: found.append(wrong) if wrong else None)
    assert not found
    assert bench.counts.total() == FRESH and bench.counts["loaded"] and bench.counts["refused"]
