"""Work directories and data at remote addresses, with fsspec's memory:// and, where installed, S3 and GCS servers."""

import importlib.util
import json
import os
import signal
import threading

import fsspec
import numpy as np
import pytest

from kd_jax import data, metrics, train
from kd_jax.report import __main__ as report_main
from kd_jax.storage import checkpoint, remote, remote_copy, remote_lease
from kd_jax.train import loop
from tests.helpers.runs import last_state, smoke

pytestmark = pytest.mark.usefixtures("one_device")
SHORT = dict(steps=4, checkpoint_every=1, eval_every=4, keep_checkpoints=2, sampling__show_every=0)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Puts all local copies of remote addresses into a folder of the test."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(remote.tempfile, "tempdir", str(tmp_path))


@pytest.fixture
def store():
    """An empty store: its address, a function that lists its files, and its file system."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    names = lambda: sorted(path.removeprefix("/bucket/") for path in system.store)
    return "memory://bucket", names, system


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_checkpoint_goes_once_its_successor_is_whole_there(tmp_path, store, monkeypatch):
    _, names, system = store
    copy = remote.Copy(system, "/bucket", tmp_path / "run")
    for name in (
        "metrics.jsonl",
        "lock",
        "config.json.partial.7",
        "checkpoints/1/a",
        "checkpoints/2.orbax-checkpoint-tmp/a",
    ):
        write(tmp_path / "run" / name, "one")
    copy.push()
    assert names() == ["checkpoints/1/a", "metrics.jsonl"]
    remote.shutil.rmtree(tmp_path / "run" / "checkpoints" / "1")
    write(tmp_path / "run" / "checkpoints" / "2" / "a", "two")
    write(tmp_path / "run" / "metrics.jsonl", "one\ntwo")
    put, order = system.put_file, []

    def fails(path, target):
        order.append(target)
        if "checkpoints/2" in target:
            raise ConnectionError("no network")
        put(path, target)

    monkeypatch.setattr(system, "put_file", fails)
    with pytest.raises(ConnectionError):
        copy.push()
    assert names() == ["checkpoints/1/a", "metrics.jsonl"]
    monkeypatch.setattr(system, "put_file", put)
    copy.push()
    assert names() == ["checkpoints/2/a", "metrics.jsonl"] and system.cat("/bucket/metrics.jsonl") == b"one\ntwo"
    assert order == ["/bucket/metrics.jsonl", "/bucket/checkpoints/2/a"]
    monkeypatch.setattr(system, "put_file", fails)
    copy.push()
    assert len(order) == 2, "what has not changed is not copied again"


def test_no_checkpoint_goes_for_one_that_is_not_whole_there(tmp_path, store, monkeypatch):
    """The next checkpoint gets its name, or is deleted, while the folder is listed or copied."""
    _, names, system = store
    copy, folder = remote.Copy(system, "/bucket", tmp_path / "run"), tmp_path / "run" / "checkpoints"
    for part in "ab":
        write(folder / "10" / part, "ten")
        write(folder / "20.orbax-checkpoint-tmp" / part, "twenty")
    copy.push()
    remote.shutil.rmtree(folder / "10")
    copy.push()  # lists the folder before checkpoint 20 has its final name
    assert names() == ["checkpoints/10/a", "checkpoints/10/b"]
    (folder / "20.orbax-checkpoint-tmp").rename(folder / "20")
    put = system.put_file

    def slow(path, target):
        put(path, target)
        if target.endswith("20/a"):
            write(folder / "30" / "a", "thirty")
            remote.shutil.rmtree(folder / "20")

    monkeypatch.setattr(system, "put_file", slow)
    copy.push()
    assert names() == ["checkpoints/10/a", "checkpoints/10/b", "checkpoints/20/a"]
    copy.push()
    assert names() == ["checkpoints/30/a"]


def test_a_bucket_that_is_not_there_is_an_error(tmp_path, store, monkeypatch):
    _, _, system = store

    def missing(path, target):
        raise FileNotFoundError("The specified bucket does not exist")

    monkeypatch.setattr(system, "put_file", missing)
    write(tmp_path / "run" / "config.json", "{}")
    with pytest.raises(FileNotFoundError, match="bucket does not exist"):
        remote.Copy(system, "/bucket", tmp_path / "run").push()


def test_another_machine_finds_what_the_first_left(tmp_path, store):
    url, names, _ = store
    with remote.work_directory(f"{url}/run/") as (folder, place):
        assert folder == place.shared and folder.endswith("bucket/run") and place.url == f"{url}/run"
        write(remote.Path(folder) / "config.json", "{}")
        write(remote.Path(folder) / "checkpoints" / "3" / "a", "three")
        write(remote.Path(folder) / "tensorboard" / "events", "x")
    assert not os.path.exists(folder)
    assert names() == ["run/checkpoints/3/a", "run/config.json", "run/tensorboard/events"]
    with remote.work_directory(f"{url}/run", writes=False) as (folder, _):
        assert (remote.Path(folder) / "checkpoints/3/a").read_text() == "three"
        assert not (remote.Path(folder) / "tensorboard").exists()
        write(remote.Path(folder) / "more", "not by this process")
    assert len(names()) == 3


def test_what_is_written_is_there_before_the_end(tmp_path, store, monkeypatch):
    url, names, _ = store
    monkeypatch.setattr(remote_copy, "EVERY", 0.01)
    with remote.work_directory(f"{url}/run") as (folder, _):
        write(remote.Path(folder) / "config.json", "{}")
        for _ in range(500):
            if "run/config.json" in names():
                break
            threading.Event().wait(0.01)
        assert "run/config.json" in names()
    assert not [thread for thread in threading.enumerate() if thread.name == "kd_jax.storage.remote"]


def failing(monkeypatch, system, times):
    """Makes the first `times` writes to the store fail."""
    put, left = system.put_file, iter(range(times))
    monkeypatch.setattr(system, "put_file", lambda *its: 1 / 0 if next(left, None) is not None else put(*its))


def test_what_cannot_be_copied_stays_and_is_named(store, monkeypatch, capsys):
    url, _, system = store
    monkeypatch.setattr(remote_copy, "PATIENCE", 0.0)
    failing(monkeypatch, system, 9)
    with pytest.raises(OSError, match="bucket/run could not be copied .* still exists: ZeroDivisionError: division"):
        with remote.work_directory(f"{url}/run") as (folder, _):
            write(remote.Path(folder) / "config.json", "{}")
    assert (remote.Path(folder) / "config.json").exists()
    assert capsys.readouterr().err.count("for /bucket/run cannot be copied; kd_jax tries again (ZeroDivision") == 1


def test_a_run_waits_for_a_store_that_fails_but_not_for_long(store, monkeypatch, capsys):
    url, names, system = store
    monkeypatch.setattr(remote_copy, "RETRY_AFTER", 0.01)
    with remote.work_directory(f"{url}/run") as (folder, place):
        write(remote.Path(folder) / "config.json", "{}")
        with monkeypatch.context() as patch:
            failing(patch, system, 3)
            place.store()
        assert "run/config.json" in names()
        first, second = capsys.readouterr().err.splitlines()
        assert "cannot be copied" in first and "can be copied again" in second
    monkeypatch.setattr(remote_copy, "PATIENCE", 0.05)
    with pytest.raises(OSError, match="could not be copied"), remote.work_directory(f"{url}/run") as (folder, place):
        write(remote.Path(folder) / "metrics.jsonl", "1")
        with monkeypatch.context() as patch:
            failing(patch, system, 10**9)
            place.store()
    assert "run/metrics.jsonl" in names() and not os.path.exists(folder), "at the end it could be"


# --- two runs at the same time


@pytest.fixture
def impatient(monkeypatch):
    for name, seconds in dict(RENEW=0.02, STALE=0.5, LOOK=0.01).items():
        monkeypatch.setattr(remote_lease, name, seconds)
    ticks = iter(range(10**9))  # so that renewals within one second differ
    monkeypatch.setattr(remote_lease.time, "strftime", lambda *_: f"tick {next(ticks)}")


def test_a_second_run_at_an_address_is_refused(store, impatient, capsys):
    url, names, system = store
    with remote.work_directory(f"{url}/run") as (folder, _):
        write(remote.Path(folder) / "config.json", "{}")
        with pytest.raises(ValueError, match=rf"bucket/run is in use by another run \(process {os.getpid()} on .*tick"):
            with remote.work_directory(f"{url}/run"):
                pass
        with remote.work_directory(f"{url}/run", writes=False), remote.work_directory(f"{url}/run", alone=False):
            assert "run/lock" in names()
        with remote.work_directory(f"{url}/other"):
            pass
        assert not (remote.Path(folder) / "lock").exists()
    assert names() == ["run/config.json"]
    with remote.work_directory(f"{url}/run"):
        pass
    assert capsys.readouterr().err.count("to see whether that run is active") == 1
    assert not [thread for thread in threading.enumerate() if thread.name == "kd_jax.storage.remote_lease"]


def test_what_a_kill_left_is_taken_over(store, impatient, capsys):
    url, names, system = store
    system.pipe("/bucket/run/lock", b"process 7 on host")
    with remote.work_directory(f"{url}/run"):
        said = capsys.readouterr().err
        assert (
            "bucket/run/lock is the lock of process 7 on host; this run waits up to 0.5 s" in said
            and "is taken over" in said
        )
        assert f"process {os.getpid()} on" in system.cat("/bucket/run/lock").decode()
    assert not names()


def test_who_is_let_go_meanwhile_is_not_waited_for(store, impatient, monkeypatch, capsys):
    url, _, system = store
    monkeypatch.setattr(remote_lease, "STALE", 300.0)
    system.pipe("/bucket/run/lock", b"process 7 on host")
    threading.Timer(0.1, system.rm_file, ("/bucket/run/lock",)).start()
    with remote.work_directory(f"{url}/run"):
        assert "taken over" not in capsys.readouterr().err


@pytest.mark.parametrize("there", [b"process 7 on host", None])
def test_who_was_taken_over_writes_no_more(store, impatient, there):
    url, names, system = store
    with pytest.raises(OSError, match="could not be copied .* another run has taken memory://bucket/run over") as error:
        with remote.work_directory(f"{url}/run") as (folder, place):
            write(remote.Path(folder) / "config.json", "{}")
            system.rm_file("/bucket/run/lock") if there is None else system.pipe("/bucket/run/lock", there)
            place.store()
    assert names() == ([] if there is None else ["run/lock"]) and (remote.Path(folder) / "config.json").exists()
    assert folder in str(error.value)


# --- how runs end


def test_nothing_is_left_of_a_run_that_ends_early(store, tmp_path):
    url, names, system = store
    system.pipe("/bucket/run/config.json", b"{}")
    for writes in (True, False):
        with pytest.raises(ZeroDivisionError), remote.work_directory(f"{url}/run", writes=writes) as (folder, _):
            write(remote.Path(folder) / str(writes), "x")
            1 / 0  # noqa: B018
        assert not os.path.exists(folder)
    assert names() == ["run/True", "run/config.json"]
    with remote.work_directory(f"{url}/run"):  # no other run uses this address any more
        pass


def test_a_name_that_leads_out_of_the_folder_is_refused(store, tmp_path):
    url, _, system = store
    system.pipe("/bucket/run/config.json", b"{}")
    system.pipe("/bucket/run/../../evil", b"")
    with pytest.raises(ValueError, match=r"bucket/run/\.\./\.\./evil has a name that leads out of /bucket/run"):
        with remote.work_directory(f"{url}/run"):
            pass
    assert not list(tmp_path.rglob("evil"))


def test_refusals(store, monkeypatch):
    url, _, system = store
    system.pipe("/bucket/photos/1.jpg", b"")
    with pytest.raises(ValueError, match="has files that belong to no run"), remote.work_directory(f"{url}/photos"):
        pass
    with pytest.raises(ValueError, match="--workdir=s3://bucket/run: .* orbax does not support"):
        with remote.work_directory("s3://bucket/run", processes=2):
            pass
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url: (_ for _ in ()).throw(ImportError("Install s3fs")))
    with pytest.raises(ValueError, match=r"s3:// needs a package .*: pip install s3fs\."):
        remote.filesystem("s3://bucket/run")
    with pytest.raises(ValueError, match="there is no file"):
        monkeypatch.undo()
        remote.local_file(f"{url}/rows.jsonl")


def stopped(config, workdir, monkeypatch, at):
    """Trains until SIGTERM stops the run in step `at`."""
    with monkeypatch.context() as patch:
        put = train.Run.put

        def told(run, batch):
            told.count += 1
            if told.count == at:
                os.kill(os.getpid(), signal.SIGTERM)
            return put(run, batch)

        told.count = 0
        patch.setattr(train.Run, "put", told)
        with pytest.raises(loop.Stopped):
            train.train(config, workdir, quiet=True)


def goes_on(url, tmp_path, data_dir, monkeypatch, fetch):
    """Checks that a run at an address equals the run in a folder, after a stop and a restart without local files."""
    config = smoke("taid", data_dir, **SHORT)
    train.train(config, str(tmp_path / "whole"), quiet=True)
    stopped(config, f"{url}/run", monkeypatch, at=2)
    monkeypatch.setattr(remote_lease, "_is_stale", lambda *_: pytest.fail("who was stopped has let it go"))
    train.train(config, f"{url}/run", quiet=True)
    fetch(f"{url}/run", str(tmp_path / "fetched"))
    ours, theirs = last_state(tmp_path / "fetched"), last_state(tmp_path / "whole")
    assert ours[0] == theirs[0] == 4
    for a, b in zip(ours[1], theirs[1], strict=True):
        np.testing.assert_array_equal(a, b)
    lines = lambda folder: [line for line in metrics.read(folder) if line["split"] != "speed"]
    assert lines(tmp_path / "fetched") == lines(tmp_path / "whole")
    names = lambda folder: {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    kept = lambda folder: {
        name for name in names(folder) if not name.startswith(("tensorboard", "checkpoints", "lock"))
    }
    assert kept(tmp_path / "fetched") == kept(tmp_path / "whole")
    with checkpoint.open_manager(str(tmp_path / "fetched"), 2) as manager:
        assert list(manager.all_steps()) == [3, 4]


@pytest.mark.slow
def test_what_is_there_is_never_behind_a_checkpoint(store, data_dir, monkeypatch):
    """SIGKILL may come right after orbax has written a checkpoint to the address."""
    url, names, system = store
    monkeypatch.setattr(remote_copy, "EVERY", 3600.0)
    opened, saved, there = checkpoint.open_manager, checkpoint.save, []

    def opens(*its):
        assert "run/config.json" in names()
        return opened(*its)

    def saves(manager, step, *rest):
        lines = map(json.loads, system.cat("/bucket/run/metrics.jsonl").splitlines())
        there.append((step, [line["step"] for line in lines if line["split"] == "train"]))
        saved(manager, step, *rest)

    monkeypatch.setattr(checkpoint, "open_manager", opens)
    monkeypatch.setattr(checkpoint, "save", saves)
    train.train(smoke("sft", data_dir, **SHORT | dict(checkpoint_every=2)), f"{url}/run", quiet=True)
    assert there == [(2, [1, 2]), (4, [1, 2, 3, 4])]


@pytest.mark.slow
def test_a_run_at_an_address_goes_on_on_another_machine(store, tmp_path, data_dir, monkeypatch):
    url, _, system = store
    fetch = lambda url, folder: remote.Copy(*remote.filesystem(url), remote.Path(folder)).pull()
    goes_on(url, tmp_path, data_dir, monkeypatch, fetch)


def rows(path, store):
    lines = [json.dumps({"prompt": f"p{i}", "response": f"r{i}"}) + "\n" for i in range(20)]
    store.pipe(path, "".join(lines).encode())
    return lines


def test_data_is_read_from_an_address_and_built_once_for_all(store, monkeypatch):
    url, names, system = store
    rows("/bucket/rows.jsonl", system)
    load = lambda: data.load("jsonl", split="train", data_dir=f"{url}/built", path=f"{url}/rows.jsonl")
    first = list(load())
    built = [name for name in names() if name.startswith("built/")]
    assert len(first) >= 18 and any(name.endswith("dataset_info.json") for name in built)
    monkeypatch.setenv("HOME", os.environ["HOME"] + "-other")
    with monkeypatch.context() as patch:
        patch.setattr(data.builder.KdJaxRows, "download_and_prepare", lambda *_: pytest.fail("it is built again"))
        assert list(load()) == first
    system.pipe("/bucket/rows.jsonl", system.cat("/bucket/rows.jsonl") + b'{"prompt": "new", "response": "row"}\n')
    assert len(load()) + len(data.load("jsonl", split="validation", path=f"{url}/rows.jsonl")) == 21
    packed = data.load("text", split="train", path=f"{url}/*.jsonl", validation_fraction=0.0)
    assert "p19" in packed[0]["response"]


def test_half_a_dataset_is_none(store, tmp_path):
    url, _, system = store
    write(tmp_path / "set" / "a.array_record", "a")
    system.pipe("/bucket/set/a.array_record", b"a")
    remote.fetch_folder(f"{url}/set", tmp_path / "copy", "dataset_info.json")
    assert not (tmp_path / "copy").exists()
    write(tmp_path / "set" / "dataset_info.json", "{}")
    remote.store_folder(tmp_path / "set", f"{url}/set", "dataset_info.json")
    remote.fetch_folder(f"{url}/set", tmp_path / "copy", "dataset_info.json")
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == ["a.array_record", "dataset_info.json"]


def test_a_page_is_made_again_at_an_address(store, tmp_path, monkeypatch):
    url, names, system = store
    run = {name: "x" for name in ("checkpoints/3/a", "student/model.safetensors")} | {"config.json": "{}"}
    for name, text in run.items():
        system.pipe(f"/bucket/run/{name}", text.encode())
    made = lambda folders, out: write(remote.Path(folders[0]) / "report.html", str(os.listdir(folders[0]))) or "it"
    monkeypatch.setattr(report_main.report, "write", made)
    monkeypatch.setattr("sys.argv", ["report", f"{url}/run"])
    report_main.main()
    assert system.cat("/bucket/run/report.html") == b"['config.json']" and len(names()) == 4


def test_a_model_at_an_address_is_refused(data_dir):
    with pytest.raises(ValueError, match="gs://bucket/teacher is an address; models and .* Copy the folder first"):
        train.build(smoke("forward_kl", data_dir, teacher__path="gs://bucket/teacher", tokenizer__path=""))


@pytest.mark.slow
def test_a_teachers_responses_are_kept_at_an_address(store, data_dir, monkeypatch):
    url, names, _ = store
    changes = dict(sampling__max_new_tokens=32, data__max_length=64, prefixes__num_rows=8)
    build = lambda: train.build(smoke("seqkd", f"{url}/data", **changes))
    first = build()
    assert [name for name in names() if name.endswith("responses.jsonl")]
    monkeypatch.setenv("HOME", os.environ["HOME"] + "-other")
    monkeypatch.setattr("kd_jax.models.generate", lambda *_, **__: pytest.fail("they are drawn again"))
    assert build().counts == first.counts


@pytest.mark.slow
@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("moto", "flask", "s3fs")),
    reason="needs a server that speaks S3: pip install 'moto[server]' s3fs",
)
@pytest.mark.filterwarnings("ignore")  # warnings of the server
def test_a_run_at_s3_goes_on_on_another_machine(tmp_path, data_dir, monkeypatch):
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    for key, value in dict(ACCESS_KEY_ID="x", SECRET_ACCESS_KEY="x", ENDPOINT_URL=f"http://{host}:{port}").items():
        monkeypatch.setenv(f"AWS_{key}", value)
    try:
        system = fsspec.filesystem("s3")
        system.mkdir("bucket")
        get = lambda url, folder: remote.Copy(*remote.filesystem(url), remote.Path(folder)).pull()
        goes_on("s3://bucket", tmp_path, data_dir, monkeypatch, get)
        rows("bucket/rows.jsonl", system)
        load = lambda: data.load("jsonl", split="train", data_dir="s3://bucket/built", path="s3://bucket/rows.jsonl")
        first = list(load())
        monkeypatch.setenv("HOME", str(tmp_path / "other"))
        assert list(load()) == first and system.exists("bucket/built")
    finally:
        server.stop()


@pytest.mark.slow
@pytest.mark.skipif(
    not all(name in os.environ for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL")),
    reason="needs fake-gcs-server, its address in STORAGE_EMULATOR_HOST and TENSORSTORE_GCS_HTTP_URL, and a bucket kd-jax-test",
)
@pytest.mark.filterwarnings("ignore")  # gcsfs warns of missing credentials
def test_a_run_at_gs_goes_on_on_another_machine_with_orbax_own_checkpoints(tmp_path, data_dir, monkeypatch):
    system = fsspec.filesystem("gs")
    if system.exists("kd-jax-test/run"):
        system.rm("kd-jax-test/run", recursive=True)
    get = lambda url, folder: remote.Copy(*remote.filesystem(url), remote.Path(folder)).pull()
    goes_on("gs://kd-jax-test", tmp_path, data_dir, monkeypatch, get)
    assert system.exists("kd-jax-test/run/checkpoints/4/commit_success.txt")
    system.rm_file("kd-jax-test/run/checkpoints/4/commit_success.txt")
    assert checkpoint.has_steps("gs://kd-jax-test/run")
    system.rm_file("kd-jax-test/run/checkpoints/3/commit_success.txt")
    system.invalidate_cache()
    assert not checkpoint.has_steps("gs://kd-jax-test/run"), "a save that was cut off is no checkpoint"
