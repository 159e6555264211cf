"""Models and datasets of the Hugging Face hub, from a server on the loopback address."""

import concurrent.futures
import json
import os
import shutil
import subprocess
import sys

import huggingface_hub.constants as constants
import jax
import numpy as np
import pytest

from kd_jax import data, metrics, models, train
from kd_jax.evaluate import __main__ as evaluate_command
from kd_jax.evaluate import arguments as evaluate_arguments
from kd_jax.evaluate import of_run
from kd_jax.run import hub_names, identity
from kd_jax.settings import Settings
from kd_jax.storage import directory, hub, remote
from tests.helpers import hub_server
from tests.helpers.commands import environment, free_port
from tests.helpers.paths import ROOT, TINY
from tests.helpers.runs import smoke

pytestmark = pytest.mark.usefixtures("one_device")
LLAMA = TINY / "llama"
NOWHERE = "http://127.0.0.1:9"
ROWS = b"".join(json.dumps({"prompt": f"p{i}", "response": f"r{i}"}).encode() + b"\n" for i in range(20))


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A server that this process uses, with a cache of its own."""
    with hub_server.running() as running:
        hub_server.use(monkeypatch, running, tmp_path / "hf")
        yield running


def offline(monkeypatch):
    """Makes the process forget all commits, and sets an address at which no server is."""
    hub_server.forget(monkeypatch)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template.replace(constants.ENDPOINT, NOWHERE))
    monkeypatch.setattr(constants, "ENDPOINT", NOWHERE)


# --- addresses


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("hf://org/model", ("model", "org/model", None, "")),
        ("hf://org/model@v1.0", ("model", "org/model", "v1.0", "")),
        ("hf://org/model@refs/pr/1", ("model", "org/model", "refs/pr/1", "")),
        ("hf://datasets/org/rows", ("dataset", "org/rows", None, "")),
        ("hf://datasets/org/rows@main/a/b.jsonl", ("dataset", "org/rows", "main", "a/b.jsonl")),
        ("hf://datasets/org/rows@refs/convert/parquet/d", ("dataset", "org/rows", "refs/convert/parquet", "d")),
    ],
)
def test_the_parts_of_an_address(address, expected):
    uri = hub.parse(address)
    assert (uri.type, uri.id, uri.revision, uri.path_in_repo) == expected


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("hf://", "Empty body"),
        ("hf://gpt2", "'namespace/name', got 'gpt2'"),
        ("hf://org/model@", "Empty revision"),
        ("hf://org/mo del", "org/mo del"),
        ("hf://spaces/org/name", "names a space, and not a model or a dataset"),
        ("hf://org/model/weights", "at the root of its repository; leave out /weights"),
    ],
)
def test_a_wrong_address_names_the_right_forms(address, words):
    with pytest.raises(ValueError) as error:
        hub.parse(address)
    assert words in str(error.value) and "\n" not in str(error.value) and str(error.value).startswith(address)


def test_a_model_is_no_dataset():
    with pytest.raises(
        ValueError, match="hf://datasets/org/rows names a dataset, and not a model; write hf://ORG/NAME"
    ):
        models.folder("hf://datasets/org/rows")
    with pytest.raises(ValueError, match="hf://org/model names a model, and not a dataset"):
        remote.local_file("hf://org/model")


# --- downloads


def test_a_model_of_the_hub_is_the_model_of_the_folder(server):
    extra = {
        "README.md": b"#",
        "pytorch_model.bin": b"x",
        "consolidated.safetensors": b"x",
        "onnx/model.safetensors": b"x",
    }
    files = {path.name: path.read_bytes() for path in LLAMA.iterdir() if path.is_file()}
    server.add("org/llama", files | extra)
    (model, params), (of_folder, expected) = (models.load_pretrained(path) for path in ("hf://org/llama", LLAMA))
    assert model == of_folder
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
    asked = " ".join(server.requests)
    assert not any(name in asked for name in extra) and server.downloads("model.safetensors") == 1
    models.load_pretrained("hf://org/llama@main")
    assert server.downloads("model.safetensors") == 1 and server.downloads("config.json") == 1


def test_a_tokenizer_needs_no_weights(server):
    server.add_folder("org/teacher", models.folder("package:docstrings_teacher"))
    known = data.Tokenizer.load(models.folder("package:docstrings_teacher"))
    assert data.Tokenizer.load("hf://org/teacher").fingerprint() == known.fingerprint()
    assert server.downloads("tokenizer.json") == 1 and server.downloads("model.safetensors") == 0


def test_the_config_is_checked_before_the_weights_are_downloaded(server):
    server.add("org/bert", {"config.json": b'{"model_type": "bert"}', "model.safetensors": b"x"})
    with pytest.raises(ValueError, match="model_type 'bert' is not supported"):
        models.model_folder("hf://org/bert", "teacher.path")
    with pytest.raises(
        ValueError, match=r"hf://org/empty: the repository has none of the files of a model; .* README.md"
    ):
        server.add("org/empty", {"README.md": b"#"})
        models.model_folder("hf://org/empty", "teacher.path")
    assert server.downloads("model.safetensors") == 0


def test_a_revision_is_read_at_its_commit(server):
    first = server.add("org/rows", {"a.jsonl": b"1\n"}, kind="datasets", ref="v1")
    server.add("org/rows", {"a.jsonl": b"2\n"}, kind="datasets")
    read = lambda at: remote.local_file(f"hf://datasets/org/rows{at}/a.jsonl").read_bytes()
    assert [read(""), read("@main"), read("@v1"), read(f"@{first}")] == [b"2\n", b"2\n", b"1\n", b"1\n"]


def test_a_process_reads_a_branch_at_one_commit(server, monkeypatch):
    server.add("org/rows", {"a.jsonl": b"1\n", "b.jsonl": b"1\n"}, kind="datasets")
    assert remote.local_file("hf://datasets/org/rows/a.jsonl").read_bytes() == b"1\n"
    server.add("org/rows", {"a.jsonl": b"2\n", "b.jsonl": b"2\n"}, kind="datasets")
    assert remote.local_file("hf://datasets/org/rows/b.jsonl").read_bytes() == b"1\n"
    hub_server.forget(monkeypatch)
    assert remote.local_file("hf://datasets/org/rows/b.jsonl").read_bytes() == b"2\n"


def test_a_file_a_folder_and_a_pattern_of_a_dataset(server):
    files = {"train.jsonl": ROWS, "more/a.txt": b"a b c\n", "more/b.txt": b"d e f\n", "image.png": b"x"}
    server.add("org/rows", files, kind="datasets")
    whole = hub.data("hf://datasets/org/rows")
    assert sorted(path.name for path in whole.rglob("*") if path.is_file()) == ["a.txt", "b.txt", "train.jsonl"]
    assert sorted(path.name for path in hub.data("hf://datasets/org/rows/more").iterdir()) == ["a.txt", "b.txt"]
    texts = data.load("text", split="train", path="hf://datasets/org/rows/more/*.txt", validation_fraction=0.0)
    assert sum(len(row["response"]) for row in texts) >= 10
    with pytest.raises(ValueError, match=r"org/rows/more is a folder; name one of its files: a.txt, b.txt\."):
        remote.local_file("hf://datasets/org/rows/more")
    with pytest.raises(
        ValueError, match="has no file or folder test.jsonl; the files are train.jsonl, more/a.txt, more/b"
    ):
        remote.local_file("hf://datasets/org/rows/test.jsonl")


def test_a_dataset_may_be_a_folder_of_shards(server, tmp_path):
    files = {f"data/train-0000{i}-of-00002.jsonl": ROWS for i in range(2)} | {"data/test-00000-of-00001.jsonl": ROWS}
    server.add("org/rows", files | {"README.md": b"about"}, kind="datasets")
    for path in ("hf://datasets/org/rows", "hf://datasets/org/rows/data"):
        texts = data.load("jsonl", split="test", path=path, data_dir=tmp_path)
        assert {row["prompt"] for row in texts} == {f"p{i}" for i in range(20)}


def download(url, cache, name):
    """Downloads a model in a process of its own."""
    code = f"from kd_jax.storage import hub; print(hub.model({name!r}))"
    variables = os.environ | hub_server.environment(url, cache) | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.slow
def test_one_process_of_a_host_downloads_and_the_others_wait(server, tmp_path):
    server.add_folder("org/llama", LLAMA)
    server.delay = 0.3
    with concurrent.futures.ThreadPoolExecutor() as threads:
        calls = [threads.submit(download, server, tmp_path / "shared", "hf://org/llama") for _ in range(3)]
        folders = {call.result() for call in calls}
    assert len(folders) == 1 and server.downloads("model.safetensors") == 1


@pytest.mark.slow
def test_the_processes_of_a_run_read_one_commit(server, tmp_path, data_dir):
    """Only the first process asks for the commit, and the weights are downloaded once."""
    server.add_folder("org/teacher", models.folder("package:docstrings_teacher"))
    server.delay = 0.3
    data.load("docstrings", split="train", data_dir=str(data_dir), packages=("optax", "flax"), standard_library=False)
    changes = {"teacher__path": "hf://org/teacher", "tokenizer__path": "", "mesh__data": 2}
    spec = {"data_dir": str(data_dir), "steps": 1, "runs": {"run": ["forward_kl", changes]}}
    address = f"127.0.0.1:{free_port()}"
    variables = environment(1) | hub_server.environment(server, tmp_path / "hf")
    running = [
        subprocess.Popen(
            [
                sys.executable, "-m", "tests.helpers.processes", json.dumps(spec | {"processes": f"{address},2,{index}"}),
                str(tmp_path / str(index)),
            ],
            cwd=ROOT, env=variables, stderr=subprocess.PIPE, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    errors = [process.communicate()[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], errors
    losses = [json.loads((tmp_path / str(index)).read_text())["run"]["losses"] for index in range(2)]
    assert losses[0] == losses[1] and server.downloads("model.safetensors") == 1
    assert server.requests.count("GET /api/models/org/teacher") == 1


@pytest.mark.slow
def test_an_evaluation_reads_the_model_and_the_data_from_the_hub(server, tmp_path):
    server.add_folder("org/teacher", models.folder("package:docstrings_teacher"))
    server.add("org/rows", {"test.jsonl": ROWS}, kind="datasets")
    flags = [
        "--model=hf://org/teacher", "--data=hf://datasets/org/rows/test.jsonl", "--reference_field=response",
        "--seeds=", "--rows=8", "--batch_size=8", "--max_prompt_length=16", "--max_new_tokens=8", f"--out={tmp_path / 'out'}",
    ]  # fmt: skip
    result = evaluate_command.run(evaluate_arguments.parse(flags))
    assert result["rows"] == 8 and result["given"]["cross_entropy"] > 0
    wrong = evaluate_arguments.parse(["--model=hf://org/none", *flags[1:-1], f"--out={tmp_path / 'other'}"])
    with pytest.raises(ValueError, match="--model=hf://org/none: the hub has no model org/none"):
        evaluate_command.run(wrong)


# --- bad input, before training


def refused(config, workdir):
    """Returns the message with which a config is refused, after a check that nothing was written."""
    with pytest.raises((ValueError, ConnectionError)) as error:
        train.train(config, str(workdir), quiet=True)
    assert not workdir.exists() and "\n" not in str(error.value)
    return str(error.value)


BAD = {
    "gated": "hf://org/gated: the repository is gated. Accept the conditions on https://huggingface.co/org/gated, and log in",
    "none": "hf://org/none: the hub has no model org/none, or the repository is private.",
    "llama@v9": "hf://org/llama@v9: the repository has no revision v9.",
    "pickled": "hf://org/pickled: the repository has only pytorch_model.bin, and kd_jax reads weights in safetensors only",
    "broken": "hf://org/broken: the hub answers with an error, ",
}


KEYS = ("teacher__path", "student__path", "tokenizer__path", "members")
CASES = [(name, key) for name in BAD for key in KEYS if name != "pickled" or key in KEYS[:2]]


@pytest.mark.parametrize(("name", "key"), CASES)
def test_bad_repositories_are_one_paragraph_and_nothing_is_written(server, tmp_path, data_dir, name, key):
    server.add("org/gated", {"config.json": b"{}", "tokenizer.json": b"{}"}, gated=True)
    server.add_folder("org/llama", LLAMA)
    pickled = {"config.json": (LLAMA / "config.json").read_bytes(), "pytorch_model.bin": b"x"}
    server.add("org/pickled", pickled)
    server.fails = "org/broken"
    changes = {"student__init": "pretrained"} if key == "student__path" else {}
    config = smoke("forward_kl", data_dir, **changes)
    address = f"hf://org/{name}"
    if key == "members":
        config, given = smoke("ensemble", data_dir, members__second__path=address), "members.second.path"
    else:
        section, _, last = key.partition("__")
        config[section][last], given = address, f"{section}.{last}"
    assert refused(config, tmp_path / "run").startswith(f"{given}={BAD[name]}")


@pytest.mark.parametrize("path", ["hf://datasets/org/none/a.jsonl", "hf://datasets/org/rows/none.jsonl", "hf://rows"])
def test_bad_datasets_are_one_paragraph_and_nothing_is_written(server, tmp_path, data_dir, path):
    server.add("org/rows", {"train.jsonl": ROWS}, kind="datasets")
    config = smoke("forward_kl", data_dir, data__name="jsonl", data__options={"path": path})
    assert path in refused(config, tmp_path / "run")[: len(path) + 20]


def test_without_a_connection_the_message_says_how_to_download_before(server, tmp_path, data_dir, monkeypatch):
    offline(monkeypatch)
    config = smoke("forward_kl", data_dir, teacher__path="hf://org/llama@v1", tokenizer__path="")
    message = refused(config, tmp_path / "run")
    assert message.startswith(
        f"teacher.path=hf://org/llama@v1 is not, or not completely, in the cache {tmp_path}/hf/hub, and the hub cannot"
    )
    assert "there is no connection" in message and "`hf download org/llama --revision v1`" in message
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match=r"\(HF_HUB_OFFLINE is set\).*hf download org/rows --repo-type dataset`"):
        remote.local_file("hf://datasets/org/rows/a.jsonl")


def test_downloaded_files_need_no_connection(server, monkeypatch):
    server.add_folder("org/llama", LLAMA)
    folder = models.folder("hf://org/llama")
    offline(monkeypatch)
    assert models.folder("hf://org/llama") == folder
    models.load_pretrained("hf://org/llama")
    hub_server.forget(monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # otherwise the download would be tried several times
    (folder / "model.safetensors").resolve().unlink()
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConnectionError, match="hf://org/llama is not, or not completely, in the cache"):
        models.folder("hf://org/llama")


def test_a_gated_repository_opens_with_the_token(server, monkeypatch, tmp_path):
    server.add_folder("org/llama", LLAMA, gated=True)
    with pytest.raises(ValueError, match=r"gated.*\(no token is set now\)"):
        models.folder("hf://org/llama")
    hub_server.use(monkeypatch, server, tmp_path / "hf", hub_server.TOKEN)
    assert models.load_config("hf://org/llama") == models.load_config(LLAMA)


def test_results_are_not_written_to_the_hub(tmp_path, data_dir):
    with pytest.raises(
        ValueError, match="names a model or a dataset to read, and no place for results. Choose a folder"
    ):
        train.train(smoke("forward_kl", data_dir), "hf://org/run", quiet=True)
    with pytest.raises(ValueError, match="a teacher's cache is read from a folder"):
        train.build(smoke("forward_kl", data_dir, teacher__cache="hf://org/cache"))


# --- runs


def test_the_addresses_of_a_config_are_those_that_a_run_reads():
    config = smoke("ensemble", "", members__second__path="hf://org/second", student__path="hf://org/unused")
    config.data.defaults.dolly = {"path": "hf://datasets/org/unused/a.jsonl"}
    config.data.options = {"packages": ("hf://datasets/org/in_a_tuple",)}
    config.teacher.path, config.push = "hf://org/teacher", "hf://org/pushed"
    read = lambda: sorted(hub_names.addresses(Settings.read(config)).items())
    of_data = ("hf://datasets/org/in_a_tuple", "data.options.packages")
    of_second = ("hf://org/second", "members.second.path")
    assert read() == [of_data, of_second, ("hf://org/teacher", "teacher.path")]
    config.student.init, config.teacher.cache = "pretrained", "cache"
    assert read() == [of_data, of_second, ("hf://org/unused", "student.path")]


@pytest.fixture
def of_hub(server, data_dir):
    """The config of a run of one step whose teacher and data come from the hub."""
    server.add_folder("org/teacher", models.folder("package:docstrings_teacher"))
    server.add("org/rows", {"train.jsonl": ROWS}, kind="datasets")
    changes = dict(teacher__path="hf://org/teacher", tokenizer__path="", data__name="jsonl", steps=1)
    config = smoke("forward_kl", data_dir, **changes, data__options={"path": "hf://datasets/org/rows/train.jsonl"})
    config.data.eval_rows, config.data.batch_size, config.data.eval_batch_size = 1, 8, 8
    return config


def commits_of(server):
    kinds = {"models": "", "datasets": "datasets/"}
    split = {tuple(name.split("/", 1)): repository.refs["main"] for name, repository in server.repositories.items()}
    return {f"hf://{kinds[kind]}{name}@main": commit for (kind, name), commit in split.items()}


def test_a_run_stays_at_the_commits_that_it_has_recorded(of_hub, server, monkeypatch, tmp_path):
    settings, workdir = Settings.parse(of_hub), tmp_path / "run"
    workdir.mkdir()
    identity.write(str(workdir), settings, None)
    recorded = commits_of(server)
    assert directory.read_commits(str(workdir)) == recorded and len(recorded) == 2
    server.add("org/rows", {"train.jsonl": ROWS.replace(b"p1", b"other")}, kind="datasets")
    hub_server.forget(monkeypatch)
    identity.check(str(workdir), settings)
    assert hub_names.commits(settings) == recorded and commits_of(server) != recorded
    assert remote.local_file("hf://datasets/org/rows/train.jsonl").read_bytes() == ROWS

    hub_server.forget(monkeypatch)  # an evaluation of the run reads the recorded commits as well
    directory.write_config(str(workdir), of_hub.to_dict())
    of_run._settle({"model": str(workdir)}, of_run.config_of(str(workdir)))
    assert hub.commit("hf://datasets/org/rows") == recorded["hf://datasets/org/rows@main"]

    hub_server.forget(monkeypatch)  # a new run reads the branch
    identity.check(str(tmp_path / "new"), settings)
    assert hub_names.commits(settings) == commits_of(server)


def test_a_recorded_commit_that_no_longer_exists_is_refused(of_hub, server, monkeypatch, tmp_path):
    settings, workdir = Settings.parse(of_hub), tmp_path / "run"
    workdir.mkdir()
    identity.write(str(workdir), settings, None)
    lost = server.repositories["datasets/org/rows"].commits.popitem()[0]
    server.add("org/rows", {"train.jsonl": ROWS + ROWS}, kind="datasets")
    hub_server.use(monkeypatch, server, tmp_path / "new cache")
    with pytest.raises(
        ValueError, match=f"path=hf://datasets/org/rows/train.jsonl: the repository has no revision {lost}"
    ):
        identity.check(str(workdir), settings)


@pytest.mark.slow
def test_a_run_of_the_hub_resumes_after_a_branch_has_moved(of_hub, server, monkeypatch, capsys, tmp_path):
    workdir = tmp_path / "run"
    train.train(of_hub, str(workdir), quiet=True)
    recorded = commits_of(server)
    server.add("org/rows", {"train.jsonl": ROWS.replace(b"p1", b"other")}, kind="datasets")
    hub_server.forget(monkeypatch)
    shutil.rmtree(workdir / "student")
    train.train(of_hub, str(workdir))
    commit = recorded["hf://datasets/org/rows@main"]
    assert f"hub      hf://datasets/org/rows@main at the commit {commit[:12]}\n" in capsys.readouterr().out
    assert directory.read_commits(str(workdir)) == recorded and (workdir / "student").is_dir()
    assert [line["step"] for line in metrics.read(workdir) if line["split"] == "train"] == [1]


@pytest.mark.slow
def test_the_command_reads_the_hub_of_hf_endpoint(server, tmp_path, data_dir):
    server.add_folder("org/teacher", models.folder("package:docstrings_teacher"))
    call = [
        sys.executable, "-m", "kd_jax.main", "--config=configs/forward_kl.py:smoke", f"--workdir={tmp_path / 'run'}",
        "--config.teacher.path=hf://org/teacher", "--config.tokenizer.path=", f"--config.data.data_dir={data_dir}",
    ]  # fmt: skip
    variables = environment(1) | hub_server.environment(server, tmp_path / "hf")
    done = subprocess.run(call, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "hub      hf://org/teacher@main at the commit " in done.stdout and server.downloads("model.safetensors") == 1
    done = subprocess.run(
        [*call[:4], f"--workdir={tmp_path / 'other'}", "--config.teacher.path=hf://org/none"],
        cwd=ROOT, env=variables, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.startswith(
        "kd_jax: teacher.path=hf://org/none: the hub has no model org/none"
    )
    assert not (tmp_path / "other").exists() and "Traceback" not in done.stderr
