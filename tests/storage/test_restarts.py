"""Runs that are stopped, killed, damaged or not finite lose nothing that was saved, and continue unchanged."""

import contextlib
import dataclasses
import errno
import gc
import itertools
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc  # noqa: F401  # else pytest imports it while no file can be opened

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import replay, train
from kd_jax.settings import Settings
from kd_jax.storage import checkpoint, directory, remote
from kd_jax.train import loop
from tests.helpers import broken
from tests.helpers.commands import xla_flags
from tests.helpers.runs import (
    AT_WORK,
    METHODS,
    ON_POLICY,
    WHOLE,
    assert_same_run,
    checkpoint_steps,
    smoke,
    training,
    until,
)

# orbax closes its event loop while other arrays of a damaged checkpoint are still being read. Python reports their
# exceptions when it collects them: in any later test of this file, or at the end of the file at the latest.
pytestmark = [
    pytest.mark.usefixtures("one_device", "collected"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

SHORT = dict(steps=5, checkpoint_every=2, eval_every=5, log_every=1, microbatches=2)
# KILLS=10 kills each method ten times, which takes half an hour. The file KILLS_LOG gets a line of JSON per method.
KILLS = int(os.environ.get("KILLS", "1"))
KILLED = METHODS if KILLS > 1 else ("taid", "distillm", "distillm2", "minillm", "sdpo")


# --- stopped runs


@pytest.fixture(scope="module")
def collected():
    yield
    gc.collect()


class Interrupted(Exception):
    pass


@pytest.mark.parametrize(("method", "stop_at"), [("sft", 1), pytest.param("distillm", 3, marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on_bit_for_bit(method, stop_at, tmp_path, data_dir, monkeypatch):
    changes = SHORT | AT_WORK.get(method, {})
    whole = train.train(smoke(method, data_dir, **changes), str(tmp_path / "whole"), quiet=True)

    put, calls = train.Run.put, itertools.count()

    def stop(run, batch):
        if next(calls) == stop_at:
            raise Interrupted
        return put(run, batch)

    monkeypatch.setattr(train.Run, "put", stop)
    with pytest.raises(Interrupted):
        train.train(smoke(method, data_dir, **changes), str(tmp_path / "parts"), quiet=True)
    resumed = train.train(smoke(method, data_dir, **changes), str(tmp_path / "parts"), quiet=True)

    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert resumed == whole and (tmp_path / "parts" / "sampling.png").exists() == (method in ON_POLICY)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data_dir, one_device):
    """An uninterrupted run of sft with three checkpoints."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train.train(smoke("sft", data_dir, **WHOLE), str(folder), quiet=True)
    return folder


@pytest.mark.slow
def test_sigterm_saves_and_says_so(whole, tmp_path, data_dir, monkeypatch):
    put, calls, before = train.Run.put, itertools.count(1), signal.getsignal(signal.SIGTERM)

    def notice(run, batch):
        if next(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return put(run, batch)

    monkeypatch.setattr(train.Run, "put", notice)
    with pytest.raises(loop.Stopped) as stopped:
        train.train(smoke("sft", data_dir, **WHOLE), str(tmp_path / "run"), quiet=True)
    assert (stopped.value.code, stopped.value.step) == (75, 3) and signal.getsignal(signal.SIGTERM) is before
    assert checkpoint_steps(tmp_path / "run") == [2, 3]
    train.train(smoke("sft", data_dir, **WHOLE), str(tmp_path / "run"), quiet=True)
    assert_same_run(whole, tmp_path / "run")


@pytest.fixture
def told(monkeypatch):
    """A function (where, name) that sends SIGTERM when the named function is called. An ignored SIGTERM is an error."""

    def nobody(*_):
        raise RuntimeError("nobody took the notice")

    def as_it_is_called(where, name):
        function = getattr(where, name)

        def notice(*arguments):
            os.kill(os.getpid(), signal.SIGTERM)
            return function(*arguments)

        monkeypatch.setattr(where, name, notice)

    before = signal.signal(signal.SIGTERM, nobody)
    yield as_it_is_called
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(("where", "name"), [(train, "build"), (train.Run, "evaluate"), (loop.results, "finish")])
def test_sigterm_before_the_first_step_and_after_the_last(where, name, told, whole, tmp_path, assembled, monkeypatch):
    """There is nothing to save. The run closes the work directory, also if a second SIGTERM arrives."""
    workdir, closed = until(5, whole, tmp_path / "run"), []

    @contextlib.contextmanager
    def alone(workdir):
        try:
            yield
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            closed.append(workdir)

    monkeypatch.setattr(train, "build", lambda config: assembled)
    monkeypatch.setattr(directory, "alone", alone)
    told(where, name)
    with pytest.raises(loop.Stopped) as stopped:
        train.train(assembled.config, str(workdir), quiet=True)
    assert (stopped.value.code, stopped.value.step, closed) == (75, None, [str(workdir)])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["finish", "push"])
def test_sigterm_at_an_address_loses_nothing(name, told, whole, tmp_path, assembled, monkeypatch):
    """After the last step everything is copied. A SIGTERM during the last copy does not stop the run."""
    monkeypatch.setattr(train, "build", lambda config: assembled)
    monkeypatch.setattr(remote.tempfile, "tempdir", str(tmp_path))
    system, root = remote.filesystem("memory://restarts/run")
    remote.Copy(system, root, until(2, whole, tmp_path / "run")).push()
    try:
        finish = loop.results.finish
        if name == "finish":
            told(loop.results, "finish")
        else:  # the last of several pushes
            ends = lambda *arguments: (finish(*arguments), told(remote.Copy, "push"))[0]
            monkeypatch.setattr(loop.results, "finish", ends)
        with pytest.raises(loop.Stopped) if name == "finish" else contextlib.nullcontext():
            train.train(assembled.config, "memory://restarts/run", quiet=True)
        remote.Copy(system, root, tmp_path / "fetched").pull()
    finally:
        system.rm("/restarts", recursive=True)
    assert_same_run(whole, tmp_path / "fetched")


@pytest.mark.slow
def test_a_notice_at_an_evaluation_saves_before_it(whole, told, tmp_path, assembled, monkeypatch):
    """The resumed run begins with the evaluation, and repeats it if it was killed before it saved anything."""
    config = smoke("sft", assembled.config.data.data_dir, **WHOLE | dict(eval_every=4))
    monkeypatch.setattr(train, "build", lambda config: dataclasses.replace(assembled, config=Settings.parse(config)))
    folders = [until(2, whole, tmp_path / name) for name in ("whole", "parts")]
    for folder in folders:
        directory.write_config(folder, config.to_dict())
    train.train(config, str(folders[0]), quiet=True)

    evaluations = lambda: [line["step"] for line in training(folders[1]) if line["split"] == "eval"]
    with monkeypatch.context() as patch:
        put, calls = train.Run.put, itertools.count(3)
        notice = lambda run, batch: (next(calls) == 4 and os.kill(os.getpid(), signal.SIGTERM)) or put(run, batch)
        patch.setattr(train.Run, "put", notice)
        with pytest.raises(loop.Stopped) as stopped:
            train.train(config, str(folders[1]), quiet=True)
    assert stopped.value.step == 4 and evaluations() == [0]
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(train.Run, "put", lambda run, batch: (_ for _ in ()).throw(Interrupted))
        train.train(config, str(folders[1]), quiet=True)
    assert evaluations() == [0, 4]
    train.train(config, str(folders[1]), quiet=True)
    assert evaluations() == [0, 4, 5]
    assert_same_run(*folders)


@pytest.mark.slow
def test_another_mesh_goes_on_with_the_same_batches(whole, tmp_path, data_dir):
    until(2, whole, tmp_path / "run")
    other = WHOLE | dict(mesh__data=2, mesh__fsdp=2, mesh__tensor=2, log_every=1)
    train.train(smoke("sft", data_dir, **other), str(tmp_path / "run"), quiet=True)
    losses = [[line["loss"] for line in training(run) if line["split"] == "train"] for run in (whole, tmp_path / "run")]
    assert losses[1][:2] == losses[0][:2]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-6)


# --- damaged checkpoints


def biggest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(folder):
    content = bytearray((path := biggest(folder / "state")).read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def truncate(folder):
    path = biggest(folder / "state")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit_position(folder):
    path = biggest(folder / "data")
    text = path.read_text()
    assert '"next_index"' in text or '"position"' in text
    path.write_text(text.replace(": 4", ": 5").replace(": 5,", ": 6,"))


DAMAGE = {
    "flipped bit": flip,
    "truncated": truncate,
    "edited position": edit_position,
    "no data": lambda folder: shutil.rmtree(folder / "data"),
    "nothing in it": lambda folder: [
        shutil.rmtree(path) if path.is_dir() else path.unlink() for path in folder.iterdir()
    ],
}


@pytest.fixture(scope="module")
def assembled(data_dir, one_device):
    return train.build(smoke("sft", data_dir, **WHOLE))


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_passed_over(damage, whole, tmp_path, assembled):
    shutil.copytree(whole, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    DAMAGE[damage](folder / "5")
    with checkpoint.open_manager(str(tmp_path / "run"), 3) as manager:
        state, wrong = checkpoint.restore(manager, assembled.abstract_state, assembled.feed)
        assert int(state.step) == 4 and manager.latest_step() == 4
    assert len(wrong) == 1 and "checkpoint 5" in wrong[0]
    assert checkpoint_steps(tmp_path / "run") == [2, 4] and (folder / "damaged-5").is_dir()


@pytest.mark.slow
def test_a_run_goes_on_before_the_damage(whole, tmp_path, data_dir, capsys):
    shutil.copytree(whole, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    flip(folder / "5")
    truncate(folder / "4")
    train.train(smoke("sft", data_dir, **WHOLE), str(tmp_path / "run"), quiet=True)
    printed = capsys.readouterr()
    assert "checkpoint 5" in printed.out and "checkpoint 4" in printed.out and "resumes from step 2" in printed.out
    assert_same_run(whole, tmp_path / "run")


def test_without_a_good_checkpoint_nothing_is_changed(whole, tmp_path, assembled):
    shutil.copytree(whole, tmp_path / "run")
    for step in checkpoint_steps(whole):
        flip(tmp_path / "run" / "checkpoints" / str(step))
    with (
        checkpoint.open_manager(str(tmp_path / "run"), 3) as manager,
        pytest.raises(ValueError, match="nothing was changed") as error,
    ):
        checkpoint.restore(manager, assembled.abstract_state, assembled.feed)
    assert all(f"checkpoint {step}" in str(error.value) for step in (2, 4, 5))
    assert checkpoint_steps(tmp_path / "run") == [2, 4, 5]


def too_many_files(monkeypatch):
    """Makes every attempt to open a file fail as soon as the arrays are looked up. Returns the undo function."""
    raw_shapes, limits = checkpoint._raw_shapes, resource.getrlimit(resource.RLIMIT_NOFILE)

    def none_left(state):
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")), limits[1]))
        return raw_shapes(state)

    monkeypatch.setattr(checkpoint, "_raw_shapes", none_left)
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def answer(error):
    def way(monkeypatch):
        fail = lambda *_, **__: (_ for _ in ()).throw(error)
        monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "restore", fail)
        return lambda: None

    return way


def led_to(cause):
    """Returns an error like those of orbax: its own error, caused by an error of tensorstore."""
    error = Exception("Encountered error while reading array index")
    error.__cause__ = cause
    return error


IN_THE_WAY = {
    "too many files": (too_many_files, "Too many open files"),
    "connection": (answer(ConnectionResetError("reset by peer")), "ConnectionResetError: reset"),
    "time": (answer(TimeoutError()), "TimeoutError"),
    "network": (answer(OSError(errno.ENETUNREACH, "no route")), "no route"),
    "device's memory": (answer(RuntimeError("RESOURCE_EXHAUSTED: Out of memory")), "Out of memory"),
    "rights": (answer(led_to(ValueError("PERMISSION_DENIED: Error reading"))), "Encountered"),
    "store": (answer(type("HttpError", (Exception,), {"__module__": "gcsfs.retry"})("503")), "HttpError: 503"),
    "disk": (answer(led_to(ValueError("UNKNOWN: Error reading [os_error_code='5']"))), "Encountered"),
}


@pytest.mark.parametrize("what", IN_THE_WAY)
def test_a_checkpoint_that_cannot_be_reached_is_not_damaged(what, whole, tmp_path, assembled, monkeypatch):
    shutil.copytree(whole, tmp_path / "run")
    way, said = IN_THE_WAY[what]
    with checkpoint.open_manager(str(tmp_path / "run"), 3) as manager:
        with monkeypatch.context() as patch:
            clear = way(patch)
            try:
                with pytest.raises(OSError, match="checkpoint 5 .* may be good; nothing was changed") as error:
                    checkpoint.restore(manager, assembled.abstract_state, assembled.feed)
            finally:
                clear()
        assert said in str(error.value) and checkpoint_steps(tmp_path / "run") == [2, 4, 5]
        state, wrong = checkpoint.restore(manager, assembled.abstract_state, assembled.feed)
        assert int(state.step) == 5 and not wrong


# --- full disks


@pytest.fixture
def small_disk(tmp_path):
    """The folder of a disk of 2.5 MB, and a function that enlarges the disk."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = lambda *options: subprocess.run(["mount", *options, str(folder)], capture_output=True).returncode
    if mount("-t", "tmpfs", "-o", "size=2500k", "tmpfs"):
        pytest.skip("only root can mount a small disk")
    yield folder, lambda: mount("-o", "remount,size=50m")
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # because orbax writes in a thread
def test_a_full_disk_stops_the_run_and_loses_nothing(whole, small_disk, data_dir):
    folder, enlarge = small_disk
    config = smoke("sft", data_dir, **WHOLE | dict(checkpoint_every=1, keep_checkpoints=5))
    with pytest.raises(OSError, match="No space left on device") as error:
        train.train(config, str(folder / "run"), quiet=True)
    steps = checkpoint_steps(folder / "run")
    assert 0 < len(steps) < 5 and f"the last good checkpoint is of step {steps[-1]}." in str(error.value)
    assert "MiB are left. Make room" in str(error.value)
    assert enlarge() == 0
    train.train(config, str(folder / "run"), quiet=True)
    assert_same_run(whole, folder / "run")


# --- two runs at the same time


def test_a_second_run_on_a_work_directory_is_refused(whole, tmp_path, data_dir):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "lock").unlink()
    before = sorted(path.name for path in (tmp_path / "run").rglob("*"))
    with (
        directory.alone(str(tmp_path / "run")),
        pytest.raises(ValueError, match=f"in use by .*process {os.getpid()} on"),
    ):
        train.train(smoke("sft", data_dir, **WHOLE), str(tmp_path / "run"), quiet=True)
    (tmp_path / "run" / "lock").unlink()
    assert sorted(path.name for path in (tmp_path / "run").rglob("*")) == before


def test_a_second_run_is_refused_where_the_first_made_the_directory_meanwhile(assembled, tmp_path, monkeypatch):
    """Both runs find no directory, and the other run is built first. It still runs, or it has left another config."""
    workdir = tmp_path / "run"
    with contextlib.ExitStack() as other:
        monkeypatch.setattr(train, "build", lambda config: other.enter_context(directory.alone(workdir)) or assembled)
        with pytest.raises(ValueError, match="in use by another run"):
            train.train(assembled.config, str(workdir), quiet=True)
    shutil.rmtree(workdir)
    monkeypatch.setattr(train, "build", lambda config: directory.write_config(workdir, {"seed": 1}) or assembled)
    with pytest.raises(ValueError, match="belongs to another config"):
        train.train(assembled.config, str(workdir), quiet=True)


# --- losses that are not finite


@pytest.fixture
def fragile(data_dir, monkeypatch):
    """A config with a NaN loss in some rows of the fourth batch, the indices of these rows, and all steps with NaN.

    The loss is NaN where the teacher's most probable token is one that first occurs in the fourth batch.
    """
    config = smoke("forward_kl", data_dir, steps=8, eval_every=8, checkpoint_every=2, log_every=3)
    run = train.build(config)
    teacher, params = run.models.teacher, run.models.teacher_params
    expected = []
    for step in range(8):
        batch = run.feed.next(step, None)
        best = np.argmax(
            teacher.logits(params, batch["tokens"], batch["mask"])[..., : run.tokenizer.vocab_size], axis=-1
        )
        expected.append([set(row[counted].tolist()) for row, counted in zip(best, batch["loss_mask"], strict=True)])
    seen = set().union(*(row for rows in expected[:3] for row in rows))
    token = next(
        token for token in sorted(set().union(*expected[3]) - seen) if sum(token in row for row in expected[3]) < 4
    )
    monkeypatch.setattr(broken, "TOKEN", token)
    config.objective.terms.distil.divergence = {"name": "tests.helpers.broken:fragile"}
    return (
        config,
        [row for row, tokens in enumerate(expected[3]) if token in tokens],
        [step for step, rows in enumerate(expected, start=1) if any(token in row for row in rows)],
    )


@pytest.mark.slow
def test_a_step_that_is_not_finite_stops_the_run_and_can_be_replayed(fragile, tmp_path, capsys):
    config, rows, _ = fragile
    with pytest.raises(FloatingPointError, match="at step 4 the loss is nan") as error:
        train.train(config, str(tmp_path / "run"), quiet=True)
    folder = tmp_path / "run" / "nonfinite" / "step_4"
    assert f"on their own: {', '.join(map(str, rows))}." in str(error.value) and str(folder) in str(error.value)
    assert [line["row"] for line in json.loads((folder / "report.json").read_text())["rows"]] == rows
    assert checkpoint_steps(tmp_path / "run") == [2]
    lines = [line["step"] for line in training(tmp_path / "run") if line["split"] == "train"]
    assert lines == [1, 2, 3]

    found = replay.replay(str(tmp_path / "run"))
    assert [line["row"] for line in found] == rows
    printed = capsys.readouterr().out
    assert "distil/loss" in printed and f"--- row {rows[0]}" in printed
    with pytest.raises(ValueError, match=r"no step 5 to replay .* the saved steps are \[4\]"):
        replay.replay(str(tmp_path / "run"), 5)


@pytest.mark.slow
def test_such_a_step_is_left_out_and_counted_on_request(fragile, tmp_path):
    config, _, steps = fragile
    config.max_skipped = 2
    result = train.train(config, str(tmp_path / "run"), quiet=True)
    lines = [line for line in training(tmp_path / "run") if line["split"] == "train"]
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["step"] for line in lines if "skipped" in line] == steps and all(
        "loss" not in line for line in lines if "skipped" in line
    )
    assert np.isfinite(result["after"]["forward_kl"])


def test_too_many_in_a_row_stop_the_run_before_the_first_that_was_too_many(data_dir, tmp_path):
    run = train.build(smoke("sft", data_dir, max_skipped=1))
    state = run.init_state()
    state, _ = run.train_step(state, None, run.batch(0, None))
    bad = state.replace(params=jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), state.params))
    kept = [np.asarray(x) for x in jax.tree.leaves((bad.params, bad.opt_state))]
    counts = []
    for step in (1, 2, 3, 4):
        bad, sums = run.train_step(bad, None, run.batch(step, None))
        counts.append((int(bad.step), int(sums["skipped"][0])))
    assert counts == [(2, 1), (2, 2), (2, 3), (2, 4)]  # one step is skipped; from the second on the state is unchanged
    for a, b in zip(kept, jax.tree.leaves((bad.params, bad.opt_state)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_a_run_that_goes_on_with_less_max_skipped_stops_at_no_finite_step(whole, tmp_path, assembled, monkeypatch):
    """The checkpoint counts one skipped step, which is more than the new limit allows."""
    until(2, whole, tmp_path / "run")
    with checkpoint.open_manager(str(tmp_path / "run"), 3) as manager:
        state, _ = checkpoint.restore(manager, assembled.abstract_state, assembled.feed)
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")
        manager.reload()
        skipped = jax.device_put(np.int32(1), state.skipped.sharding)
        checkpoint.save(manager, 2, state.replace(skipped=skipped), assembled.feed)
    monkeypatch.setattr(train, "build", lambda config: assembled)
    train.train(assembled.config, str(tmp_path / "run"), quiet=True)
    assert_same_run(whole, tmp_path / "run")


# --- killed runs


def _train(method, data_dir, workdir, changes):
    """Trains in a child process without output."""
    os.environ["XLA_FLAGS"] = xla_flags(devices=1)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    train.train(smoke(method, data_dir, **changes), str(workdir), quiet=True)


@pytest.mark.slow
@pytest.mark.parametrize("method", KILLED)
def test_killed_at_random_moments_it_ends_as_if_it_never_was(method, tmp_path, data_dir):
    """The result is equal bit for bit after KILLS kills: one before the first save, then every other one in a save."""
    changes = dict(steps=4 * KILLS + 2, checkpoint_every=1, eval_every=2 * KILLS + 1, log_every=1)
    changes |= AT_WORK.get(method, {})
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kd_jax.train", "tests.helpers.runs"])
    moments, parts = random.Random(method), tmp_path / "parts"

    def start(workdir):
        process = context.Process(target=_train, args=(method, data_dir, workdir, changes))
        process.start()
        return process

    process = start(tmp_path / "whole")
    process.join()
    assert process.exitcode == 0
    last = lambda: max(checkpoint_steps(parts), default=0) if (parts / "checkpoints").exists() else 0
    unfinished = lambda: {path.name for path in (parts / "checkpoints").glob("*") if not path.name.isdigit()}

    def wait(process, condition):
        deadline = time.monotonic() + 120
        while not condition():
            assert process.exitcode is None and time.monotonic() < deadline
            time.sleep(0.002)

    early = during = 0
    for kill in range(KILLS):
        before, left, process = last(), unfinished(), start(parts)
        if kill == 0 and (KILLS > 1 or method == "taid"):
            wait(process, (parts / "metrics.jsonl").exists)
        else:
            wait(process, lambda before=before: last() > before)
        if kill % 2:
            wait(process, unfinished)
        time.sleep(moments.uniform(0, 0.02 if kill % 2 else 0.3))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        early += last() == 0
        during += bool(unfinished() - left)
    found = dict(method=method, kills=KILLS, before_a_save=early, during=during, reached=last(), steps=changes["steps"])
    print(found)
    if log := os.environ.get("KILLS_LOG"):
        with open(log, "a") as file:
            file.write(json.dumps(found) + "\n")
    assert KILLS < 10 or (early and during)
    process = start(parts)
    process.join()
    assert process.exitcode == 0
    assert_same_run(tmp_path / "whole", parts)
