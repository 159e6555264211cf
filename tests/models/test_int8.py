"""A teacher in int8 and the sharding of a teacher: rounded parameters, size of the rounding, and resumed runs."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from jax.sharding import PartitionSpec as P

from kd_jax import models, sharding, train
from kd_jax.models import folder, int8
from kd_jax.prefixes import responses
from kd_jax.run import quantisation
from tests.helpers.runs import smoke

TEACHER = folder("package:docstrings_teacher")


def matrix(shape=(48, 32), seed=0):
    return jax.random.normal(jax.random.key(seed), shape) * jnp.exp(
        jax.random.normal(jax.random.key(seed + 1), shape[1])
    )


def test_every_entry_is_within_half_a_step_and_steps_differ_between_columns():
    weights = np.asarray(matrix())
    found = int8.quantise(jnp.array(weights))
    assert found.qvalue.dtype == jnp.int8 and found.scale.shape == (1, 32)
    np.testing.assert_allclose(found.scale[0], np.abs(weights).max(axis=0) / 127, rtol=1e-6)
    wrong = np.abs(weights - int8.dequantise({"kernel": found}, jnp.float32)["kernel"])
    assert np.all(wrong <= 0.5001 * np.asarray(found.scale)) and wrong.max() > 0.3 * float(found.scale.max())


def test_what_int8_can_hold_comes_back_and_so_do_columns_of_nothing():
    steps = np.random.default_rng(0).integers(-127, 128, (48, 8))
    steps[0], steps[:, 3] = 127, 0
    weights = (steps * 2.0 ** np.arange(-4, 4)).astype(np.float32)
    found = int8.quantise(jnp.array(weights))
    np.testing.assert_array_equal(found.qvalue, steps)
    np.testing.assert_allclose(qwix.dequantize(found), weights, rtol=3e-7)


def load(**options):
    return models.load_pretrained(TEACHER, **options)


def test_only_the_layers_matrices_are_rounded():
    model = load()[0]
    _, found = load(matrices_in_int8=True, dtype="bfloat16")
    leaves = jax.tree_util.tree_leaves_with_path(found, is_leaf=lambda leaf: isinstance(leaf, qwix.QArray))
    rounded = {sharding.path_name(path) for path, leaf in leaves if isinstance(leaf, qwix.QArray)}
    assert len(rounded) == 7 * model.config.num_layers and all(name.endswith("/kernel") for name in rounded)
    assert {leaf.dtype for _, leaf in leaves if not isinstance(leaf, qwix.QArray)} == {jnp.dtype("bfloat16")}


def test_matrices_are_rounded_from_what_is_on_disk_and_not_from_the_type_of_the_computation(tmp_path):
    config = models.ModelConfig(family="llama", vocab_size=32, hidden_size=16, num_layers=1, num_heads=2)
    model = models.from_config(config)
    params = model.init(jax.random.key(0))
    models.save_pretrained(tmp_path, model, params)
    found = models.load_pretrained(tmp_path, dtype="bfloat16", matrices_in_int8=True)[1]["layers"]["0"]["mlp"]["up"]
    expected = int8.quantise(params["layers"]["0"]["mlp"]["up"]["kernel"])
    np.testing.assert_array_equal(found["kernel"].qvalue, expected.qvalue)
    np.testing.assert_array_equal(found["kernel"].scale, expected.scale)


def test_a_model_in_int8_is_the_model_of_the_rounded_matrices_and_writes_what_it_would():
    model, params = load(matrices_in_int8=True)
    rounded = models.dequantise(params, jnp.float32)
    tokens = jax.random.randint(jax.random.key(0), (2, 12), 0, model.config.vocab_size)
    same = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4)
    same(model.logits(params, tokens), model.logits(rounded, tokens))
    draw = lambda params: models.generate(
        model, params, tokens, jnp.ones_like(tokens, bool), max_new_tokens=6, key=jax.random.key(1), eos_id=-1, pad_id=0
    )
    ours, theirs = draw(params), draw(rounded)
    np.testing.assert_array_equal(ours[0], theirs[0])
    same(ours[2], theirs[2])


@pytest.mark.parametrize("how", ["a pass", "a text"])
def test_never_are_all_matrices_dequantised_at_once(how):
    model, params = load(matrices_in_int8=True)
    tokens = jnp.zeros((1, 4), jnp.int32)
    if how == "a pass":
        program = jax.jit(model.hidden).lower(params, tokens)
    else:
        draw = lambda params, tokens: models.generate(
            model, params, tokens, tokens == 0, max_new_tokens=4, key=jax.random.key(0), eos_id=-1, pad_id=0
        )
        program = jax.jit(draw).lower(params, tokens)
    whole = sum(4 * leaf.size for leaf in jax.tree.leaves(params["layers"]) if leaf.dtype == jnp.int8)
    assert program.compile().memory_analysis().temp_size_in_bytes < 0.25 * whole


def test_fingerprints_tell_weights_apart():
    of = lambda params: responses.fingerprint(params, {})
    params = load(matrices_in_int8=True)[1]
    first = of(params)
    assert first == of(load(matrices_in_int8=True)[1]) != of(load()[1])
    kernel = params["layers"]["1"]["mlp"]["up"]["kernel"]
    params["layers"]["1"]["mlp"]["up"]["kernel"] = kernel.replace(qvalue=kernel.qvalue.at[3, 4].add(1))
    assert of(params) != first


@pytest.mark.parametrize(
    ("layout", "up", "scale", "down"),
    [
        ("student", P("fsdp", "tensor"), P(None, "tensor"), P("tensor", "fsdp")),
        ("spread", P(("data", "fsdp"), "tensor"), P(None, "tensor"), P("tensor", ("data", "fsdp"))),
        ("tensor", P(None, "tensor"), P(None, "tensor"), P("tensor", None)),
        ("whole", P(None, None), P(None, None), P(None, None)),
    ],
)
def test_a_teacher_lies_as_its_layout_says_and_its_scales_as_its_columns(layout, up, scale, down):
    mesh = sharding.make_mesh(2, 2, 2)
    place = lambda tree: sharding.tree_shardings(mesh, tree, layout)
    _, params = load(matrices_in_int8=True, shardings=place)
    mlp = params["layers"]["0"]["mlp"]
    found = mlp["up"]["kernel"].qvalue, mlp["up"]["kernel"].scale, mlp["down"]["kernel"].qvalue
    assert tuple(array.sharding.spec for array in found) == (up, scale, down)
    specs = lambda tree: jax.tree.map(lambda s: s.spec, tree)
    assert specs(place(params)["layers"]) == specs(jax.tree.map(lambda x: x.sharding, params)["layers"])
    np.testing.assert_array_equal(found[0], load(matrices_in_int8=True)[1]["layers"]["0"]["mlp"]["up"]["kernel"].qvalue)


def losses(data_dir, steps=3, **changes):
    run = train.build(smoke("jensen_shannon", data_dir, **changes))
    state, found = run.init_state(), []
    for _ in range(steps):
        state, sums = run.train_step(state, run.models.teacher_params, run.batch(int(state.step), state.params))
        found.append(float(sums["loss"][0]))
    return run, np.array(found)


@functools.cache
def alone(data_dir):
    return losses(data_dir, teacher__weights="int8")


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_a_run_trains_by_its_int8_teacher_and_knows_how_far_that_is_from_float(data_dir):
    run, found = alone(data_dir)
    _, floats = losses(data_dir, steps=1)
    assert 0 < abs(found[0] - floats[0]) < 1e-3
    error = quantisation.error(run)
    assert 0 < error["kl"] < 2e-3 and error["top1_agreement"] > 0.95 and 0 < error["largest_difference"] < 1
    assert error["tokens"] == int(next(run.eval_batches())["loss_mask"].sum())
    assert error["bytes"] < 0.6 * error["float_bytes"]


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_its_error_is_that_beside_the_whole_float_teacher_of_which_one_layer_is_there_at_a_time(data_dir, monkeypatch):
    run, whole, there = alone(data_dir)[0], load()[1], []
    expected = quantisation.difference(run, run.models.teacher_params, whole)
    held = sum(leaf.nbytes for leaf in jax.live_arrays())
    read = models.load_pretrained

    def counted(*args, **options):
        there.append(sum(leaf.nbytes for leaf in jax.live_arrays()) - held)
        return read(*args, **options)

    monkeypatch.setattr(models, "load_pretrained", counted)
    found = quantisation.error(run)
    assert found == pytest.approx(expected, rel=1e-5)
    layer = sum(leaf.nbytes for leaf in jax.tree.leaves(whole["layers"]["0"]))
    assert len(there) == len(whole["layers"])
    assert max(there) < layer / 2  # activations only


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize(
    "layout", ["tensor", *(pytest.param(name, marks=pytest.mark.slow) for name in ("student", "spread", "whole"))]
)
def test_on_a_mesh_it_gives_the_losses_of_one_device_wherever_it_lies(layout, data_dir):
    sizes = dict(mesh__data=1, mesh__fsdp=2, mesh__tensor=2)
    _, found = losses(data_dir, teacher__weights="int8", teacher__sharding=layout, **sizes)
    np.testing.assert_allclose(found, alone(data_dir)[1], rtol=2e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("method", ["minillm", "seqkd"])
def test_an_int8_teacher_writes_and_the_run_says_what_it_changes(method, tmp_path, data_dir, capsys):
    config = smoke(method, data_dir, teacher__weights="int8", sampling__max_new_tokens=32, data__max_length=64)
    train.train(config, str(tmp_path / "run"))
    said = json.loads((tmp_path / "run" / quantisation.FILE).read_text())
    assert quantisation.sentence(said) in capsys.readouterr().out
    with config.unlocked():
        config.teacher.int8_report = False
    assert quantisation.error(train.build(config)) == {}


@pytest.mark.usefixtures("one_device")
def test_a_student_can_be_made_of_an_int8_teachers_layers(data_dir):
    config = smoke("forward_kl", data_dir, student__init="layers", student__layers=(1, 3), teacher__weights="int8")
    run = train.build(config)
    ours = run.init_state().params["layers"]["1"]["mlp"]["up"]["kernel"]
    theirs = qwix.dequantize(run.models.teacher_params["layers"]["3"]["mlp"]["up"]["kernel"])
    assert ours.dtype == jnp.float32 and np.array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(teacher__weights="int4"), "teacher.weights='int4' is not one of float, int8"),
        (dict(teacher__sharding="fsdp"), "teacher.sharding='fsdp' is not one of student, spread, tensor, whole"),
    ],
)
def test_settings_that_there_are_none_of(changes, words, data_dir):
    with pytest.raises(ValueError, match=words):
        train.build(smoke("forward_kl", data_dir, **changes))
