"""The notebooks run from top to bottom, and the committed files are the results of such a run.

This command runs a notebook and saves the outputs. (jupyter execute --inplace would add times and the Python version.)

    SAVE_NOTEBOOKS=1 python -m pytest tests/commands/test_notebooks.py -m slow -k 04_distil
"""

import os
import re

import nbclient
import nbformat
import pytest
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager

from tests.helpers.paths import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LARGEST_BYTES, LIMIT_S = 600_000, 600  # limits for a file and for a cell
OF_THE_TESTS = (
    "XLA_FLAGS",
    "JAX_COMPILATION_CACHE_DIR",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",
)  # conftest.py sets these
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}

pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def execute(path):
    """Runs the notebook in this Python on one CPU device, as a reader would, and returns the result."""
    notebook = nbformat.read(path, as_version=4)
    # Without kernel folders, the only kernel is the kernel of the running Python.
    kernels = KernelSpecManager(kernel_dirs=[])
    manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=kernels)
    client = nbclient.NotebookClient(notebook, km=manager, timeout=LIMIT_S, record_timing=False)
    environment = {name: value for name, value in os.environ.items() if name not in OF_THE_TESTS}
    client.execute(cwd=str(ROOT), env=environment | {"JAX_PLATFORMS": "cpu"}, cleanup_kc=True)
    notebook.metadata = nbformat.from_dict(METADATA)
    return notebook


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(path):
    notebook = execute(path)
    if os.environ.get("SAVE_NOTEBOOKS"):
        nbformat.write(notebook, path)


def test_what_is_committed_is_a_whole_clean_run(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all("execution" not in cell.metadata for cell in cells), "times of a run"
    assert notebook.metadata == METADATA
    outputs = [output for cell in cells for output in cell.outputs]
    assert [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"] == []


def test_nothing_in_it_is_of_one_machine(path):
    text = path.read_text(encoding="utf-8")
    assert re.findall(r"(?<![\w.])/(?:home|work|tmp|root|Users)/[^\s\"\\]*", text) == []
    assert path.stat().st_size < LARGEST_BYTES
