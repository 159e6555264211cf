"""Metrics that are also sent to Weights & Biases."""

import importlib.util
import json
import sys
import types

import pytest

from kd_jax import metrics, train
from kd_jax.storage import directory
from tests.helpers.runs import smoke

pytestmark = pytest.mark.usefixtures("one_device")


class StandIn(types.ModuleType):
    """A module with the functions of wandb that kd_jax uses, which records the calls."""

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = importlib.util.spec_from_loader("wandb", loader=None)
        self.run, self.login = None, lambda prompt: True
        self.inits, self.rows, self.ends, self.defined = [], [], [], []

    def init(self, **options):
        self.inits.append(options)
        return types.SimpleNamespace(
            log=self.rows.append, finish=lambda exit_code: self.ends.append(exit_code),
            define_metric=lambda *names, **options: self.defined.append((names, options)),
        )  # fmt: skip


@pytest.fixture
def wandb(monkeypatch):
    module = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return module


def write(workdir, first_step, steps, project="distil"):
    """Writes the metrics of some steps, as a run does."""
    run = metrics.open_wandb(project, str(workdir), {"steps": 4})
    with metrics.Writer(str(workdir), first_step, wandb_run=run) as writer:
        for step in steps:
            writer.write(step, "train", {"loss": float(step)})


def test_a_resumed_run_continues_the_same_run(wandb, tmp_path):
    write(tmp_path, 0, [1, 2])
    write(tmp_path, 2, [3])
    first, second = wandb.inits
    identity = json.loads((tmp_path / metrics.WANDB).read_text())
    assert identity["project"] == "distil" and len(identity["id"]) == 8
    assert first == second == {
        "project": "distil", "id": identity["id"], "resume": "allow", "dir": str(tmp_path),
        "name": f"{tmp_path.parent.name}/{tmp_path.name}",
        "config": {"steps": 4},
    }  # fmt: skip
    assert wandb.rows == [{"step": step, "train/loss": float(step)} for step in (1, 2, 3)]
    assert wandb.ends == [0, 0] and wandb.defined == [(("*",), {"step_metric": "step"})] * 2
    assert [line["step"] for line in metrics.read(str(tmp_path))] == [1, 2, 3]


def test_another_project_gets_a_new_run_and_an_error_marks_the_run_as_failed(wandb, tmp_path):
    write(tmp_path, 0, [1])
    write(tmp_path, 1, [2], project="other")
    first, second = wandb.inits
    assert (first["project"], second["project"]) == ("distil", "other") and first["id"] != second["id"]
    with pytest.raises(ZeroDivisionError):
        write(tmp_path, 2, (1 // 0 for _ in range(1)))
    assert wandb.ends == [0, 0, 1]


def test_without_a_project_wandb_is_not_imported(wandb, tmp_path):
    metrics.check_wandb("")
    assert metrics.open_wandb("", str(tmp_path), {}) is None and not wandb.inits


def refused(tmp_path, data_dir):
    """Returns the message with which a run is refused, after a check that nothing was written."""
    with pytest.raises(ValueError) as error:
        train.train(smoke("forward_kl", data_dir, log__wandb="distil"), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists() and "\n" not in str(error.value)
    return str(error.value)


def test_a_missing_package_is_one_sentence_with_the_command(monkeypatch, tmp_path, data_dir):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    assert refused(tmp_path, data_dir).startswith(
        "log.wandb='distil' needs the package wandb, which is not installed: pip install wandb."
    )


def test_a_missing_key_is_refused_unless_wandb_is_offline(wandb, monkeypatch, tmp_path, data_dir):
    wandb.login = lambda prompt: False
    message = refused(tmp_path, data_dir)
    assert message.startswith(
        "log.wandb='distil': Weights & Biases cannot be used (there is no key). Call `wandb login`"
    )
    wandb.login = lambda prompt: 1 // 0
    assert "(ZeroDivisionError: integer division" in refused(tmp_path, data_dir)
    monkeypatch.setenv("WANDB_MODE", "offline")
    metrics.check_wandb("distil")


def test_a_run_may_be_resumed_with_wandb(tmp_path):
    config = smoke("forward_kl", "")
    directory.write_config(str(tmp_path), config.to_dict())
    config.log.wandb, config.push = "distil", "hf://org/student"
    directory.check(str(tmp_path), config.to_dict())
    config.steps += 1
    with pytest.raises(ValueError, match="steps: 2 in the work directory"):
        directory.check(str(tmp_path), config.to_dict())


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("wandb"), reason="needs the package wandb")
@pytest.mark.filterwarnings("ignore")  # warnings of wandb
def test_an_offline_run_has_the_metrics_of_the_run(tmp_path, data_dir, monkeypatch):
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    workdir = tmp_path / "run"
    config = smoke("forward_kl", data_dir, log__wandb="distil", checkpoint_every=1)
    train.train(config, str(workdir), quiet=True)
    identity = json.loads((workdir / metrics.WANDB).read_text())
    config.log.wandb = "distil"
    train.train(config, str(workdir), quiet=True)
    assert json.loads((workdir / metrics.WANDB).read_text()) == identity and identity["project"] == "distil"
    files = list(workdir.glob(f"wandb/offline-run-*-{identity['id']}/run-{identity['id']}.wandb"))
    assert len(files) == 2, "both calls belong to one run"
    assert any(b"train/loss" in file.read_bytes() for file in files)
