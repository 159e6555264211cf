"""Real processes on this machine: data that each process reads, writes and counts, files of a run, and its end."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from kd_jax import metrics
from kd_jax.models import folder
from tests.helpers.commands import environment, free_port
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow
HEARTBEAT = 10  # seconds, in the processes of `tests.helpers.hosts`


def start(arguments, devices, **variables):
    return subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, env=environment(devices) | variables, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def ended(processes, timeout=400):
    """Returns the exit codes and the outputs. Kills processes that still run after the timeout."""
    try:
        said = [process.communicate(timeout=timeout)[0] for process in processes]
        return [process.returncode for process in processes], said
    finally:
        for process in processes:
            process.kill()


# --- reading, writing and counting in each process

LAYOUTS = {"two": (2, 4), "eight": (1, 8), "one": (1, 1), "pair": (2, 1)}  # (processes, devices per process)


def look(layout, out, data_dir, mesh, model, workdirs):
    """Returns the results of each process of a layout."""
    (count, devices), port = LAYOUTS[layout], free_port()
    spec = dict(data_dir=str(data_dir), mesh=mesh, folder=str(model), workdirs=[str(path) for path in workdirs])
    files = [out / f"{layout} {len(workdirs)} {index}.json" for index in range(count)]
    meet = [f"127.0.0.1:{port},{count},{index}" if count > 1 else "" for index in range(count)]
    commands = [
        ["-m", "tests.helpers.hosts", json.dumps(spec | {"processes": its}), str(file)]
        for its, file in zip(meet, files, strict=True)
    ]
    codes, said = ended([start(command, devices) for command in commands])
    assert codes == [0] * count, said
    return [json.loads(file.read_text()) for file in files]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="module")
def two(out, data_dir):
    return look("two", out, data_dir, dict(data=1, fsdp=4, tensor=2), out / "of two", [out / "by two"])


@pytest.fixture(scope="module")
def one(out, data_dir):
    return look("one", out, data_dir, dict(data=1), out / "of one", [])[0]


def test_each_process_reads_the_slices_that_it_holds_and_each_once(two, one):
    for its in (process["load"] for process in two):
        assert its["reads"] == its["slices"]
        assert its["read"] == 2 * its["held"]  # two bytes per parameter: the file is in bfloat16
        assert 0.5 <= its["held"] / its["whole"] < 0.501  # half of every matrix, and all of the norms
    assert one["load"]["held"] == one["load"]["whole"] == two[0]["load"]["whole"]


def test_what_several_processes_save_is_bit_for_bit_what_was_loaded(two, one, out):
    original = load_file(folder("package:docstrings_teacher") / "model.safetensors")
    for path in (out / "of two", out / "of one"):
        parts = [load_file(file) for file in sorted(path.glob("*.safetensors"))]
        assert len(parts) > 1
        saved = {name: array for part in parts for name, array in part.items()}
        assert saved.keys() == original.keys()
        for name, array in saved.items():
            np.testing.assert_array_equal(array, original[name].astype(array.dtype))
    assert not [file for file in out.iterdir() if "partial" in file.name]
    # Both processes gather the same matrices in the same order, one at a time. A single process gathers nothing.
    first, second = (process["gathered"] for process in two)
    assert first == second and len(first) == 29 and max(first) < sum(first) / 3 and one["gathered"] == []


def test_averages_are_exact_where_hosts_count_differently(two, one):
    """Compares averages over tokens and over rows, in a step and on held-out rows, and a token rule over the batch."""
    first, second, alone = (process["unequal"] for process in (*two, one))
    assert (first["own"], second["own"], alone["own"]) == (4, 66, 70)
    assert first == second | {"own": 4} and first["counts"] == alone["counts"]
    assert first["counts"]["kept/loss"] == int(0.3 * 70)  # and int(0.3 * 4) + int(0.3 * 66) is one less
    for name, value in alone["means"].items():
        np.testing.assert_allclose(first["means"][name], value, rtol=2e-6, err_msg=name)


def test_processes_may_share_rows(two, one):
    """The axis `tensor` can span several processes, as with one process per GPU."""
    first, second = (process["tensor"] for process in two)
    assert first == second
    np.testing.assert_allclose(first, one["tensor"], rtol=1e-6)


def test_a_checkpoint_goes_on_with_another_number_of_processes(two, out, data_dir):
    """DistiLLM uses rows of the dataset, of a second stream, newly drawn rows, and rows of a buffer."""
    shutil.copytree(out / "by two", out / "by two, read by eight")
    mesh = dict(data=2, fsdp=2, tensor=2)
    (eight,) = look("eight", out, data_dir, mesh, "", [out / "by eight", out / "by two, read by eight"])
    again = look("two", out, data_dir, mesh, "", [out / "by eight"])
    whole, after_two = eight["parts"]
    assert whole["position"]["store"] and whole["position"]["data"] and whole["position"]["text"]
    runs = [[process["parts"][0] for process in two], [whole], [after_two], [process["parts"][0] for process in again]]
    for parts in runs:
        steps = len(parts[0]["losses"])
        print(len(parts), "process(es), from step", 7 - steps, parts[0]["losses"])
        assert steps == (6 if parts is runs[0] or parts is runs[1] else 3)
        for process in parts:
            np.testing.assert_allclose(process["losses"], whole["losses"][-steps:], rtol=1e-6)
            assert process["position"] == whole["position"]
        rows = [sorted(itertools.chain(*its)) for its in zip(*(process["rows"] for process in parts), strict=True)]
        assert rows == [sorted(step) for step in whole["rows"][-steps:]]


# --- the end of a run


def run(name, flags, data_dir, workdir, raise_at=("", "")):
    """Starts `kd_jax.main` in the processes of a layout."""
    (count, devices), port = LAYOUTS[name], free_port()
    meet = [[f"--processes=127.0.0.1:{port},{count},{index}"] if count > 1 else [] for index in range(count)]
    flags = [*flags, f"--workdir={workdir}", f"--config.data.data_dir={data_dir}"]
    return [
        start(["-m", "tests.helpers.hosts", "main", raises, *its, *flags], devices)
        for its, raises in zip(meet, raise_at, strict=False)
    ]


def lines(workdir, split):
    return [line for line in metrics.read(workdir) if line["split"] == split]


LONG = ["--config=configs/sft.py:smoke", "--config.steps=100000", "--config.eval_every=100000", "--config.log_every=1"]


def wait_for_steps(workdir, processes):
    deadline = time.monotonic() + 300
    while len(lines(workdir, "train")) < 5:
        assert all(process.poll() is None for process in processes) and time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("victim", [0, 1])
def test_who_is_killed_takes_the_others_down(victim, data_dir, tmp_path):
    processes = run("pair", LONG, data_dir, tmp_path / "run")
    wait_for_steps(tmp_path / "run", processes)
    os.kill(processes[victim].pid, signal.SIGKILL)
    started = time.monotonic()
    codes, said = ended(processes, 3 * HEARTBEAT)
    print(f"process {victim} killed; the other one stopped {time.monotonic() - started:.1f} s later")
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] in (1, -signal.SIGABRT)
    assert re.search("another process has stopped|most likely indicates that another task died", said[1 - victim]), (
        said[1 - victim]
    )
    assert f"process {1 - victim} of 2, connected through 127.0.0.1" in said[1 - victim]
    assert "Thread 0x" not in said[1 - victim]  # the output has no stack traces of threads


def test_an_error_in_one_process_is_said_there_and_ends_all(data_dir, tmp_path):
    guilty = 1  # an error in process 0 has the effect of a kill
    processes = run("pair", LONG, data_dir, tmp_path / "run", ["5" if index == guilty else "" for index in (0, 1)])
    codes, said = ended(processes, 300)
    assert codes[guilty] == 1 and codes[1 - guilty] in (1, -signal.SIGABRT)
    assert "RuntimeError: something broke" in said[guilty] and f"process {guilty} of 2 stops" in said[guilty]
    assert "something broke" not in said[1 - guilty]


def test_sigterm_to_one_stops_all_and_the_same_command_ends_the_run(data_dir, tmp_path):
    flags = [*LONG, "--config.steps=150"]
    processes = run("pair", flags, data_dir, tmp_path / "run")
    wait_for_steps(tmp_path / "run", processes)
    processes[1].send_signal(signal.SIGTERM)
    codes, said = ended(processes, 120)
    assert codes == [75, 75] and all("is saved, and the same command resumes the run" in text for text in said), said
    codes, said = ended(run("pair", flags, data_dir, tmp_path / "run"))
    assert codes == [0, 0], said
    assert [line["step"] for line in lines(tmp_path / "run", "train")] == list(range(1, 151))
    for file in ("student/model.safetensors", "report.html", "table.md"):
        assert (tmp_path / "run" / file).exists()


def test_another_teacher_stops_both_processes_with_the_same_words(data_dir, tmp_path):
    """Only the first process compares. At an address only this process has the identity of the work directory."""
    shutil.copytree(folder("package:docstrings_teacher"), tmp_path / "teacher")
    weights, workdir = tmp_path / "teacher" / "model.safetensors", f"file://{tmp_path / 'run'}"
    flags = ["--config=configs/sft.py:smoke", "--config.mesh.data=2", f"--config.teacher.path={tmp_path / 'teacher'}"]
    codes, said = ended(run("pair", flags, data_dir, workdir))
    assert codes == [0, 0], said
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    codes, said = ended(run("pair", flags, data_dir, workdir))
    words = f"teacher.path={tmp_path / 'teacher'} has other content than when the run began"
    assert codes == [1, 1] and all(words in text for text in said), said


def test_ctrl_c_at_one_saves_at_all(data_dir, tmp_path):
    processes = run("pair", LONG, data_dir, tmp_path / "run")
    wait_for_steps(tmp_path / "run", processes)
    processes[1].send_signal(signal.SIGINT)
    codes, said = ended(processes, 120)
    assert codes == [75, 130], said
    step = re.search(r"interrupted; step (\d+) is saved, and the same command resumes the run", said[1])
    assert step and f"asked to stop; step {step[1]} is saved" in said[0], said
    assert (tmp_path / "run" / "checkpoints" / step[1]).is_dir()


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_step_of_two_that_is_not_finite_can_be_replayed_by_one(scheme, data_dir, tmp_path):
    """With file://, each process has its own folder, and both processes write only the files of orbax."""
    flags = ["--config=configs/sft.py:smoke", "--config.learning_rate.init_value=1e38", "--config.data.batch_size=4"]
    workdir = f"{scheme}{tmp_path / 'run'}"
    codes, said = ended(run("pair", flags, data_dir, workdir), 300)
    assert codes == [1, 1] and all(f"--workdir={workdir} repeats the step" in text for text in said), said
    (found,) = (tmp_path / "run" / "nonfinite").iterdir()
    report = json.loads((found / "report.json").read_text())
    assert len(report["rows"]) == len(np.load(found / "batch.npz")["tokens"]) > 1
    codes, said = ended([start(["-m", "kd_jax.replay", f"--workdir={workdir}"], 1)])
    assert codes == [0] and f"Every one of the {len(report['rows'])} rows" in said[0], said


def test_a_checkpoint_that_one_process_cannot_read_is_passed_over_by_both(data_dir, tmp_path):
    """Each process reads one half of the arrays from a separate file."""
    flags = ["--config=configs/sft.py:smoke", "--config.mesh.data=1", "--config.mesh.fsdp=2", "--config.steps=6"]
    flags += [f"--config.{key}" for key in ("eval_every=6", "checkpoint_every=2", "keep_checkpoints=3", "log_every=1")]
    numbers = lambda: [line for line in metrics.read(tmp_path / "run") if line["split"] != "speed"]
    codes, said = ended(run("pair", flags, data_dir, tmp_path / "run"))
    assert codes == [0, 0], said
    whole, folder = numbers(), tmp_path / "run" / "checkpoints"
    for step, index in ((6, 1), (4, 0)):
        files = (folder / str(step) / "state" / f"ocdbt.process_{index}" / "d").iterdir()
        largest = max(files, key=lambda file: file.stat().st_size)
        largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    codes, said = ended(run("pair", flags, data_dir, tmp_path / "run"))
    assert codes == [0, 0] and numbers() == whole, said
    for process, steps in enumerate(((4, 6), (6, 4))):
        for step, problem in zip(
            steps, ("Exception: Encountered error", "another process cannot read it"), strict=True
        ):
            assert f"checkpoint {step} in {folder} is damaged: {problem}" in said[process], said[process]
        assert "resumes from step 2." in said[process]
    assert sorted(path.name for path in folder.glob("damaged-*")) == ["damaged-4", "damaged-6"]
    assert (folder / "6").is_dir()


def test_who_waits_in_vain_says_where():
    port = free_port()
    flags = ["--config=configs/sft.py:smoke", "--workdir=nowhere", f"--processes=127.0.0.1:{port},2,"]
    for index in "01":
        codes, said = ended([start(["-m", "tests.helpers.hosts", "main", "", *flags[:-1], flags[-1] + index], 1)], 100)
        assert codes == [1] and f"not all processes met at 127.0.0.1:{port} within 8 s" in said[0], said


def test_slurms_tasks_meet_by_themselves_and_must_be_told_the_same(tmp_path):
    job = free_port()  # JAX derives the port from the last bits of the job id
    slurm = dict(SLURM_JOB_ID=str(job), SLURM_STEP_NODELIST="localhost", SLURM_NTASKS="2")
    tasks = [slurm | dict(SLURM_PROCID=index, SLURM_LOCALID=index) for index in "01"]
    command = [
        "-m",
        "tests.helpers.hosts",
        "main",
        "",
        "--config=configs/sft.py:smoke",
        f"--workdir={tmp_path / 'run'}",
    ]
    codes, said = ended([start([*command, "--config.steps=0"], 1, **task) for task in tasks])
    assert codes == [1, 1]
    for index, text in enumerate(said):
        assert f"process {index} of 2, connected through SLURM" in text and "steps=0 must be at least 1" in text
    seeds = [start([*command, f"--config.seed={task['SLURM_PROCID']}"], 1, **task) for task in tasks]
    codes, said = ended(seeds)
    assert codes == [1, 1] and all("different configs or work directories" in text for text in said)
    codes, said = ended([start([*command, "--config.steps=0", "--processes=alone"], 1, **tasks[1])])
    assert codes == [1] and "steps=0" in said[0] and "through" not in said[0]
