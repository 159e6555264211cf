"""A full disk and other storage errors give a one-paragraph message. A partly written file is never used."""

import contextlib
import errno
import json
import os
import resource
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import data, metrics, models, storage
from kd_jax.models import safetensors_io
from kd_jax.prefixes import responses
from kd_jax.storage import checkpoint, remote
from kd_jax.teachers import cache_files as files
from tests.helpers.commands import environment
from tests.helpers.paths import ROOT

pytestmark = [pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")]


@contextlib.contextmanager
def small_files(size):
    """Limits the size of every file in bytes. For the writer this is like a full disk, and it needs no root rights."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def fails(path):
    """Expects the paragraph that `main` prints, with the path and the free space."""
    return pytest.raises(OSError, match=rf"(?s){path}.*File too large.*MiB are left\. Make room")


def write_rows(path, count=3000):
    random = np.random.default_rng(0)
    words = lambda: random.bytes(100).hex()
    path.write_text("".join(json.dumps({"prompt": words(), "response": words()}) + "\n" for _ in range(count)))


def test_a_dataset_that_does_not_fit_is_no_dataset(tmp_path):
    write_rows(tmp_path / "rows.jsonl", 500)
    load = lambda: data.load(
        "jsonl", split="train", data_dir=str(tmp_path / "built"), path=str(tmp_path / "rows.jsonl")
    )
    with small_files(50_000), fails(tmp_path / "built"):
        load()
    assert not list((tmp_path / "built").rglob("*.array_record*"))
    assert len(load()) == 491


class Position:
    def get_state(self):
        return {"next": 1}


def test_a_checkpoint_that_does_not_fit_is_named_beside_the_last_good_one(tmp_path):
    state = {"a": jnp.asarray(np.random.default_rng(0).standard_normal(100_000), jnp.float32)}
    with checkpoint.open_manager(str(tmp_path), 2) as manager:
        checkpoint.save(manager, 1, state, Position())
        checkpoint.wait(manager)
        words = r"/checkpoints; the last good checkpoint is of step 1\. .* MiB are left\. Make room, .*File too large"
        with pytest.raises(OSError, match=f"(?s)could not be written to .*{words}"), small_files(100_000):
            checkpoint.save(manager, 2, state, Position())
            checkpoint.wait(manager)
    assert checkpoint.last_step(str(tmp_path)) == 1


def test_an_export_that_does_not_fit_is_no_folder(tmp_path):
    config = models.ModelConfig(family="llama", vocab_size=4096, hidden_size=16, num_layers=1, num_heads=2)
    model = models.from_config(config)
    params = model.init(jax.random.key(0))
    with small_files(100_000), fails("model.safetensors"):
        models.save_pretrained(tmp_path / "student", model, params)
    assert not list(tmp_path.iterdir())


def test_a_part_of_a_cache_that_does_not_fit_is_missing(tmp_path):
    path, records = tmp_path / "train" / "000000.array_record", [os.urandom(1000)] * 300
    with small_files(100_000), fails(path):
        files.write_part(path, records, "hidden")
    assert not list(path.parent.iterdir())
    files.write_part(path, records, "hidden")

    def computed():
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory on the device")
        yield

    with pytest.raises(RuntimeError, match="^RESOURCE_EXHAUSTED"):  # memory of the device, not of the disk
        files.write_part(path, computed(), "hidden")


def test_responses_that_do_not_fit_are_not_there_and_none_is_lost(tmp_path):
    line = json.dumps([{"prompt": "p" * 1000, "context": "", "response": "r" * 1000}] * 8) + "\n"
    (tmp_path / "responses.jsonl.partial").write_text(line * 4, encoding="utf-8")
    write = lambda: responses.write_responses(
        tmp_path, [{}] * 32, None, None, None, None, batch_size=8, seed=0, settings={}, progress=lambda it: it
    )  # fmt: skip
    with small_files(20_000), fails("responses.jsonl"):
        write()
    assert not (tmp_path / "responses.jsonl").exists()
    assert len(write().read_text(encoding="utf-8").splitlines()) == 32


def test_metrics_that_do_not_fit_stop_the_run_and_are_closed(tmp_path):
    with (
        pytest.raises(OSError, match=rf"{tmp_path}.*MiB are left\. Make room"), storage.room(tmp_path),
        metrics.Writer(str(tmp_path), 0) as writer, small_files(20_000),
    ):  # fmt: skip
        for step in range(10_000):
            writer.write(step, "train", {"loss": 1.0})
    assert [line["step"] for line in metrics.read(tmp_path)][:2] == [0, 1]


def test_tensorboard_that_cannot_write_stops_the_run(tmp_path, monkeypatch):
    with pytest.raises(
        OSError, match=rf"{tmp_path}/tensorboard/events.*could not be written.*MiB are left\. Make room"
    ):
        with metrics.Writer(str(tmp_path), 0) as writer:

            def full(event):
                raise OSError(errno.ENOSPC, "No space left on device")

            monkeypatch.setattr(writer._board, "write_event", full)
            writer.write(0, "train", {"loss": 1.0})


def test_errors_of_libraries_name_the_path_and_the_cause(tmp_path, monkeypatch):
    with pytest.raises(
        OSError, match=r"^/some/file could not be read or written \(RuntimeError: the library failed\)\.$"
    ):
        with storage.storing("/some/file"):
            raise RuntimeError("the library failed")
    with pytest.raises(ValueError, match=r"^row 3 is wrong$"), storage.storing("/some/file"):
        raise ValueError("row 3 is wrong")
    with pytest.raises(RuntimeError, match=r"^no disk is full$"), storage.room("/some/file"):
        raise RuntimeError("no disk is full")

    class Failing:
        def isfile(self, path):
            raise KeyError("a store's own")

        invalidate_cache = staticmethod(lambda: None)

    monkeypatch.setattr(remote, "filesystem", lambda url: (Failing(), "bucket/rows.jsonl"))
    with pytest.raises(OSError, match=r"gs://bucket/rows\.jsonl could not be read or written \(KeyError"):
        remote.local_file("gs://bucket/rows.jsonl")

    class Slice:
        def __getitem__(self, index):
            raise safetensors_io.SafetensorError("invalid offset")

    class File:
        get_slice = staticmethod(lambda name: Slice())

    reader = safetensors_io.Reader({"a.safetensors": File()}, {"tensor": "a.safetensors"}, tmp_path)
    with pytest.raises(ValueError, match=r"a\.safetensors: tensor 'tensor' cannot be read \(invalid offset\)"):
        reader.read("tensor", (slice(0, 1),))


# --- commands


def command(*arguments, kib="unlimited", **variables):
    """Runs a command of the package with a limit on the size of the files that it writes."""
    # A shell sets the limit, because preexec_fn would run Python in a fork of this process, and JAX warns of that.
    limited = ["bash", "-c", f'ulimit -f {kib}; exec "$@"', "bash", sys.executable, "-m", *arguments]
    return subprocess.run(limited, cwd=ROOT, env=environment(1) | variables, capture_output=True, check=False)


SMALL = [
    "--config.steps=1", "--config.data.name=jsonl", "--config.data.batch_size=4", "--config.data.eval_batch_size=4",
    "--config.data.eval_rows=4", "--config.data.max_length=48", "--config.data.max_prompt_length=32", "--config.sample_tokens=4",
    "--config.sampling.max_new_tokens=8", "--config.student.config.hidden_size=16", "--config.student.config.num_layers=1",
    "--config.student.config.intermediate_size=32", "--config.student.config.num_heads=2", "--config.sampling.show_every=1",
]  # fmt: skip


@pytest.mark.slow
def test_a_full_disk_is_one_paragraph_on_the_command_line(tmp_path):
    write_rows(tmp_path / "rows.jsonl")
    flags = ["--config=configs/sft.py", *SMALL, f"--config.data.options.path={tmp_path / 'rows.jsonl'}"]
    flags += [f"--config.data.data_dir={tmp_path / 'built'}", f"--workdir={tmp_path / 'run'}"]
    done = command("kd_jax.main", *flags, kib=100)
    said = done.stderr.decode()
    assert done.returncode == 1 and "Traceback" not in said, said
    assert f"kd_jax: {tmp_path / 'built'}" in said, said
    assert "File too large" in said and "MiB are left" in said and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_terminal_in_latin_1_shows_other_characters_replaced(tmp_path):
    """Covers rows, the name of a folder, and the page of an on-policy run, which shows the samples of each step."""
    rows = [{"prompt": f"What\u2019s {i}?", "response": f"It\u2019s {i}."} for i in range(100)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    workdir, latin = tmp_path / "it\u2019s", dict(PYTHONIOENCODING="latin-1", PYTHONUTF8="0")
    flags = ["--config=configs/opd.py", *SMALL, f"--config.data.options.path={tmp_path / 'rows.jsonl'}"]
    done = command("kd_jax.main", *flags, f"--config.data.data_dir={tmp_path}", f"--workdir={workdir}", **latin)
    said = done.stdout.decode("latin-1")
    assert done.returncode == 0, done.stderr.decode("latin-1")
    assert "--- sampled for step 1" in said and "What?s " in said and "it?s/report.html" in said
    done = command("kd_jax.report", str(workdir), PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and b"it?s/report.html" in done.stdout, done.stderr
