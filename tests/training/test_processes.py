"""Real processes on this machine, connected over loopback, give the numbers of one process and of one device."""

import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.helpers.commands import environment, free_port
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow
STEPS = 20
MESHES = {
    "fsdp": dict(mesh__data=1, mesh__fsdp=8, mesh__tensor=1),
    "tensor": dict(mesh__data=4, mesh__fsdp=1, mesh__tensor=2),
    "both": dict(mesh__data=2, mesh__fsdp=2, mesh__tensor=2),
}
# One off-policy method, and one with every row drawn from the current student.
METHODS = {"forward_kl": {}, "gkd": dict(prefixes__fraction=1.0)}
RUNS = [("forward_kl", "fsdp"), ("forward_kl", "tensor"), ("forward_kl", "both"), ("gkd", "fsdp"), ("gkd", "both")]
# The file LOSSES_LOG gets a line of JSON per run with the losses of the three layouts. The last combination runs only
# with this file, because it takes 20 s and tests nothing beyond "both".
LOSSES_LOG = os.environ.get("LOSSES_LOG", "")
RUNS += [("gkd", "tensor")] if LOSSES_LOG else []


def together(runs, data_dir, folder, count, devices):
    """Returns the results of `runs` from each of `count` processes, which have `devices` devices each."""
    port = free_port()
    outs = [folder / f"{count}x{devices}.{index}.json" for index in range(count)]
    started = []
    for index, out in enumerate(outs):
        spec = dict(data_dir=str(data_dir), steps=STEPS, runs=runs)
        spec["processes"] = f"127.0.0.1:{port},{count},{index}" if count > 1 else ""
        command = [sys.executable, "-m", "tests.helpers.processes", json.dumps(spec), str(out)]
        root = ROOT
        started.append(
            subprocess.Popen(
                command, cwd=root, env=environment(devices), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        )
    said = [process.communicate(timeout=900)[0].decode() for process in started]
    assert [process.returncode for process in started] == [0] * count, said
    return [json.loads(out.read_text()) for out in outs]


@pytest.fixture(scope="module")
def found(data_dir, tmp_path_factory):
    """The losses and rows of one device, of one process with eight devices, and of two processes with four each."""
    folder = tmp_path_factory.mktemp("processes")
    one = {method: [method, METHODS[method] | dict(steps=STEPS)] for method in METHODS}
    divided = {f"{m} {mesh}": [m, METHODS[m] | MESHES[mesh] | dict(steps=STEPS)] for m, mesh in RUNS}
    return (
        together(one, data_dir, folder, 1, 1),
        together(divided, data_dir, folder, 1, 8),
        together(divided, data_dir, folder, 2, 4),
    )


@pytest.mark.parametrize(("method", "mesh"), RUNS)
def test_losses_and_rows_are_those_of_one_device(method, mesh, found):
    (one,), *others = found
    expected = one[method]
    if LOSSES_LOG:
        layouts = [expected["losses"], *(processes[0][f"{method} {mesh}"]["losses"] for processes in others)]
        side_by_side = dict(zip(("1 x 1", "1 x 8", "2 x 4"), layouts, strict=True))  # processes x devices per process
        with open(LOSSES_LOG, "a") as file:
            file.write(json.dumps({"method": method, "mesh": mesh} | side_by_side) + "\n")
    for processes in others:
        ours = [process[f"{method} {mesh}"] for process in processes]
        for its in ours:
            np.testing.assert_allclose(its["losses"], expected["losses"], rtol=1e-6)
            assert its["losses"] == ours[0]["losses"] and its["tokens"] == expected["tokens"]
        rows = [sorted(itertools.chain(*parts)) for parts in zip(*(its["rows"] for its in ours), strict=True)]
        assert rows == [sorted(step) for step in expected["rows"]]
        assert all(len(its["rows"][0]) * len(ours) == len(expected["rows"][0]) for its in ours)
