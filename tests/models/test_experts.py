"""Mixtures of experts: numbers of transformers, exact gradients, both forms on disk, int8, meshes and bad configs."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from safetensors.numpy import load_file, save_file

from kd_jax import models, sharding
from kd_jax.models import experts, int8
from tests.helpers.paths import TINY

FAMILIES = ("mixtral", "qwen3_moe", "qwen3_moe_mixed")


@functools.cache
def load_tiny(family):
    model, params = models.load_pretrained(TINY / family)
    with np.load(TINY / family / "expected.npz") as expected:
        return model, params, dict(expected)


@pytest.fixture(params=[1, 8], ids=["one device", "eight devices"])
def devices(request, monkeypatch):
    """The number of devices, which decides between `in_blocks` and `one_by_one`."""
    monkeypatch.setattr(jax, "device_count", lambda: request.param)
    jax.clear_caches()
    return request.param


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_greedy_text_are_those_of_transformers(family, devices):
    model, params, expected = load_tiny(family)
    spread = np.ptp(expected["logits"])
    logits = jax.jit(lambda: model.logits(params, expected["input_ids"]))()
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-5 * spread)
    mask = expected["padded_mask"]
    logits = jax.jit(lambda: model.logits(params, expected["padded_ids"], mask))()
    np.testing.assert_allclose(np.asarray(logits)[mask], expected["padded_logits"][mask], atol=1e-5 * spread)
    prompt = expected["input_ids"][:, :8]
    tokens, _, _ = models.generate(
        model, params, prompt, np.ones(prompt.shape, bool), max_new_tokens=10, key=jax.random.key(0), temperature=0.0,
        eos_id=37, pad_id=0,
    )  # fmt: skip
    np.testing.assert_array_equal(tokens, expected["greedy"][:, 8:])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_is_written_again_as_it_was(family, tmp_path):
    model, params, _ = load_tiny(family)
    models.save_pretrained(tmp_path / "again", model, params)
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (TINY / family, tmp_path / "again"))
    assert theirs.keys() == ours.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)
    again, read = models.load_pretrained(tmp_path / "again")
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, read, params)


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_with_all_experts_are_read(family, tmp_path):
    """The names and shapes are those of the parameters inside transformers 5."""
    folder = shutil.copytree(TINY / family, tmp_path / family)
    model, params, _ = load_tiny(family)
    stored = load_file(folder / "model.safetensors")
    names = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    for layer in model.config.layers_with_experts:
        old = f"model.layers.{layer}.{'block_sparse_moe' if family == 'mixtral' else 'mlp'}"
        new = f"model.layers.{layer}.mlp"
        gate, up, down = (
            np.stack([stored.pop(f"{old}.experts.{i}.{name}.weight") for i in range(model.config.num_experts)])
            for name in names
        )
        stored[f"{new}.gate.weight"] = stored.pop(f"{old}.gate.weight")
        stored[f"{new}.experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        stored[f"{new}.experts.down_proj"] = down
    save_file(stored, folder / "model.safetensors")
    again, read = models.load_pretrained(folder)
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, read, params)


def mixture(dtype, tokens=23, width=6, inner=5, count=7, chosen=3):
    """Returns the arguments of `in_blocks` and `one_by_one`, with an expert that no token is sent to."""
    numbers = np.random.default_rng(0)
    shapes = [(count, width, inner), (count, width, inner), (count, inner, width)]
    kernels = tuple(jnp.asarray(numbers.normal(size=shape), dtype) for shape in shapes)
    rows = jnp.asarray(numbers.normal(size=(tokens, width)), dtype)
    logits = jnp.asarray(numbers.normal(size=(tokens, count)) + np.array([1] * (count - 2) + [8, -99]), dtype)
    return rows, logits, kernels


def dense(rows, logits, kernels, chosen, normalise):
    """Returns the sum over all experts, with a probability of 0 for experts that are not chosen."""
    probs = jax.nn.softmax(logits)
    kept = probs >= jnp.sort(probs, axis=-1)[:, -chosen][:, None]
    weights = jnp.where(kept, probs, 0)
    weights = weights / weights.sum(axis=-1, keepdims=True) if normalise else weights
    gate, up, down = kernels
    inner = jax.nn.silu(jnp.einsum("td,edi->tei", rows, gate)) * jnp.einsum("td,edi->tei", rows, up)
    return jnp.einsum("tei,eid,te->td", inner, down, weights)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("compute", [experts.in_blocks, experts.one_by_one])
@pytest.mark.parametrize("chosen", [1, 3, 7])
def test_outputs_and_gradients_are_those_of_a_dense_sum(compute, chosen, normalise):
    with jax.enable_x64():
        arguments = mixture(jnp.float64)

        def of(rows, logits, kernels):
            weights, indices = experts.route(logits, chosen, normalise)
            return compute(rows, weights, indices, kernels, "silu")

        output, pull = jax.vjp(jax.jit(of), *arguments)
        expected, expected_pull = jax.vjp(lambda *arrays: dense(*arrays, chosen, normalise), *arguments)
        assert output.dtype == jnp.float64
        np.testing.assert_allclose(output, expected, rtol=1e-11, atol=1e-13)
        gradient = jnp.asarray(np.random.default_rng(1).normal(size=output.shape))
        check = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-13)
        jax.tree.map(check, pull(gradient), expected_pull(gradient))


@pytest.mark.parametrize("compute", [experts.in_blocks, experts.one_by_one])
def test_a_token_does_not_depend_on_the_other_tokens(compute):
    rows, logits, kernels = mixture(jnp.float32, tokens=600)  # with blocks of the largest size
    weights, indices = experts.route(logits, 2, normalise=True)
    together = compute(rows, weights, indices, kernels, "silu")
    others = rows.at[100:].set(1e6)
    np.testing.assert_allclose(
        compute(others, weights, indices, kernels, "silu")[:100], together[:100], rtol=1e-5, atol=1e-5
    )
    alone = compute(rows[:1], weights[:1], indices[:1], kernels, "silu")
    np.testing.assert_allclose(alone, together[:1], rtol=1e-5, atol=1e-5)
    everyone = jnp.zeros_like(indices).at[:, 1].set(1)  # all tokens are sent to the same two experts
    other = {experts.in_blocks: experts.one_by_one, experts.one_by_one: experts.in_blocks}[compute]
    results = (function(rows, weights, everyone, kernels, "silu") for function in (compute, other))
    np.testing.assert_allclose(*results, rtol=1e-4, atol=1e-4)


def test_the_gradient_of_the_model_is_the_same_on_one_device_and_on_several(monkeypatch):
    model, params, expected = load_tiny("qwen3_moe_mixed")
    model = dataclasses.replace(model, remat="dots_saveable")
    gradients = []
    for count in (1, 8):
        monkeypatch.setattr(jax, "device_count", lambda count=count: count)
        loss = lambda params: (model.logits(params, expected["input_ids"]) ** 2).mean()
        gradients.append(jax.jit(jax.grad(loss))(params))
    check = lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    jax.tree.map(check, *gradients)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients[0]))


def test_experts_on_a_mesh():
    model, params, expected = load_tiny("mixtral")
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    shardings = functools.partial(sharding.tree_shardings, mesh)
    model, sharded = models.load_pretrained(TINY / "mixtral", shardings=shardings)
    spec = sharded["layers"]["0"]["mlp"]["experts"]["gate"]["kernel"].sharding.spec
    assert tuple(spec) == (None, "fsdp", "tensor")
    tokens = jax.device_put(np.tile(expected["input_ids"], (2, 1)), jax.NamedSharding(mesh, sharding.BATCH))
    loss = lambda params, tokens: (model.logits(params, tokens) ** 2).mean()
    value, gradient = jax.jit(jax.value_and_grad(loss))(sharded, tokens)
    expected_value, expected_gradient = jax.jit(jax.value_and_grad(loss))(params, expected["input_ids"])
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    check = lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)
    jax.tree.map(check, jax.device_get(gradient), jax.device_get(expected_gradient))


@pytest.mark.parametrize("sharded", [False, True])
def test_experts_in_int8_are_near(sharded, devices):
    model, params, expected = load_tiny("qwen3_moe_mixed")
    mesh = sharding.make_mesh(fsdp=4, tensor=2) if sharded else None
    shardings = functools.partial(sharding.tree_shardings, mesh) if sharded else None
    _, quantised = models.load_pretrained(TINY / "qwen3_moe_mixed", matrices_in_int8=True, shardings=shardings)
    mlp = quantised["layers"]["3"]["mlp"]
    up = mlp["experts"]["up"]["kernel"]
    assert isinstance(up, qwix.QArray) and up.qvalue.dtype == jnp.int8 and up.scale.shape == (5, 1, 12)
    assert not isinstance(mlp["router"]["kernel"], qwix.QArray)
    dense = int8.dequantise(quantised, jnp.float32)
    original = params["layers"]["3"]["mlp"]["experts"]["up"]["kernel"]
    np.testing.assert_allclose(dense["layers"]["3"]["mlp"]["experts"]["up"]["kernel"], original, atol=0.005)
    logits = jax.jit(lambda params: model.logits(params, expected["input_ids"]))
    np.testing.assert_allclose(logits(quantised), logits(dense), atol=1e-3)


def test_layers_of_a_teacher_keep_their_experts(tmp_path):
    model, params, expected = load_tiny("qwen3_moe_mixed")
    assert model.config.dense_layers == (0, 1, 2) and model.config.layers_with_experts == {3}
    student, taken = models.take_layers(model, params, [3, 0, 3])
    assert student.config.layers_with_experts == {0, 2}
    models.save_pretrained(tmp_path / "student", student, taken)
    again, read = models.load_pretrained(tmp_path / "student")
    assert again == student
    fields = json.loads((tmp_path / "student" / "config.json").read_text())
    assert (fields["decoder_sparse_step"], fields["mlp_only_layers"]) == (1, [1])
    tokens = expected["input_ids"]
    np.testing.assert_array_equal(again.logits(read, tokens), student.logits(taken, tokens))


def test_layers_are_read_one_at_a_time():
    model, params, expected = load_tiny("qwen3_moe_mixed")
    tokens, mask = expected["padded_ids"], expected["padded_mask"]
    hidden = model.hidden_by_layers(params, lambda i: params["layers"][str(i)], tokens, mask)
    np.testing.assert_allclose(hidden, model.hidden(params, tokens, mask), atol=1e-5)


def test_a_student_with_random_experts():
    config = models.ModelConfig(
        family="qwen3_moe", vocab_size=37, hidden_size=16, num_layers=2, num_heads=4, num_experts=4, experts_per_token=2,
        expert_size=8, dense_layers=(0,),
    )  # fmt: skip
    model = models.from_config(config, dtype=jnp.bfloat16)
    params = model.init(jax.random.key(0))
    stack = params["layers"]["1"]["mlp"]["experts"]
    assert stack["down"]["kernel"].shape == (4, 8, 16) and "experts" not in params["layers"]["0"]["mlp"]
    np.testing.assert_allclose(stack["gate"]["kernel"].std(), 0.02, rtol=0.2)
    np.testing.assert_allclose(stack["down"]["kernel"].std(), 0.01, rtol=0.2)
    assert np.isfinite(model.logits(params, np.zeros((1, 3), int))).all()


BAD = {
    "more than there are": ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok = 5 .* from 1 to num_local_experts = 4"),
    "none": ("qwen3_moe", {"num_experts_per_tok": 0}, "num_experts_per_tok = 0 .* from 1 to num_local_experts = 6"),
    "no experts": ("mixtral", {"num_local_experts": 0}, "num_local_experts = 0 .* a number from 1 to 4096"),
    "too many experts": ("mixtral", {"num_local_experts": 2**30}, "num_local_experts = .* a number from 1 to 4096"),
    "no number": ("qwen3_moe", {"num_experts_per_tok": 2.5}, "num_experts_per_tok = 2.5 .* whole number"),
    "two numbers": ("mixtral", {"num_experts": 8}, "num_experts = 8 .* the same number as num_local_experts = 4"),
    "a step of 0": ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step = 0 .* at least 1"),
    "no list": ("qwen3_moe", {"mlp_only_layers": 3}, "mlp_only_layers = 3 .* a list"),
    "another width": ("qwen3_moe", {"moe_intermediate_size": 13}, "tensor .* has shape .* config.json asks for"),
    "another number": ("mixtral", {"num_local_experts": 5}, "tensor '.*experts.4.w[123].weight' is missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_config_is_refused_with_the_field(case, tmp_path):
    family, changes, message = BAD[case]
    folder = shutil.copytree(TINY / family, tmp_path / family)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | changes))
    with pytest.raises(ValueError, match=message) as error:
        models.load_pretrained(folder)
    assert str(folder) in str(error.value)


def test_the_older_name_of_the_number_of_experts_is_read(tmp_path):
    folder = shutil.copytree(TINY / "qwen3_moe", tmp_path / "qwen3_moe")
    fields = json.loads((folder / "config.json").read_text())
    fields["num_experts"] = fields.pop("num_local_experts")
    (folder / "config.json").write_text(json.dumps(fields))
    assert models.load_config(folder) == load_tiny("qwen3_moe")[0].config
