"""Paths that are not the folder of a model: the error of every command says what the path is instead."""

import json
import shutil

import pytest

from kd_jax import cache_teacher, models, train
from kd_jax.data import Tokenizer, jsonl, load
from kd_jax.evaluate import __main__ as evaluate
from kd_jax.evaluate.arguments import parse
from kd_jax.models import folder
from tests.helpers.runs import smoke

SETTINGS = ("teacher.path", "student.path", "tokenizer.path", "--model", "--teacher", "cache_teacher")
MODEL_SETTINGS = tuple(key for key in SETTINGS if key != "tokenizer.path")
TEACHER = folder("package:docstrings_teacher")

pytestmark = pytest.mark.usefixtures("one_device")


def give(key, path, data_dir):
    """Starts the command that has the setting `key`, with `path` as the value."""
    if key.startswith("--"):
        paths = {"--model": "package:docstrings_teacher", key: path}
        options = [
            "--data=docstrings",
            f"--out={data_dir}/never",
            *(f"{name}={value}" for name, value in paths.items()),
        ]
        evaluate.load(evaluate.filled(parse(options))[0])
    elif key == "cache_teacher":
        config = smoke("forward_kl", data_dir, teacher__path=str(path), tokenizer__path="")
        cache_teacher.write(config, f"{data_dir}/never", "hidden")
    else:
        changes = {key.replace(".", "__"): str(path)}
        changes |= {"teacher.path": {"tokenizer__path": ""}, "student.path": {"student__init": "pretrained"}}.get(
            key, {}
        )
        train.build(smoke("forward_kl", data_dir, **changes))


@pytest.fixture
def refused(data_dir):
    """A function that returns the error message for a setting with a given path."""

    def message(key, path):
        with pytest.raises(ValueError) as error:
            give(key, path, data_dir)
        assert not (data_dir / "never").exists()
        return str(error.value)

    return message


@pytest.mark.parametrize("key", SETTINGS)
def test_a_folder_that_does_not_exist(key, refused, tmp_path, monkeypatch):
    name = {"cache_teacher": "teacher.path"}.get(key, key)
    message = refused(key, tmp_path / "nowhere")
    assert message == f"{name}: the folder {tmp_path}/nowhere does not exist."
    monkeypatch.chdir(tmp_path)
    message = refused(key, "HuggingFaceTB/SmolLM2-135M")
    assert message.startswith(f"{name}: the folder HuggingFaceTB/SmolLM2-135M does not exist. If this is a name on")
    assert message.endswith(" the Hugging Face hub, write hf://HuggingFaceTB/SmolLM2-135M.")
    assert message.count(".json") == 0
    (tmp_path / "models").mkdir()
    assert refused(key, "models/mine") == f"{name}: the folder models/mine does not exist."  # not a name on the hub
    (tmp_path / "weights").write_text("")
    assert f"{name}: {tmp_path}/weights is a file; expected the folder" in refused(key, tmp_path / "weights")


@pytest.mark.parametrize("key", SETTINGS)
def test_an_unknown_package_gets_the_known_names(key, refused):
    message = refused(key, "package:docstring_teacher")
    assert message == (
        "package:docstring_teacher: kd_jax has no model 'docstring_teacher'; the models are package:docstrings_teacher."
    )


@pytest.mark.parametrize("key", MODEL_SETTINGS)
def test_an_adapter_a_work_directory_and_a_folder_without_a_model(key, refused, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/base"}')
    message = refused(key, adapter)
    assert f"{adapter}: this is the folder of a LoRA adapter for 'org/base' (adapter_config.json)" in message
    assert "Merge the adapter into its base model first" in message and "tokenizer.json" not in message

    both = shutil.copytree(TEACHER, tmp_path / "both")
    shutil.copy(adapter / "adapter_config.json", both)
    assert f"{both}: beside config.json the folder has adapter_config.json, of a LoRA adapter" in refused(key, both)

    bare = tmp_path / "bare"
    bare.mkdir()
    assert f"{bare}: the folder has no config.json; expected a Hugging Face folder" in refused(key, bare)
    (bare / "snapshots").mkdir()
    assert "give one of the folders in snapshots" in refused(key, bare)

    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"steps": 3}))
    message = refused(key, run)
    assert (
        f"{run}: this is the work directory of a run, not the folder of a model; {run}/student appears when" in message
    )


@pytest.mark.parametrize("key", MODEL_SETTINGS)
def test_the_family_is_looked_at_before_the_tokenizer(key, refused, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "mamba"}')
    assert f"{other}/config.json: model_type 'mamba' is not supported" in refused(key, other)
    shutil.copy(TEACHER / "config.json", other)
    assert f"{other} has no tokenizer.json" in refused(key, other)


LFS = (
    "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daa\nsize 16\n"
)


@pytest.mark.parametrize("key", MODEL_SETTINGS)
def test_pointers_of_git_lfs_are_named(key, refused, tmp_path):
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        pointed = shutil.copytree(TEACHER, tmp_path / name)
        (pointed / name).write_text(LFS)
        message = refused(key, pointed)
        assert message.startswith(f"{pointed}/{name}: this is a Git LFS pointer") and "`git lfs pull`" in message


def test_pointers_of_git_lfs_are_named_by_the_library_and_among_data(tmp_path, data_dir):
    pointed = shutil.copytree(TEACHER, tmp_path / "pointed")
    (pointed / "model.safetensors").write_text(LFS)
    with pytest.raises(ValueError, match=r"pointed/model\.safetensors: this is a Git LFS pointer"):
        models.load_pretrained(pointed)
    for name, kind in {"rows.jsonl": "jsonl", "rows.jsonl.gz": "jsonl", "book.txt": "text"}.items():
        (tmp_path / name).write_text(LFS)
        with pytest.raises(ValueError, match=rf"{name}: this is a Git LFS pointer"):
            load(kind, split="train", data_dir=data_dir, path=str(tmp_path / name))
    with pytest.raises(ValueError, match=r"rows\.jsonl: this is a Git LFS pointer"):
        list(jsonl.read_references(tmp_path / "rows.jsonl", {"prompt": "prompt"}))


def test_the_library_says_the_same_without_a_setting(tmp_path):
    for read in (models.load_config, models.load_pretrained, Tokenizer.load):
        with pytest.raises(ValueError, match=rf"^the folder {tmp_path}/nowhere does not exist\.$"):
            read(tmp_path / "nowhere")
