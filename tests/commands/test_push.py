"""The upload of a finished run's student to the hub, with a server on the loopback address."""

import json
import shutil

import huggingface_hub
import huggingface_hub.constants as constants
import pytest

from kd_jax import models, train
from kd_jax.run import push
from kd_jax.settings import Settings
from kd_jax.storage import hub
from tests.helpers import hub_server
from tests.helpers.runs import smoke

pytestmark = pytest.mark.usefixtures("one_device")
ENVIRONMENT = {
    "command": "/home/me/kd_jax/main.py --config=configs/gkd.py --workdir=runs/gkd", "date": "2026-01-01 10:00 UTC",
    "devices": "1 x cpu", "jax": "0.11.2",
}  # fmt: skip
TABLE = "| held-out rows | teacher | student after |\n|---|---:|---:|\n| forward_kl | | 0.5 |\n"


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A server that this process uses with a token."""
    with hub_server.running() as running:
        hub_server.use(monkeypatch, running, tmp_path / "hf", hub_server.TOKEN)
        yield running


@pytest.fixture
def workdir(tmp_path):
    """The work directory of a finished run, as far as an upload reads it."""
    shutil.copytree(models.folder("package:docstrings_teacher"), tmp_path / "run" / "student")
    (tmp_path / "run" / "environment.json").write_text(json.dumps(ENVIRONMENT))
    (tmp_path / "run" / "table.md").write_text(TABLE)
    return tmp_path / "run"


def settings(**changes):
    return Settings.parse(smoke("forward_kl", "", **{"push": "hf://org/student"} | changes))


def pushed(server):
    repository = server.repositories["models/org/student"]
    return repository, repository.commits[repository.refs["main"]]


def test_a_student_is_uploaded_with_its_card_and_can_be_read_back(server, workdir, monkeypatch):
    assert push.push(settings(), str(workdir)) == f"{server.url}/org/student"
    repository, files = pushed(server)
    assert repository.visibility == "private"
    for path in (workdir / "student").iterdir():
        assert files[path.name] == path.read_bytes()
    monkeypatch.setattr(hub, "_commits", {})
    assert models.load_config("hf://org/student") == models.load_config(workdir / "student")


def test_a_second_upload_keeps_the_repository_and_an_edited_card(server, workdir):
    server.add("org/student", {"old.txt": b"old"}, visibility="public")
    push.push(settings(), str(workdir))
    (workdir / "student" / "README.md").write_text("mine")
    push.push(settings(push_private=False), str(workdir))
    repository, files = pushed(server)
    assert files["README.md"] == b"mine" and files["old.txt"] == b"old" and repository.visibility == "public"


def test_a_repository_is_public_if_the_config_says_so(server, workdir):
    push.push(settings(push_private=False), str(workdir))
    assert pushed(server)[0].visibility == "public"


def test_the_card_names_method_teacher_data_measures_and_command(server, workdir):
    sha = server.add("org/teacher", {"config.json": b"{}"})
    server.add("org/rows", {"a.jsonl": b""}, kind="datasets")
    changes = dict(teacher__path="hf://org/teacher@main", student__init="layers", student__layers=(0, 2))
    config = settings(**changes, data__name="jsonl", data__options={"path": "hf://datasets/org/rows/a.jsonl"})
    text = push.card(config, workdir)
    metadata = huggingface_hub.ModelCard(text).data.to_dict()
    assert metadata == {
        "base_model": "org/teacher", "datasets": ["org/rows"], "library_name": "transformers",
        "pipeline_tag": "text-generation", "tags": ["distillation", "kd_jax"],
    }  # fmt: skip
    for line in (
        "# student\n",
        "| method | distil: forward_kl of teacher and student, coefficient 1; rows: data |",
        f"| teacher | [org/teacher](https://huggingface.co/org/teacher), commit {sha[:12]} |",
        "| student before training | the layers 0, 2 of the teacher |",
        "| data | jsonl, [org/rows](https://huggingface.co/datasets/org/rows), commit ",
        TABLE,
        "\npython -m kd_jax.main --config=configs/gkd.py --workdir=runs/gkd\n",
    ):
        assert line in text, line


def test_the_card_of_local_models_has_no_parent_folders(workdir):
    config = settings(teacher__path="/home/me/secret/big", student__init="random", data__name="dolly")
    text = push.card(config, workdir)
    assert "| teacher | big |" in text and "/home/me" not in text and "random parameters" in text
    metadata = huggingface_hub.ModelCard(text).data.to_dict()
    assert metadata["datasets"] == ["databricks/databricks-dolly-15k"] and "base_model" not in metadata


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("org/student", "push=org/student is no address on the Hugging Face hub"),
        ("hf://datasets/org/student", "names a dataset, and not a model"),
        (
            "hf://org/student@v1",
            "push=hf://org/student@v1: a student is uploaded to the branch main; leave out @REVISION.",
        ),
    ],
)
def test_a_wrong_address_is_refused_before_training(server, tmp_path, data_dir, address, words):
    with pytest.raises(ValueError) as error:
        train.train(smoke("forward_kl", data_dir, push=address), str(tmp_path / "run"))
    assert words in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("token", "words"),
    [("", "an upload needs a token that may write"), ("hf_wrong", "the hub refuses access (status 401)")],
)
def test_without_a_valid_token_nothing_is_trained(server, tmp_path, data_dir, monkeypatch, token, words):
    hub_server.use(monkeypatch, server, tmp_path / "hf", token)
    with pytest.raises(ValueError) as error:
        train.train(smoke("forward_kl", data_dir, push="hf://org/student"), str(tmp_path / "run"))
    assert words in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("fails", ["repos/create", "preupload", "/commit/"])
def test_a_failed_upload_loses_nothing_and_can_be_repeated(server, workdir, fails, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between tries
    server.fails = fails
    with pytest.raises(ConnectionError) as error:
        push.push(settings(), str(workdir))
    assert str(error.value).startswith(
        f"the run is complete and its student is in {workdir}/student, but the upload to"
    )
    assert "The same command uploads again, without training." in str(error.value) and "\n" not in str(error.value)
    assert models.load_config(workdir / "student")
    server.fails = ""
    push.push(settings(), str(workdir))
    assert "model.safetensors" in pushed(server)[1]


def test_a_namespace_of_others_is_refused(server, workdir):
    with pytest.raises(ConnectionError, match=r"hf://others/student: the hub refuses access \(status 403\)"):
        push.push(settings(push="hf://others/student"), str(workdir))


@pytest.mark.slow
def test_a_finished_run_is_uploaded_by_the_same_command(server, tmp_path, data_dir, monkeypatch, capsys):
    config, workdir = smoke("forward_kl", data_dir), tmp_path / "run"
    train.train(config, str(workdir), quiet=True)
    config.push = "hf://org/student"
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
            train.train(config, str(workdir), quiet=True)
    train.train(config, str(workdir))
    assert f"uploaded the student to {server.url}/org/student\n" in capsys.readouterr().out
    _, files = pushed(server)
    assert files["model.safetensors"] == (workdir / "student" / "model.safetensors").read_bytes()
    assert b"## Command" in files["README.md"]
