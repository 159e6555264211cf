"""The first Ctrl-C saves and prints the step, a second one stops at once, and each command prints what was saved."""

import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from kd_jax import cache_teacher, main, metrics, train
from kd_jax.evaluate import __main__ as evaluate
from kd_jax.storage import checkpoint
from kd_jax.train import loop
from tests.helpers.commands import environment
from tests.helpers.paths import ROOT
from tests.helpers.runs import WHOLE, assert_same_run, checkpoint_steps, smoke, until

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data_dir, one_device):
    """An uninterrupted run of sft with three checkpoints."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train.train(smoke("sft", data_dir, **WHOLE), str(folder), quiet=True)
    return folder


def interrupt(monkeypatch, where, name, at=1, times=1):
    """Sends Ctrl-C `times` times when the named function is called for the `at`-th time."""
    function, calls = getattr(where, name), itertools.count(1)

    def interrupted(*arguments, **options):
        if next(calls) == at:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
        return function(*arguments, **options)

    monkeypatch.setattr(where, name, interrupted)


@pytest.mark.slow
def test_a_notebooks_interrupt_saves_the_step_and_is_a_keyboard_interrupt(
    whole, tmp_path, data_dir, monkeypatch, capfd
):
    config, before = smoke("sft", data_dir, **WHOLE), [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="step 3 is saved") as error:
        interrupt(patch, train.Run, "put", at=3)
        train.train(config, str(tmp_path / "run"), quiet=True)
    assert isinstance(error.value, loop.Interrupted) and error.value.step == 3
    assert "Ctrl-C again stops at once" in capfd.readouterr().err
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
    assert checkpoint_steps(tmp_path / "run") == [2, 3]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as error:
        interrupt(patch, train.Run, "put", at=1, times=2)
        train.train(config, str(tmp_path / "run"), quiet=True)
    assert not isinstance(error.value, loop.Interrupted) and checkpoint_steps(tmp_path / "run") == [2, 3]
    train.train(config, str(tmp_path / "run"), quiet=True)
    assert_same_run(whole, tmp_path / "run")


@pytest.mark.parametrize(("where", "name"), [(train, "build"), (loop.results, "finish")])
def test_before_the_first_step_and_after_the_last_the_command_says_what_is_kept(
    where, name, whole, tmp_path, data_dir, monkeypatch, capsys
):
    """The exit code is 130, as shells use for Ctrl-C."""
    workdir = str(until(5, whole, tmp_path / "run"))
    interrupt(monkeypatch, where, name)
    monkeypatch.setattr(main, "WORKDIR", types.SimpleNamespace(value=workdir))
    with pytest.raises(SystemExit) as ended, main.ends_well(main.remaining_results):
        train.train(smoke("sft", data_dir, **WHOLE), workdir, quiet=True)
    assert ended.value.code == 130
    assert (
        f"kd_jax: interrupted; step 5 is saved in {workdir}, and the same command resumes the run."
        in capsys.readouterr().err
    )
    shutil.rmtree(Path(workdir) / "checkpoints")
    assert "no step is saved" in main.remaining_results()


def test_an_ignored_ctrl_c_stays_ignored():
    """A background job of a shell ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with loop.Notices():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interrupted_evaluation_is_a_line(tmp_path, monkeypatch, capsys):
    interrupt(monkeypatch, evaluate, "load")
    arguments = ["--model=package:docstrings_teacher", "--data=docstrings", f"--out={tmp_path / 'out'}", "--rows=1"]
    monkeypatch.setattr(sys, "argv", ["evaluate", *arguments])
    with pytest.raises(SystemExit) as ended:
        evaluate.main()
    assert ended.value.code == 130 and "kd_jax.evaluate: interrupted; no results are saved" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_interrupted_cache_says_how_much_of_it_is_there(tmp_path, data_dir, monkeypatch, capsys):
    config = smoke("forward_kl", data_dir, data__eval_rows=8)
    folder = str(tmp_path / "cache")
    monkeypatch.setattr(main, "WORKDIR", types.SimpleNamespace(value=folder))
    with (
        monkeypatch.context() as patch,
        pytest.raises(SystemExit) as ended,
        main.ends_well(cache_teacher.remaining_results),
    ):
        interrupt(patch, cache_teacher.files, "write_part", at=3)
        cache_teacher.write(config, folder, "samples", k=2, part_rows=8, quiet=True)
    assert ended.value.code == 130 and "2 complete files remain" in capsys.readouterr().err
    assert not list((tmp_path / "cache").rglob("*.partial-*"))


# --- commands in child processes

LONG = ["--config=configs/sft.py:smoke", "--config.steps=100000", "--config.eval_every=100000", "--config.log_every=1"]
SLOW = """
import sys, time
from absl import app
from kd_jax import main, train
put, calls = train.Run.put, iter(range(1, 100))
train.Run.put = lambda run, batch: next(calls) == 4 and time.sleep(600) or put(run, batch)
app.run(main.main, flags_parser=main.parse)
"""


def wait(process, condition):
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)


@contextlib.contextmanager
def started(*command):
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=environment(1), text=True, stderr=subprocess.PIPE
    )
    try:
        yield process
    finally:
        process.kill()


@pytest.mark.slow
def test_ctrl_c_saves_and_says_the_step(tmp_path, data_dir):
    workdir = tmp_path / "run"
    with started("-m", "kd_jax.main", *LONG, f"--workdir={workdir}", f"--config.data.data_dir={data_dir}") as process:
        wait(process, lambda: len(metrics.read(workdir)) > 5)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=100)[1]
    found = re.search(r"kd_jax: interrupted; step (\d+) is saved, and the same command resumes the run\.", said)
    assert process.returncode == 130 and found and "Traceback" not in said, said
    assert checkpoint.last_step(str(workdir)) == int(found[1])


@pytest.mark.slow
@pytest.mark.parametrize("every", [2, 100])
def test_a_second_ctrl_c_stops_at_once_and_says_the_last_checkpoint(every, tmp_path, data_dir):
    workdir = tmp_path / "run"
    flags = [*LONG, f"--workdir={workdir}", f"--config.data.data_dir={data_dir}", f"--config.checkpoint_every={every}"]
    with started("-c", SLOW, *flags) as process:
        steps = lambda: [line["step"] for line in metrics.read(workdir) if line["split"] == "train"]
        wait(process, lambda: 2 in steps() and (every > 2 or checkpoint.last_step(str(workdir))))
        time.sleep(2)  # the fourth step has begun
        process.send_signal(signal.SIGINT)
        time.sleep(1)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=10)[1]
    kept = f"step 2 is saved in {workdir}" if every == 2 else f"no step is saved in {workdir}"
    assert process.returncode == 130 and f"interrupted twice, and stopped at once; {kept}" in said, said
    assert "Traceback" not in said


@pytest.mark.slow
def test_an_interrupted_ablation_says_how_many_runs_are_done(tmp_path, data_dir):
    workdir = tmp_path / "ablation"
    flags = ["--config=configs/ablations/divergences.py:smoke", f"--config.base.data.data_dir={data_dir}"]
    with started("-m", "kd_jax.ablate", *flags, f"--workdir={workdir}") as process:
        wait(process, lambda: list(workdir.glob("*/result.json")))
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=100)[1]
    done = len(list(workdir.glob("*/result.json")))
    assert process.returncode == 130 and f"kd_jax.ablate: interrupted; {done} runs are done in" in said, said
    # Python prints that it ignores a signal within a callback of the garbage collector. The end of the step handles it.
    assert said.splitlines()[-1].startswith("kd_jax.ablate: interrupted")
