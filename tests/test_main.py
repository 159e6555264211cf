"""The command line: what a user sees when a flag is wrong."""

import copy
import operator
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from absl import flags

from kd_jax import main, train
from kd_jax.value_types import whole_number
from tests.runs import smoke

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--config=configs/forward_kl.py:smoke", "--config.objective.temprature=2"], "temperature"),
        (
            ["--config=configs/forward_kl.py:smoke", "--config.steps=many"],
            "--config.steps=many: the key takes a whole number, such as 1000, 1_000 or 1e3.",
        ),
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


@pytest.fixture
def parsed(monkeypatch):
    """Parses flags on top of the smoke setting of forward KL, in this process, and returns the config."""

    def parse(*given):
        argv = ["main", "--config=configs/forward_kl.py:smoke", "--workdir=nowhere", *given]
        monkeypatch.setattr(sys, "argv", argv)
        values = copy.deepcopy(flags.FLAGS)
        with monkeypatch.context() as patch:
            patch.setattr(flags, "FLAGS", values)
            patch.setattr(main.CONFIG, "_flagvalues", values)
            values["config"].flag_values = values
            with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # ml_collections' own
                main.parse(argv)
            return main.CONFIG.value

    monkeypatch.chdir(ROOT)
    return parse


@pytest.mark.parametrize("text", ["1e3", "1_000", "1000.0", "1000", "0x3e8", "10e2"])
def test_a_whole_number_has_many_forms(text, parsed):
    config = parsed(f"--config.steps={text}", "--config.clip_norm=1")
    assert config.steps == 1000 and type(config.steps) is int
    assert config.clip_norm == 1.0 and type(config.clip_norm) is float


def test_a_large_whole_number_is_exact():
    assert whole_number("1e23") == 10**23 and whole_number("1.5e1") == 15 and whole_number(7) == 7


WHOLE = "the key takes a whole number, such as 1000, 1_000 or 1e3."


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("steps=2.5", f"--config.steps=2.5: {WHOLE}"),
        ("steps=1e400", f"--config.steps=1e400: {WHOLE}"),
        ("steps=nan", f"--config.steps=nan: {WHOLE}"),
        ("data.batch_size=", f"--config.data.batch_size=: {WHOLE}"),
        ("mesh.fsdp=two", f"--config.mesh.fsdp=two: {WHOLE}"),
        ("teacher.int8_report=maybe", "--config.teacher.int8_report=maybe: the key takes true or false."),
        ("clip_norm=0,5", "--config.clip_norm=0,5: the key takes a number, such as 0.5 or 1e-3."),
        ("optimizer.weight_decay=inf", "--config.optimizer.weight_decay=inf: the key takes a number"),
        ("student.layers=(1,)x", "--config.student.layers=(1,)x: the key takes a tuple, such as (0, 3, 6)"),
        ("data=3", "--config.data=3: the key takes keys of its own, each with a flag such as --config.data.name=jsonl"),
        ("steps", "Missing value for flag --config.steps"),
    ],
)
def test_a_flag_of_the_wrong_type_names_the_key_the_value_and_the_type(flag, words, parsed):
    with pytest.raises(SystemExit) as ended:
        parsed(f"--config.{flag}")
    assert words in str(ended.value) and "\n" not in str(ended.value)


def test_a_value_of_the_wrong_type_in_a_config_file_is_one_sentence_with_the_line(tmp_path, parsed):
    lines = "from configs import forward_kl\n\ndef get_config():\n    config = forward_kl.get_config('smoke')\n"
    (tmp_path / "mine.py").write_text(lines + "    config.steps = '100'\n    return config\n")
    with pytest.raises(SystemExit) as ended:
        parsed(f"--config={tmp_path / 'mine.py'}")
    assert "the key 'steps' takes a whole number" in str(ended.value)
    assert "not '100', which is of type str" in str(ended.value) and "mine.py, line 5)" in str(ended.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(steps=None), "steps=None must be a whole number"),
        (dict(steps=True), "steps=True must be a whole number"),
        (dict(mesh=dict(data="two", fsdp=1, tensor=1)), "mesh.data='two' must be a whole number"),
        (dict(mesh=dict(data=1)), "no key 'mesh.fsdp' any more"),
        (dict(student__layers=("a",)), "student.layers=('a',) must be a tuple of whole numbers"),
        (dict(profile_steps=(1, 2.5)), "profile_steps=(1, 2.5) must be"),
        (dict(clip_norm=float("inf")), "clip_norm=inf must be a number"),
        (dict(data__options=None), "data.options=None must be a dict"),
        (dict(objective__terms__distil__pair=("teacher", 3)), "objective.terms.distil.pair=('teacher', 3) must be"),
        (dict(optimizer=dict(name="adamw", weight_decay="0.1")), "weight_decay='0.1' in the spec"),
        (dict(data__options=dict(packages="optax")), "packages='optax' of the dataset docstrings must be a tuple"),
    ],
)
def test_values_of_the_wrong_type_that_ml_collections_lets_through_are_refused(change, words, data_dir, one_device):
    config = smoke("forward_kl", data_dir)
    for key, value in change.items():
        *path, last = key.split("__")
        node = operator.attrgetter(".".join(path))(config) if path else config
        node[last] = value
    with pytest.raises(ValueError) as error:
        train.build(config)
    assert words in str(error.value)
