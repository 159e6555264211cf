"""Training a part of the student: gradients, meshes, microbatches, restarts, checkpoints, exports, and bad input."""

import dataclasses
import itertools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from kd_jax import models, sharding, train
from kd_jax.evaluate import __main__ as evaluation
from kd_jax.evaluate.arguments import parse
from kd_jax.models import lora, peft, trained
from kd_jax.objectives import make_terms
from kd_jax.train_step import init_state, make_train_step
from tests.helpers.runs import AT_WORK, assert_same_run, last_state, smoke, until
from tests.helpers.steps import STUDENT as TIED
from tests.helpers.steps import TEACHER, TERM, V, batch

STUDENT = models.from_config(dataclasses.replace(TIED.config, tie_embeddings=False))
TERMS = make_terms({"distil": TERM, "labels": TERM | {"kind": "hard_labels", "coefficient": 0.1}})
TX = optax.sgd(0.1)
LORA = dict(student__lora__rank=4)


def low_rank(*targets, dropout=0.0):
    return models.Lora(2, 3.0, dropout, False, trained.find_targets(targets, STUDENT))


def divided(part, mesh=None):
    """Returns the trained arrays, all different from 0, and the frozen parameters."""
    mesh = mesh or sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    place = lambda tree: jax.device_put(tree, sharding.tree_shardings(mesh, tree))
    params = STUDENT.init(jax.random.key(0))
    frozen = trained.select(params, part.is_frozen)
    if isinstance(part, models.Chosen):
        return place(trained.select(params, lambda name: not part.is_frozen(name))), place(frozen)
    arrays = part.init(jax.random.key(2), STUDENT)
    noise = lambda path, x: x + 0.1 * jnp.cos(jnp.arange(x.size) + len(path)).reshape(x.shape)
    return place(jax.tree.map_with_path(noise, arrays)), place(frozen)


def run(part, mesh=None, microbatches=1, steps=3, terms=TERMS):
    mesh = mesh or sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    arrays, frozen = divided(part, mesh)
    teacher_params = TEACHER.init(jax.random.key(1), lambda tree: sharding.tree_shardings(mesh, tree))
    state = init_state(arrays, TX, terms, jax.random.key(0))
    state = jax.device_put(state, sharding.tree_shardings(mesh, state))
    step = jax.jit(
        make_train_step(
            STUDENT, TEACHER, terms, TX, vocab_size=V, microbatches=microbatches, chunk=2, mesh=mesh, part=part
        )
    )
    losses = []
    for i in range(steps):
        frozen_params = {"teacher": teacher_params, "student": frozen}
        state, metrics = step(state, frozen_params, sharding.put_batch(mesh, batch(i)))
        losses.append(float(metrics["loss"][0]))
    return np.array(losses), jax.device_get(state.params)


def full_step(params):
    """Returns the parameters after one step that trains all of them."""
    state = init_state(params, TX, TERMS, jax.random.key(0))
    step = jax.jit(make_train_step(STUDENT, TEACHER, TERMS, TX, vocab_size=V, chunk=2))
    return step(state, TEACHER.init(jax.random.key(1)), batch(0))[0].params


def same(found, expected):
    np.testing.assert_allclose(found[0], expected[0], rtol=2e-5)
    for ours, theirs in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=2e-6)


def test_factors_have_the_gradients_that_follow_from_those_of_the_matrices():
    part = low_rank("all-linear", "lm_head", "embed_tokens")
    arrays, frozen = divided(part)
    merged = jax.tree.map(
        lora.merged, part.join(arrays, frozen), is_leaf=lambda leaf: isinstance(leaf, lora.FrozenMatrix)
    )
    gradient = jax.tree.map(lambda new, old: (old - new) / 0.1, full_step(merged), merged)
    gradient, factors = flatten_dict(gradient, sep="/"), flatten_dict(arrays, sep="/")
    found = flatten_dict(run(part, steps=1)[1], sep="/")
    assert len(part.owners) == 9
    for path in part.owners:
        a, b = (np.asarray(factors[f"{path}/lora_{name}"]) for name in "ab")
        expected = {"a": part.scale * gradient[path] @ b.T, "b": part.scale * a.T @ gradient[path]}
        for name, values in expected.items():
            moved = (factors[f"{path}/lora_{name}"] - found[f"{path}/lora_{name}"]) / 0.1
            np.testing.assert_allclose(moved, values, rtol=2e-3, atol=2e-6 + 1e-3 * np.abs(values).max())


@pytest.mark.parametrize("pattern", ["head/kernel|embed/.*", "layers/*"])
def test_parameters_that_are_not_frozen_move_as_in_full_training(pattern):
    part = models.Chosen.of(pattern, STUDENT)
    expected = flatten_dict(full_step(STUDENT.init(jax.random.key(0))), sep="/")
    found = flatten_dict(run(part, steps=1)[1], sep="/")
    assert found.keys() == expected.keys() - part.frozen
    for name, values in found.items():
        np.testing.assert_allclose(values, expected[name], atol=1e-6)


def test_a_frozen_output_matrix_costs_no_product():
    arrays = {"hidden": jnp.zeros((8, 6, 16)), "head": jnp.zeros((16, V))}

    def products(part):
        step = make_train_step(STUDENT, None, TERMS[1:], TX, vocab_size=V, chunk=48, part=part)
        trains, frozen = divided(part) if part else (STUDENT.init(jax.random.key(0)), None)
        state = init_state(trains, TX, TERMS[1:], jax.random.key(0))
        text = jax.jit(step).lower(state, {"student": frozen}, batch(0)).compile().as_text()
        # The gradient of the head is the product [D, tokens] [tokens, V].
        return len(re.findall(rf"f32\[{arrays['hidden'].shape[-1]},{V}\]\S* (?:dot|custom-call)\(", text))

    assert products(None) > 0 and products(models.Chosen.of("embed.*", STUDENT)) == products(None)
    assert products(low_rank("all-linear")) == products(models.Chosen.of("head.*", STUDENT)) == 0


DROPPED = low_rank("all-linear", dropout=0.3)


@pytest.fixture(scope="module")
def reference():
    return run(DROPPED)


def test_dropout_depends_on_the_step(reference):
    assert not np.allclose(reference[0], run(low_rank("all-linear"))[0], rtol=1e-4)
    same(run(DROPPED), reference)


@pytest.mark.parametrize(("sizes", "microbatches"), [((1, 1, 1), 4), ((8, 1, 1), 1), ((2, 2, 2), 2)])
def test_any_mesh_and_any_microbatches_give_the_same_numbers_with_dropout(sizes, microbatches, reference):
    devices = jax.devices()[: np.prod(sizes)]
    same(run(DROPPED, sharding.make_mesh(*sizes, devices=devices), microbatches), reference)


@pytest.mark.slow
def test_any_mesh_gives_the_same_numbers_with_all_targets_and_with_frozen_parameters():
    for part in (low_rank("all-linear", "lm_head", "embed_tokens"), models.Chosen.of("layers/*", STUDENT)):
        one = run(part)
        same(run(part, sharding.make_mesh(2, 2, 2)), one)
        same(run(part, sharding.make_mesh(1, 4, 2), microbatches=2), one)


# --- runs


class Interrupted(Exception):
    pass


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a base model, which a test may change."""
    folder = tmp_path_factory.mktemp("base") / "model"
    shutil.copytree(models.folder("package:docstrings_teacher"), folder)
    return folder


@pytest.fixture(scope="module")
def one(base, data_dir, tmp_path_factory):
    """The config and the folder of a run with LoRA, dropout and a base in int8, and the text it printed."""
    changes = dict(student__init="pretrained", student__path=str(base), student__frozen_weights="int8")
    changes |= dict(steps=5, checkpoint_every=2, eval_every=5, keep_checkpoints=3, microbatches=2)
    changes |= LORA | dict(student__lora__dropout=0.1, student__frozen_dtype="bfloat16")
    make = lambda **more: smoke("taid", data_dir, **changes | more)
    folder = tmp_path_factory.mktemp("lora") / "run"
    train.train(make(), str(folder), quiet=True)
    return make, folder


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_a_stopped_run_with_lora_goes_on_bit_for_bit(one, tmp_path):
    make, whole = one
    parts = until(2, whole, tmp_path / "parts")
    train.train(make(), str(parts), quiet=True)
    assert_same_run(whole, parts)


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_a_checkpoint_has_the_factors_and_not_the_base(one):
    make, folder = one
    built = train.build(make())
    factors = jax.tree.leaves(built.abstract_state.params)
    assert len(factors) == 2 * 7 * built.models.student.config.num_layers
    arrays = last_state(folder)[1]
    # Adam has two moments of each factor, and a count; further, there are the scalars of the state.
    assert sum(array.size for array in arrays if array.ndim > 1) == 3 * sum(leaf.size for leaf in factors)
    largest = max(leaf.size for leaf in jax.tree.leaves(built.models.student.abstract_params()))
    assert max(array.size for array in arrays) < largest / 10


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_the_exported_student_is_the_base_with_the_exported_adapter(one, base):
    make, folder = one
    student, params = models.load_pretrained(folder / "student")
    model, frozen = models.load_pretrained(base, dtype="bfloat16", matrices_in_int8=True)
    adapter = peft.open_adapter(folder / "adapter", student, str(base), "k")
    assert adapter.lora.rank == 4 and adapter.lora.alpha == 16 and adapter.lora.dropout == 0.1
    tokens = jnp.arange(5, 29).reshape(2, 12)
    expected = student.logits(adapter.lora.join(adapter.read(), frozen), tokens)
    found = student.logits(params, tokens)
    assert jnp.abs(found - expected).max() < 1e-4 * jnp.std(expected)
    assert jnp.abs(found - student.logits(frozen, tokens)).max() > 1e-4 * jnp.std(expected)
    assert json.loads((folder / "student" / "config.json").read_text())["torch_dtype"] == "float32"


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_a_run_continues_from_an_adapter(one, tmp_path):
    make, folder = one
    config = make(student__lora__path=str(folder / "adapter"), student__lora__rank=0)
    state = train.build(config).init_state()
    expected = peft.open_adapter(
        folder / "adapter", models.load_pretrained(folder / "student")[0], "", "student.lora.path"
    ).read()  # fmt: skip
    for ours, theirs in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for key, value in dict(rank=8, alpha=2.0, scaling="root", targets=("q_proj",)).items():
        with pytest.raises(ValueError, match=f"student.lora.{key}=.*adapter"):
            train.build(make(student__lora__path=str(folder / "adapter"), **{f"student__lora__{key}": value}))


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_a_resumed_run_refuses_another_base(one, base, tmp_path):
    make, whole = one
    parts, file = until(2, whole, tmp_path / "parts"), base / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-4] + b"\0\0\0\0")
    try:
        with pytest.raises(ValueError, match=re.escape(f"student.path={base} has other content")):
            train.train(make(), str(parts), quiet=True)
    finally:
        file.write_bytes(content)


@pytest.mark.usefixtures("one_device")
def test_the_student_of_a_run_with_lora_is_its_own_teacher(data_dir):
    built = train.build(smoke("opsd", data_dir, teacher__follow=0.5, **LORA))
    state = built.init_state()
    before = built.teacher_params(state)
    np.testing.assert_array_equal(before["embed"]["embedding"], built.models.trainee.frozen["embed"]["embedding"])
    state, _ = built.train_step(state, built.models.frozen_params, built.batch(0, state.params))
    followed, student = state.opt_state.followers["teacher"], state.params
    assert jax.tree.structure(followed) == jax.tree.structure(student)
    factor = lambda tree: tree["layers"]["0"]["mlp"]["up"]["kernel"]["lora_b"]
    np.testing.assert_allclose(factor(followed), factor(student) / 2, rtol=1e-5)  # the start is 0
    values = built.evaluate(state.params, built.teacher_params(state))
    assert 0 < values["forward_kl"]


BAD = [
    (dict(student__lora__rank=4, student__lora__targets=("c_attn",)), "c_attn.*self_attn.q_proj"),
    (dict(student__lora__rank=4, student__freeze="embed.*"), "student.freeze.*student.lora"),
    (dict(student__lora__alpha=8.0), "student.lora.alpha=8.0 has no effect"),
    (dict(student__frozen_weights="int8"), "no parameter of the student is frozen"),
    (dict(student__freeze="wte"), "student.freeze='wte' matches no parameter.*embed/embedding"),
    (dict(student__lora__rank=4, student__lora__dropout=1.0), "below 1"),
    (dict(student__lora__rank=4, student__lora__targets=("lm_head",)), "tied|matches"),
    (dict(student__lora__path="nowhere"), "nowhere"),
]


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_input_is_refused_before_anything_is_written(changes, message, data_dir, tmp_path):
    config = smoke("sft", data_dir, **changes)
    with pytest.raises(ValueError, match=message):
        train.train(config, str(tmp_path / "run"), quiet=True)
    assert not (tmp_path / "run").exists()


def distilled(config):
    """Trains and returns the evaluations before and after training."""
    built = train.build(config)
    state = built.init_state()
    before = built.evaluate(state.params)
    for step in range(config.steps):
        state, _ = built.train_step(state, built.models.frozen_params, built.batch(step, state.params))
    return before, built.evaluate(state.params, built.teacher_params(state))


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("method", ["taid", "distillm", "gkd", "sdft"])
@pytest.mark.parametrize("changes", [LORA, dict(student__freeze="layers/0/attention/.*")])
def test_a_part_of_the_student_comes_nearer_to_the_teacher(method, changes, data_dir):
    if changes is LORA and method != "sdft":  # few factors cannot train a model that begins with random matrices
        changes = LORA | dict(student__init="layers", student__layers=(0,))
    config = smoke(method, data_dir, steps=40, data__eval_rows=32, **AT_WORK.get(method, {}) | changes)
    before, after = distilled(config)
    assert after["forward_kl"] + after["reverse_kl"] < before["forward_kl"] + before["reverse_kl"] - 0.02


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("method", ["distillm", "opsd"])
def test_stopped_on_policy_runs_go_on_bit_for_bit(method, data_dir, tmp_path, monkeypatch):
    changes = dict(steps=5, checkpoint_every=2, eval_every=5, log_every=1, student__lora__dropout=0.1) | LORA
    changes |= AT_WORK.get(method, {}) | (dict(teacher__follow=0.1) if method == "opsd" else {})
    train.train(smoke(method, data_dir, **changes), str(tmp_path / "whole"), quiet=True)
    put, calls = train.Run.put, itertools.count()

    def stop(run, batch):
        if next(calls) == 3:
            raise Interrupted
        return put(run, batch)

    monkeypatch.setattr(train.Run, "put", stop)
    with pytest.raises(Interrupted):
        train.train(smoke(method, data_dir, **changes), str(tmp_path / "parts"), quiet=True)
    train.train(smoke(method, data_dir, **changes), str(tmp_path / "parts"), quiet=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_the_evaluation_of_a_work_directory_reads_the_merged_student(one, tmp_path):
    _, folder = one
    arguments = [f"--model={folder}", f"--out={tmp_path / 'out'}", "--split=validation", "--rows=4", "--seeds=1"]
    found = evaluation.run(parse([*arguments, "--max_new_tokens=4"]))
    assert np.isfinite(found["given"]["cross_entropy"])
