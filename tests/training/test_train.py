"""Complete runs of a few steps: every config works, a stopped run continues unchanged, and bad input stops early."""

import json
import shutil

import jax
import numpy as np
import pytest

from kd_jax import data, metrics, models, train
from kd_jax.data.options import dataset_options
from kd_jax.settings import Settings
from kd_jax.storage import directory
from tests.helpers.runs import ACROSS_TOKENIZERS, AT_WORK, METHODS, configured, last_state, smoke

pytestmark = pytest.mark.usefixtures("one_device")


def training(workdir):
    """Returns the metrics of a run, except the speed."""
    return [line for line in metrics.read(workdir) if line["split"] != "speed"]


# The other methods are slow tests: a config that differs from one of these in the divergence, and seqkd, which writes text.
QUICK = {
    "sft",
    "forward_kl",
    "taid",
    "amid",
    "gkd",
    "opd",
    "distillm",
    "distillm2",
    "eopd",
    "adakd",
    "gopd",
    "sdpo",
}


@pytest.mark.parametrize(
    "method", [pytest.param(method, marks=[] if method in QUICK else [pytest.mark.slow]) for method in METHODS]
)
def test_every_config_takes_two_steps(method, data_dir):
    run = train.build(smoke(method, data_dir, **AT_WORK.get(method, {})))
    state = run.init_state()
    before = jax.device_get(state.params)
    for _ in range(2):
        state, sums = run.train_step(state, run.models.frozen_params, run.batch(int(state.step), state.params))
        values = metrics.averages(jax.device_get(sums))
        assert np.isfinite(values["loss"]) and values["gradient_norm"] > 0
    moved = [np.any(a != b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(state.params), strict=True)]
    assert int(state.step) == 2 and all(moved)
    assert set(run.config.objective.terms) == {term.name for term in run.terms}


# Forty steps of the smoke setting from random parameters are not enough for these methods. distillm needs student rows
# from the first step, seqkd enough complete responses of the teacher, and policy gradients a student that writes useful
# text.
POLICY_GRADIENTS = ("opd", "vopd", "gopd", "iw_opd", "fire_opd")
FAVOURED = {
    "distillm": dict(prefixes__threshold=0.5),
    "seqkd": dict(steps=60, sampling__max_new_tokens=32, data__max_length=64, data__batch_size=16),
} | {method: dict(student__init="pretrained", data__batch_size=32) for method in POLICY_GRADIENTS}
# At this size most rewards are negative. FiRe-OPD's gate drops the rows with the lowest log p, and the gradient then pushes
# the student away from the better rows: KL(q || p) goes from 3.65 to 3.98 in 160 steps.
FAVOURED["fire_opd"] |= dict(objective__terms__distil__row_gate__fraction=0.0)


def distilled(config):
    """Trains and returns the run, the parameters, and the evaluations before and after training."""
    run = train.build(config)
    state = run.init_state()
    before = run.evaluate(state.params)
    for step in range(config.steps):
        state, _ = run.train_step(state, run.models.frozen_params, run.batch(step, state.params))
    return run, state.params, before, run.evaluate(state.params)


@pytest.mark.slow
def test_sdpo_comes_nearer_to_the_average_that_sees_a_rollout(data_dir):
    """Held-out rows have no rollouts, so the loss of the training rows is compared."""
    run = train.build(smoke("sdpo", data_dir, steps=40, **AT_WORK["sdpo"]))
    state, losses = run.init_state(), []
    for step in range(40):
        state, sums = run.train_step(state, run.models.frozen_params, run.batch(step, state.params))
        losses.append(float(sums["loss"][0]))
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])


@pytest.mark.slow
@pytest.mark.parametrize("method", [method for method in METHODS if method not in ("sdpo", *ACROSS_TOKENIZERS)])
def test_every_method_brings_the_student_nearer_to_the_teacher(method, data_dir, tmp_path):
    config = smoke(method, data_dir, **dict(steps=40, data__eval_rows=32) | FAVOURED.get(method, {}))
    if config.student.init == "pretrained" and config.teacher.path != "student":
        run, params, *_ = distilled(smoke("forward_kl", data_dir, steps=150))
        config.student.path = str(tmp_path / "start")
        models.save_pretrained(tmp_path / "start", run.models.student, params, run.tokenizer)
    # A policy gradient lowers only KL(q || p). For this initial student, KL(p || q) rises in return.
    measures = ("reverse_kl",) if method in POLICY_GRADIENTS else ("forward_kl", "reverse_kl")
    _, _, before, after = distilled(config)
    assert sum(after[name] for name in measures) < sum(before[name] for name in measures) - 0.02


def test_a_run_leaves_what_it_promises(tmp_path, data_dir, capsys):
    options = dict(steps=3, eval_every=2, checkpoint_every=2, log_every=2)
    config = smoke("forward_kl", data_dir, eval_prompts=5, **options)
    result = train.train(config, str(tmp_path / "run"))
    folder = tmp_path / "run"
    lines = metrics.read(folder)
    assert [line["step"] for line in lines if line["split"] == "train"] == [1, 2, 3]
    assert [line["step"] for line in lines if line["split"] == "eval"] == [0, 2, 3]
    assert set(result) == {"teacher", "before", "after", "by_place"}
    assert {"forward_kl", "top1_agreement", "perplexity", "rouge_l", "own_reverse_kl"} < set(result["after"])
    assert {"rouge_l", "own_entropy"} < set(result["teacher"]) and "own_forward_kl" not in result["teacher"]
    for name in (
        "losses.png",
        "evaluation.png",
        "samples.md",
        "table.md",
        "config.json",
        "tensorboard",
        "report.html",
        "result.json",
    ):
        assert (folder / name).exists(), name
    assert all(line["tokens_per_second"] > 0 for line in lines if line["split"] == "speed")
    assert (folder / "samples.md").read_text().count("**student after**") == 5
    printed = capsys.readouterr().out
    assert "student after" in printed and "parameters" in printed

    # The student is a Hugging Face folder with a tokenizer and the parameters of the last checkpoint.
    model, params = models.load_pretrained(folder / "student")
    assert data.Tokenizer.load(folder / "student").vocab_size == model.config.vocab_size
    step, leaves = last_state(folder)
    assert step == 3
    for leaf in jax.tree.leaves(params):
        assert any(leaf.shape == saved.shape and np.array_equal(leaf, saved) for saved in leaves)


@pytest.mark.slow
def test_a_finished_run_can_be_called_again(tmp_path, data_dir, capsys):
    options = dict(steps=3, eval_every=2, checkpoint_every=2, log_every=2)
    config, folder = smoke("forward_kl", data_dir, eval_prompts=5, **options), tmp_path / "run"
    result = train.train(config, str(folder), quiet=True)
    lines = metrics.read(folder)
    capsys.readouterr()
    assert train.train(config, str(folder), quiet=True) == result  # no step remains
    assert capsys.readouterr().out == ""
    assert len(metrics.read(folder)) == len(lines)
    rows = [json.loads(line) for line in (folder / "generations.jsonl").read_text().splitlines()]
    assert len(rows) == config.data.eval_batch_size and set(rows[0]) == {
        "prompt", "references", "teacher", "before", "after"
    }  # fmt: skip
    assert [row["before"]["response"] for row in rows] != [row["after"]["response"] for row in rows]
    (folder / "generations_before.jsonl").unlink()  # as in a run of an older version
    train.train(config, str(folder), quiet=True)
    rows = [json.loads(line) for line in (folder / "generations.jsonl").read_text().splitlines()]
    assert set(rows[0]) == {"prompt", "references", "teacher", "after"}

    other = smoke("forward_kl", data_dir, eval_prompts=5, seed=7, **options)
    with pytest.raises(ValueError, match="belongs to another config") as error:
        train.train(other, str(folder), quiet=True)
    assert "seed: 0 in the work directory, 7 now" in str(error.value)


@pytest.mark.slow
def test_a_profile_is_written_for_the_steps_that_are_named(tmp_path, data_dir):
    train.train(smoke("forward_kl", data_dir, profile_steps=(1, 2)), str(tmp_path / "run"), quiet=True)
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(mesh__data=3), "mesh"),
        (dict(data__batch_size=6, microbatches=4), "must be a multiple of microbatches=4"),
        (dict(student__dtype="float16"), "gradients below 6e-8 become 0 in float16. Use bfloat16"),
        (
            dict(teacher__dtype="float16", student__dtype="bfloat16", attention="cudnn"),
            "student.dtype=bfloat16, and teacher",
        ),
        (dict(steps=0), "steps=0 must be at least 1"),
        (dict(data__max_length=500), "longer than the 64 positions"),
        (dict(data__max_prompt_length=48), "max_prompt_length=48 must be"),
        (dict(data__template="alpacca"), "alpaca"),
        (dict(data__name="docstring"), "docstrings"),
        (dict(data__train_split="trian"), "train"),
        (dict(data__long_prompts="keep"), "keep"),
        (dict(teacher__path=""), "teacher"),
        (dict(teacher__path="/nowhere"), "/nowhere"),
        (dict(student__init="scratch"), "random, pretrained, layers"),
        (dict(student__init="layers", student__layers=(0, 9)), "from 0 to 3"),
        (dict(student__init="layers"), "at least one layer"),
        (dict(student__init="pretrained"), "student.path"),
        (dict(student__config__num_layer=2), "num_layer"),
        (dict(student__config__vocab_size=100), "100 ids, fewer than the tokenizer's 4096"),
        (dict(objective__temperature=0.0), "temperature=0.0"),
        (dict(optimizer__name="adamx"), "adam"),
        (dict(optimizer__weight_decy=0.1), "weight_decay"),
        (dict(learning_rate__name="taid(total_steps=10)"), "a learning rate follows the step"),
        (dict(seed=-1), "seed=-1 must be at least 0"),
        (dict(learning_rate__name="cosin_decay_schedule"), "cosine_decay_schedule"),
        (dict(clip_norm=-1.0), "clip_norm"),
        (dict(objective__terms__distil__divergence__name="forward"), "forward_kl"),
        (dict(objective__terms__distil__rows="student"), "rows='student' counts no row"),
        (dict(mesh__data=2, data__eval_batch_size=3), "data.eval_batch_size=3"),
        (dict(student__remat="everything"), "everything_saveable"),
        (dict(profile_steps=(2, 9)), "profile_steps=(2, 9)"),
        (dict(data__packing="row"), "none, rows, stream"),
        (dict(eval_prompts=4, sampling__max_new_tokens=40), "do not fit into data.max_length=48"),
        (dict(loss__chunk=-5), "loss.chunk=-5 must be at least 0"),
        (dict(teacher__dtype="float3"), "teacher.dtype='float3'"),
        (dict(attention="flash"), "plain, xla, cudnn"),
        (dict(attention="cudnn"), "needs an NVIDIA GPU"),
    ],
)
def test_bad_input_is_a_paragraph_and_writes_nothing(changes, words, tmp_path, data_dir, monkeypatch):
    config = smoke("forward_kl", data_dir, **changes)
    with pytest.raises(ValueError, match=r".") as error:
        train.train(config, str(tmp_path / "run"), quiet=True)
    assert words in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_folder_with_other_files_is_not_changed(tmp_path, data_dir):
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(ValueError, match="files that belong to no run"):
        train.train(smoke("sft", data_dir), str(tmp_path), quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_other_vocabularies_are_told_apart(tmp_path, data_dir):
    own = data.Tokenizer.load(models_folder())
    config = models.ModelConfig(family="llama", vocab_size=4096, hidden_size=8, num_layers=1, num_heads=2)
    model = models.from_config(config)
    models.save_pretrained(tmp_path / "student", model, model.init(jax.random.key(0)), own)
    text = (tmp_path / "student" / "tokenizer.json").read_text()
    swapped = json.loads(text)
    vocabulary = swapped["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (tmp_path / "student" / "tokenizer.json").write_text(json.dumps(swapped))
    config = smoke("forward_kl", data_dir, student__init="pretrained", student__path=str(tmp_path / "student"))
    with pytest.raises(
        ValueError, match="the student's tokenizer .* 2 tokens differ: 'a' has id .* and id .* in the student's"
    ):
        train.build(config)
    config = smoke("forward_kl", data_dir, teacher__path=str(tmp_path / "student"))
    with pytest.raises(
        ValueError, match="the teacher's tokenizer .* 2 tokens differ: 'a' has id .* and id .* in the teacher's"
    ):
        train.build(config)


def models_folder():
    from kd_jax.models import folder

    return folder("package:docstrings_teacher")


def test_the_teachers_layers_make_a_student(data_dir):
    run = train.build(smoke("forward_kl", data_dir, student__init="layers", student__layers=(0, 3)))
    state = run.init_state()
    teacher = run.models.teacher_params["layers"]["3"]["mlp"]["up"]["kernel"]
    np.testing.assert_array_equal(state.params["layers"]["1"]["mlp"]["up"]["kernel"], teacher)
    run.train_step(state, run.models.frozen_params, run.batch(int(state.step), state.params))
    assert not teacher.is_deleted()  # the donation of the state must not delete the teacher


def tiny_folder(path, family, layers):
    """Saves a random model with the packaged tokenizer and a chat template, as the Dolly settings require."""
    own = data.Tokenizer.load(models_folder())
    config = models.ModelConfig(
        family=family, vocab_size=4096, hidden_size=8, num_layers=layers, num_heads=2, max_positions=512,
        eos_id=own.eos_id, pad_id=own.pad_id,
    )  # fmt: skip
    model = models.from_config(config)
    models.save_pretrained(path, model, model.init(jax.random.key(layers)), own)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}<{{ m.role }}> {{ m.content }}{% endfor %}<assistant> "
    (path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["dolly_smollm2", "dolly_gpt2"])
def test_the_dolly_settings_run_with_folders_of_their_families(setting, tmp_path, data_dir):
    rows = [{"instruction": f"Name {i}", "context": "", "response": f"It is {i}."} for i in range(300)]
    (tmp_path / "dolly.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = dict(data__data_dir=str(data_dir), mesh__data=1, steps=2, sample_tokens=4, data__batch_size=8)
    changes |= dict(data__eval_rows=8, data__eval_batch_size=8, data__max_length=128, data__max_prompt_length=96)
    config = configured("amid", setting, changes)
    config.data.options.path = str(tmp_path / "dolly.jsonl")
    family = "gpt2" if setting == "dolly_gpt2" else "llama"
    config.teacher.path = tiny_folder(tmp_path / "teacher", family, 2)
    if config.student.init == "pretrained":
        config.student.path = tiny_folder(tmp_path / "student", family, 1)
    else:
        assert config.student.layers == tuple(range(0, 30, 3))  # every third of the thirty layers of SmolLM2
        config.student.layers = (1,)
    result = train.train(config, str(tmp_path / "run"), quiet=True)
    assert np.isfinite(result["after"]["forward_kl"]) and result["after"] != result["before"]
    student, _ = models.load_pretrained(tmp_path / "run" / "student")
    assert student.config.family == family and student.config.num_layers == 1
    sampled = (tmp_path / "run" / "samples.md").read_text()
    assert ("### Instruction:" if setting == "dolly_gpt2" else "<assistant>") in sampled


@pytest.mark.slow
def test_a_mesh_of_eight_devices_has_the_losses_of_one(tmp_path, data_dir):
    losses = []
    for name, mesh in (("one", dict(data=1, fsdp=1, tensor=1)), ("eight", dict(data=2, fsdp=2, tensor=2))):
        changes = {f"mesh__{axis}": size for axis, size in mesh.items()}
        train.train(smoke("amid", data_dir, steps=20, **changes), str(tmp_path / name), quiet=True)
        losses.append([line["loss"] for line in metrics.read(tmp_path / name) if line["split"] == "train"])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)


def test_on_a_mesh_the_state_stays_where_it_was(data_dir):
    """Otherwise the second step, and the first step after a restart, would compile another program."""
    run = train.build(smoke("forward_kl", data_dir, mesh__data=2, mesh__fsdp=2, mesh__tensor=2))
    state = run.init_state()
    placed = [leaf.sharding for leaf in jax.tree.leaves(run.abstract_state)]
    for _ in range(2):
        assert [leaf.sharding for leaf in jax.tree.leaves(state)] == placed
        state, _ = run.train_step(state, run.models.frozen_params, run.batch(int(state.step), state.params))
    assert [leaf.sharding for leaf in jax.tree.leaves(state)] == placed


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, data_dir):
    config = smoke("forward_kl", data_dir, steps=4, learning_rate__init_value=1e38)
    with pytest.raises(FloatingPointError, match="at step"):
        train.train(config, str(tmp_path / "run"), quiet=True)


def test_a_directory_of_a_version_without_the_keys_of_a_term_has_no_difference(tmp_path):
    config = smoke("gkd", "").to_dict()
    older = smoke("gkd", "").to_dict()
    del older["members"]
    for name in ("follow", "follow_every", "follow_copy_first"):
        del older["teacher"][name]
    term = older["objective"]["terms"]["distil"]
    for name in ("between", "weights", "vocabulary", "entry_clip", "logits", "temperature", "teacher_temperature"):
        del term[name]
    for name in ("temperature_squared", "tokens", "row_gate"):
        del term[name]
    del term["policy"]["reward"], term["policy"]["members"]
    directory.write_config(str(tmp_path), older)
    assert directory.config_difference(str(tmp_path), config) == []
    config["objective"]["terms"]["distil"]["entry_clip"] = 0.1
    assert directory.config_difference(str(tmp_path), config) != []


def test_config_difference_reads_tuples_and_absent_keys(tmp_path):
    assert directory.config_difference(str(tmp_path), {}) is None
    directory.write_config(str(tmp_path), {"a": {"b": (1, 2)}, "c": 1})
    assert directory.config_difference(str(tmp_path), {"a": {"b": (1, 2)}, "c": 1}) == []
    assert directory.config_difference(str(tmp_path), {"a": {"b": (1, 3)}}) == [
        "a.b: [1, 2] in the work directory, [1, 3] now",
        "c: 1 in the work directory, '(absent)' now",
    ]


def test_a_settings_dataset_options_go_when_the_dataset_changes(tmp_path, data_dir):
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps({"q": f"{i}?", "a": f"{i}."}) + "\n" for i in range(40)))
    own = dict(path=str(tmp_path / "mine.jsonl"), prompt_field="q", response_field="a")
    config = smoke("minillm", data_dir, data__name="jsonl", text__name="docstrings")
    config.data.options = own
    smokes = dict(packages=("optax", "flax"), standard_library=False)
    assert dataset_options(Settings.read(config)) == own and dataset_options(Settings.read(config), "text") == smokes
    config.text.options.packages = ("optax",)
    assert dataset_options(Settings.read(config), "text") == smokes | dict(packages=("optax",))
    config.text.name = "jsonl"
    config.text.options = {}
    assert dataset_options(Settings.read(config), "text") == own, "those of data, for the same dataset"
    config = smoke("forward_kl", data_dir, data__name="jsonl")
    config.data.options = own
    run = train.build(config)
    assert sum(counts["kept"] for counts in run.counts.values()) == 40
    assert dataset_options(Settings.read(smoke("sft", data_dir))) == smokes
    config.data.defaults.docstring = {}
    with pytest.raises(ValueError, match="the dataset 'docstring' .did you mean 'docstrings'"):
        dataset_options(Settings.read(config))


def test_a_directory_of_a_version_without_a_key_is_the_runs_where_the_key_changes_nothing(tmp_path):
    for setting, differing in (("docstrings", []), ("smoke", ["data.options"])):
        config = configured("sft", setting, {}).to_dict()
        old = json.loads(json.dumps(config))
        del old["data"]["defaults"]
        for written, now in ((old, config), ({"base": old}, {"base": config})):
            directory.write_config(str(tmp_path / setting), written)
            lines = directory.config_difference(str(tmp_path / setting), now)
            assert [line.partition(":")[0].removeprefix("base.") for line in lines][:1] == differing


@pytest.mark.slow
def test_a_window_that_rows_exceed_is_computed_and_kept(tmp_path, data_dir):
    teacher = shutil.copytree(models_folder(), tmp_path / "teacher")
    fields = json.loads((teacher / "config.json").read_text())
    fields |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 16}
    (teacher / "config.json").write_text(json.dumps(fields))
    changes = dict(teacher__path=str(teacher), student__init="layers", student__layers=(0, 3), steps=1)
    config = smoke("gkd", data_dir, **changes)
    assert config.data.max_length > 16
    train.train(config, str(tmp_path / "run"), quiet=True)
    student = models.load_config(tmp_path / "run" / "student")
    assert student.sliding_window == 16
    assert json.loads((tmp_path / "run" / "student" / "config.json").read_text())["model_type"] == "mistral"


@pytest.mark.slow
def test_a_teacher_may_be_in_float16(data_dir):
    run = train.build(smoke("forward_kl", data_dir, teacher__dtype="float16"))
    state = run.init_state()
    _, sums = run.train_step(state, run.models.frozen_params, run.batch(0, state.params))
    assert {leaf.dtype for leaf in jax.tree.leaves(run.models.teacher_params)} == {np.dtype("float16")}
    exact = train.build(smoke("forward_kl", data_dir))
    state = exact.init_state()
    _, expected = exact.train_step(state, exact.models.teacher_params, exact.batch(0, state.params))
    np.testing.assert_allclose(sums["loss"][0], expected["loss"][0], rtol=1e-3)
