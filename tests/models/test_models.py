"""The transformer: comparison with the logits of transformers, padding, segments and initial parameters."""

import dataclasses
import functools
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kd_jax import models
from kd_jax.models.rotary import Llama3Scaling, rotary_frequencies
from tests.helpers.paths import TINY

FAMILIES = ("gpt2", "llama", "qwen2", "qwen3")
SMALL = models.ModelConfig(family="qwen3", vocab_size=37, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2)


@functools.cache
def load_tiny(family):
    model, params = models.load_pretrained(TINY / family)
    with np.load(TINY / family / "expected.npz") as expected:
        return model, params, expected["input_ids"], expected["logits"]


@functools.cache
def small_params():
    return models.from_config(SMALL).init(jax.random.key(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family):
    model, params, tokens, expected = load_tiny(family)
    logits = jax.jit(model.logits)(params, tokens)
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    np.testing.assert_allclose(model.hidden(params, tokens) @ model.head(params), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "query", "down"), [("llama", 0.0019025310, 0.0018328684), ("gpt2", -0.0083158193, 0.0037274871)]
)
def test_a_seed_gives_the_student_of_earlier_versions(family, query, down):
    """The keys of the parameters depend on the order in which the modules are made, norms included."""
    sizes = dict(vocab_size=64, hidden_size=32, num_layers=2, num_heads=4)
    params = models.from_config(models.ModelConfig(family=family, **sizes)).init(jax.random.key(0))
    last = params["layers"]["1"]
    assert last["attention"]["query"]["kernel"][0, 0] == pytest.approx(query, rel=1e-6)
    assert last["mlp"]["down"]["kernel"][0, 0] == pytest.approx(down, rel=1e-6)


@pytest.mark.skipif("SMOLLM2" not in os.environ, reason="needs the folder of SmolLM2-135M-Instruct in SMOLLM2")
def test_logits_and_greedy_text_of_smollm2():
    model, params = models.load_pretrained(os.environ["SMOLLM2"])
    with np.load(TINY.parent / "smollm2_logits.npz") as expected:
        logits = np.asarray(model.logits(params, expected["input_ids"]))[0]
        np.testing.assert_allclose(logits[-1], expected["last_logits"], atol=2e-3)
        np.testing.assert_allclose(
            np.take_along_axis(logits, expected["top20_ids"], -1), expected["top20_logits"], atol=2e-3
        )
        np.testing.assert_allclose(jax.nn.logsumexp(logits, axis=-1), expected["logsumexp"], atol=2e-3)
        prompt, whole = (
            expected["input_ids"],
            expected["greedy_24"],
        )  # prompt and 18 tokens of transformers, the last of them an end token
    new = whole[prompt.shape[1] :]
    tokens, mask, _ = models.generate(
        model, params, prompt, np.ones(prompt.shape, bool), max_new_tokens=24, key=jax.random.key(0), temperature=0.0,
        eos_id=int(new[-1]), pad_id=int(new[-1]),
    )  # fmt: skip
    np.testing.assert_array_equal(tokens[0][mask[0]], new)


@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=[pytest.mark.slow] if family != "llama" else []) for family in FAMILIES]
)
def test_segments_are_rows_of_their_own(family):
    model, params, tokens, _ = load_tiny(family)
    row = np.concatenate([tokens[0, :9], tokens[1, :5], tokens[0, 9:12]])[None]
    segments = np.array([[3] * 9 + [1] * 5 + [2] * 3 + [0] * 2])  # arbitrary numbers, then padding
    row = np.pad(row, ((0, 0), (0, 2)))
    packed = model.logits(params, row, segments)[0]
    for begin, end in ((0, 9), (9, 14), (14, 17)):
        alone = model.logits(params, row[:, begin:end])[0]
        np.testing.assert_allclose(packed[begin:end], alone, atol=1e-5)


def test_another_attention_gives_the_same_numbers():
    """Compares plain attention with XLA's attention. cuDNN's attention is the same call on another device."""
    segments = jnp.array([[1, 1, 2, 2, 2, 0], [0, 0, 1, 1, 1, 1]])
    tokens = jnp.arange(12).reshape(2, 6)
    models_ = [models.from_config(SMALL, attention=attention) for attention in ("plain", "xla")]

    def loss(params, model):
        hidden = model.hidden(params, tokens, segments)
        return jnp.where(segments[..., None] != 0, jnp.sin(hidden), 0).sum(), hidden

    (one, gradient), (other, other_gradient) = (
        jax.jit(jax.value_and_grad(functools.partial(loss, model=model), has_aux=True))(small_params())
        for model in models_
    )
    real = np.array(segments != 0)
    np.testing.assert_allclose(one[1][real], other[1][real], atol=1e-5)
    assert np.all(np.isfinite(other[1]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), gradient, other_gradient)


def test_remat_changes_no_gradient():
    tokens = jnp.arange(10).reshape(2, 5)
    models_ = [models.from_config(SMALL, remat=remat) for remat in ("none", "nothing_saveable")]
    one, other = (jax.jit(jax.grad(lambda p, m=m: m.logits(p, tokens).std()))(small_params()) for m in models_)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), one, other)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_either_side_changes_no_real_token(family):
    model, params, tokens, expected = load_tiny(family)
    length, kept = tokens.shape[1], 17
    mask = np.zeros((4, length), bool)
    mask[0, -kept:] = mask[1, :kept] = mask[2, 3 : 3 + kept] = True  # padding left, right, on both sides, everywhere
    padded = np.full((4, length), 10**6)  # not a valid id
    padded[mask] = np.tile(tokens[0, :kept], 3)
    logits = jax.jit(model.logits)(params, padded, mask)
    assert np.isfinite(logits).all()
    np.testing.assert_allclose(logits[mask].reshape(3, kept, -1), np.stack(3 * [expected[0, :kept]]), atol=1e-4)


def test_gradients_are_finite_and_padding_adds_nothing_to_them():
    model, params = models.from_config(SMALL), small_params()
    mask = np.array([[False, False, True, True, True], [False] * 5])

    def total(params, tokens):
        logits = model.logits(params, tokens, mask)
        return jnp.sum(jnp.where(mask, jax.nn.logsumexp(logits, -1), 0.0))

    gradient = jax.jit(jax.grad(total))
    one = gradient(params, np.array([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5]]))
    other = gradient(params, np.array([[7, 8, 3, 4, 5], [-100, 0, 9, 9, 9]]))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(one))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(one)), "a parameter that nothing reads"


def test_computation_in_bfloat16_over_float32_parameters():
    params, tokens = small_params(), np.arange(12).reshape(2, 6)
    exact = jax.jit(models.from_config(SMALL).logits)(params, tokens)
    model = models.from_config(SMALL, dtype=jnp.bfloat16)
    assert jax.eval_shape(model.hidden, params, tokens).dtype == model.head(params).dtype == jnp.bfloat16
    logits = jax.jit(model.logits)(params, tokens)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, exact, atol=0.02 * np.abs(exact).max())
    assert model.param_dtype == jnp.float32


def test_parameters_are_a_plain_tree_with_string_keys():
    params = small_params()

    def check(tree):
        if isinstance(tree, jax.Array):
            return
        assert type(tree) is dict and all(type(key) is str for key in tree)
        for value in tree.values():
            check(value)

    check(params)
    block = params["layers"]["1"]
    assert block["attention"]["query"]["kernel"].shape == (16, 16)
    assert block["attention"]["key"]["kernel"].shape == (16, 8)
    assert block["attention"]["query_norm"]["scale"].shape == (4,)
    assert block["mlp"]["gate"]["kernel"].shape == (16, 64)
    assert "head" not in params and params["embed"]["embedding"].shape == (37, 16)
    abstract = models.from_config(SMALL).abstract_params()
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), abstract
    )
    abstract.clear()
    assert models.from_config(SMALL).abstract_params()


def test_initial_parameters_follow_gpt2():
    config = models.ModelConfig(
        family="gpt2", vocab_size=500, hidden_size=128, num_layers=2, num_heads=4, tie_embeddings=False
    )
    params = models.from_config(config, param_dtype=jnp.bfloat16).init(jax.random.key(1))
    block = params["layers"]["0"]
    for leaf, std in (
        (params["embed"]["embedding"], 0.02),
        (params["head"]["kernel"], 0.02),
        (block["attention"]["value"]["kernel"], 0.02),
        (block["mlp"]["up"]["kernel"], 0.02),
        (block["attention"]["output"]["kernel"], 0.01),
        (block["mlp"]["down"]["kernel"], 0.01),
    ):
        assert leaf.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.std(leaf, dtype=np.float32), std, rtol=0.05)
    assert np.all(block["mlp"]["up"]["bias"] == 0) and np.all(block["mlp_norm"]["scale"] == 1)
    assert not np.array_equal(block["mlp"]["up"]["kernel"], params["layers"]["1"]["mlp"]["up"]["kernel"])


def test_initial_parameters_do_not_depend_on_their_sharding():
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    placed = jax.sharding.NamedSharding(mesh, jax.P())
    split = jax.sharding.NamedSharding(mesh, jax.P("fsdp"))
    params = models.from_config(SMALL).init(
        jax.random.key(0),
        lambda tree: jax.tree.map(lambda leaf: placed if leaf.shape[0] % 4 else split, tree),
    )
    assert params["layers"]["0"]["mlp"]["up"]["kernel"].sharding == split
    jax.tree.map(np.testing.assert_array_equal, params, small_params())


def test_models_with_the_same_settings_are_one_static_argument():
    one, other = models.from_config(SMALL, "float32"), models.from_config(SMALL, np.float32)
    assert one == other and hash(one) == hash(other) and one != models.from_config(SMALL, jnp.bfloat16)


def test_take_layers_runs_the_chosen_layers_in_their_order():
    model, params, tokens, _ = load_tiny("llama")
    student, taken = models.take_layers(model, params, [2, 0])
    assert student.config == dataclasses.replace(model.config, num_layers=2)
    assert taken["layers"]["0"] is params["layers"]["2"] and taken["layers"]["1"] is params["layers"]["0"]
    assert len(params["layers"]) == 3, "the teacher's tree was edited"
    assert student.logits(taken, tokens).shape == (*tokens.shape, 131)
    same, whole = models.take_layers(model, params, range(3))
    assert same == model and jax.tree.all(jax.tree.map(lambda a, b: a is b, whole, params))


@pytest.mark.parametrize("layers", [[], [3], [0, -1]])
def test_take_layers_refuses_what_is_not_there(layers):
    model, params, *_ = load_tiny("llama")
    with pytest.raises(ValueError, match="from 0 to 2"):
        models.take_layers(model, params, layers)


def test_learned_positions_end_somewhere():
    model, params, *_ = load_tiny("gpt2")
    with pytest.raises(ValueError, match="65 tokens is longer than the 64 positions"):
        model.hidden(params, np.zeros((1, 65), int))


def test_llama3_scaling_against_the_published_rule():
    config = models.ModelConfig(
        family="llama",
        vocab_size=8,
        hidden_size=128,
        num_layers=1,
        num_heads=2,
        rope_theta=500000.0,
        rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 8192),
    )
    expected, kinds = [], set()
    for i in range(32):
        frequency = 1.0 / 500000.0 ** (2 * i / 64)
        wavelength = 2 * np.pi / frequency
        if wavelength < 8192 / 4.0:
            kind, value = "kept", frequency
        elif wavelength > 8192 / 1.0:
            kind, value = "divided", frequency / 8.0
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            kind, value = "between", (1 - smooth) * frequency / 8.0 + smooth * frequency
        kinds.add(kind)
        expected.append(value)
    assert kinds == {"kept", "divided", "between"}
    np.testing.assert_allclose(rotary_frequencies(config.rotary, config.head_dim), expected, rtol=1e-6)
    plain = rotary_frequencies(dataclasses.replace(config, rope_scaling=None).rotary, config.head_dim)
    np.testing.assert_allclose(plain, 500000.0 ** -(np.arange(32) / 32), rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"family": "bert"}, "unknown family 'bert'; known: gemma2, .*, llama, "),
        ({"hidden_size": 50}, "hidden_size=50 does not divide by num_heads=4"),
        ({"num_kv_heads": 3}, "num_heads=4 does not divide by num_kv_heads=3"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"vocab_size": "9"}, "vocab_size='9'"),
        ({"head_dim": -2}, "head_dim=-2"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"activation": "tanhshrink"}, "unknown activation 'tanhshrink'; known: gelu"),
        ({"qk_norm": "width"}, "family 'llama' fixes qk_norm=none; got .width."),
        ({"attention_bias": True}, "attention_bias=True, output_bias=False"),
        ({"family": "gpt2", "num_kv_heads": 2}, "needs num_kv_heads = num_heads"),
    ],
)
def test_config_refuses_what_cannot_be(settings, message):
    sizes = {"family": "llama", "vocab_size": 9, "hidden_size": 48, "num_layers": 2, "num_heads": 4}
    models.ModelConfig(**sizes)
    with pytest.raises(ValueError, match=message):
        models.ModelConfig(**(sizes | settings))


def test_nnx_stays_behind_the_seam():
    sources = {file.name: file.read_text() for file in Path(models.__file__).parent.rglob("*.py")}
    for word in ("nnx.split", "nnx.merge"):
        assert [name for name, text in sources.items() if f"{word}(" in text] == ["functional.py"]
    for word in ("nnx.jit", "nnx.grad", "nnx.Optimizer"):
        assert hasattr(nnx, word.split(".")[1]) and not any(word in text for text in sources.values())
