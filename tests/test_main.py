"""The command line: what a user sees when a flag is wrong."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--config=configs/forward_kl.py:smoke", "--config.objective.temprature=2"], "temperature"),
        (["--config=configs/forward_kl.py:smoke", "--config.steps=many"], "many"),
        (["--config=configs/forward_kl.py:smok"], "smoke"),
        (["--config=configs/forward_lk.py"], "no config file configs/forward_lk.py (did you mean 'forward_kl'?)"),
        (["--config=configs/forward_kl.py:smoke", "--config.mesh.data=3"], "multiply to 1"),
        (["--config=configs/forward_kl.py:smoke", "--processes=10.0.0.1:80,2,2"], "INDEX below COUNT"),
        ([], "config"),
    ],
)
def test_a_wrong_flag_is_one_paragraph(flags, words, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [sys.executable, "-m", "kd_jax.main", *flags, f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert words in done.stderr + done.stdout
    assert not (tmp_path / "run").exists()
