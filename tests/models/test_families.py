"""Every family against transformers: logits, padding, packed rows, generation, both spellings of config.json, saving."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from kd_jax import models, sharding
from kd_jax.models.functional import _split
from tests.helpers.paths import TINY

FOLDERS = sorted(folder.parent.name for folder in TINY.glob("*/config.json"))
WITH_GREEDY = [name for name in FOLDERS if name not in ("gpt2", "llama", "qwen2", "qwen3")]
# Families with a cache of their own kind: windows, two rotary embeddings, keys that change, offset positions.
FAST = ("gemma3_text", "opt_350m", "phi3_longrope", "smollm3_window")


@functools.cache
def load(name):
    model, params = models.load_pretrained(TINY / name)
    with np.load(TINY / name / "expected.npz") as arrays:
        return model, params, dict(arrays)


@pytest.fixture
def edited(tmp_path):
    """A function that copies a tiny model, changes fields of config.json ("absent" removes a field), and returns the copy."""

    def make(name, **changes):
        folder = tmp_path / name
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(TINY / name, folder)
        fields = json.loads((folder / "config.json").read_text()) | changes
        fields = {field: value for field, value in fields.items() if value != "absent"}
        (folder / "config.json").write_text(json.dumps(fields))
        return folder

    return make


@pytest.mark.parametrize("name", WITH_GREEDY)
def test_logits_are_those_of_transformers_with_padding_and_in_packed_rows(name):
    model, params, expected = load(name)
    tokens, mask = expected["input_ids"], expected["padded_mask"]
    length = tokens.shape[1]
    first = length // 2 - 1  # a window of 5 tokens is shorter than both segments
    packed = np.concatenate([tokens[0, :first], tokens[1, : length - first]])
    segments = np.array([7] * first + [3] * (length - first))
    rows = np.concatenate([tokens, expected["padded_ids"], packed[None]])
    of_rows = np.concatenate([np.ones(tokens.shape, int), mask.astype(int), segments[None]])
    logits = np.asarray(jax.jit(model.logits)(params, rows, of_rows))
    tolerance = 1e-5 * np.ptp(expected["logits"])
    np.testing.assert_allclose(logits[:2], expected["logits"], rtol=0, atol=tolerance)
    np.testing.assert_allclose(logits[2:4][mask], expected["padded_logits"][mask], rtol=0, atol=tolerance)
    if not model.config.rotary.depends_on_length:  # else a segment has the frequencies of its own length
        alone = np.concatenate([expected["logits"][0, :first], expected["logits"][1, : length - first]])
        np.testing.assert_allclose(logits[4], alone, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name not in FAST else []) for name in WITH_GREEDY]
)
def test_greedy_text_is_that_of_transformers(name):
    model, params, expected = load(name)
    greedy, length = expected["greedy"], 8
    # Padding on the left of one row must not change the row.
    prompts = np.concatenate([np.full((2, 2), 5), greedy[:, :length]], axis=1)
    mask = np.ones(prompts.shape, bool)
    mask[:, :2] = False
    tokens, _, _ = models.generate(
        model, params, prompts, mask, max_new_tokens=greedy.shape[1] - length, key=jax.random.key(0), temperature=0.0,
        eos_id=-1, pad_id=0,
    )  # fmt: skip
    np.testing.assert_array_equal(tokens, greedy[:, length:])


@pytest.mark.parametrize("name", WITH_GREEDY)
def test_a_folder_is_written_again_bit_for_bit(name, tmp_path):
    model, params, _ = load(name)
    models.save_pretrained(tmp_path / "again", model, params)
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (TINY / name, tmp_path / "again"))
    assert theirs.keys() == ours.keys()
    jax.tree.map(np.testing.assert_array_equal, theirs, ours)
    loaded, read = models.load_pretrained(tmp_path / "again")
    assert loaded == model
    jax.tree.map(np.testing.assert_array_equal, read, params)
    fields, written = (json.loads((folder / "config.json").read_text()) for folder in (TINY / name, tmp_path / "again"))
    unread = {"sliding_window"} if not model.config.layers_with_window else set()
    unread |= (
        {"decoder_sparse_step", "mlp_only_layers"} if name == "qwen3_moe_mixed" else set()
    )  # two ways to say the same
    both = {field for field in set(fields) & set(written) - unread if fields[field] is not None}
    different = {field for field in both if fields[field] != written[field]}
    assert not different, {field: (fields[field], written[field]) for field in different}


def as_on_the_hub(fields):
    """Returns fields of transformers 5 in the spelling of transformers 4, in which most folders of the hub are."""
    fields = dict(fields)
    rope = fields.pop("rope_parameters", None)
    if rope and "full_attention" in rope:
        fields["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    if rope:
        kind = rope.get("rope_type", "default")
        names = {"rope_theta": "rope_theta", "partial_rotary_factor": "partial_rotary_factor"}
        if fields["model_type"] == "gpt_neox":
            names = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
        fields |= {names[field]: rope[field] for field in names if field in rope}
        scaling = {field: value for field, value in rope.items() if field not in (*names, "rope_type")}
        fields["rope_scaling"] = None if kind == "default" else scaling | {"type": kind}
    if pattern := fields.pop("_sliding_window_pattern", None):
        fields["sliding_window_pattern"] = pattern
        del fields["layer_types"]
    return fields | {"torch_dtype": fields.pop("dtype")}


@pytest.mark.parametrize("name", WITH_GREEDY)
def test_both_spellings_of_config_json_are_one(name, edited):
    fields = json.loads((TINY / name / "config.json").read_text())
    if name == "gemma3_text_full":
        fields.pop("_sliding_window_pattern")  # the list of the layers differs from the pattern
    folder = edited(name)
    (folder / "config.json").write_text(json.dumps(as_on_the_hub(fields)))
    assert models.load_config(folder) == load(name)[0].config


# The folder -> fields that are removed, and a setting with its value: the default of transformers.
DEFAULTS = {
    "gemma2": (("layer_types",), "sliding_layers", (0, 2)),
    "gemma2_plain": (("attn_logit_softcapping",), "attention_cap", 50.0),
    "gemma3_text": (("layer_types", "sliding_window_pattern"), "sliding_layers", (0, 1, 2, 3)),
    "gpt_neox": (("rope_parameters",), "rotary_share", 0.25),
    "opt": (("word_embed_proj_dim", "tie_word_embeddings"), "tie_embeddings", True),
    "phi3_longrope": (("tie_word_embeddings", "num_key_value_heads"), "num_kv_heads", 4),
    "smollm3": (("no_rope_layers", "tie_word_embeddings"), "unrotated_layers", (3,)),
    "smollm3_window": (("no_rope_layers", "layer_types"), "sliding_layers", (1, 3)),
    "stablelm": (("rope_parameters", "tie_word_embeddings"), "rotary_share", 0.25),
    "granite": (("attention_multiplier", "num_key_value_heads"), "attention_scale", 1.0),
    "olmo2": (("rms_norm_eps", "hidden_act"), "norm_eps", 1e-5),
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_an_absent_field_has_the_default_of_transformers(name, edited):
    absent, setting, value = DEFAULTS[name]
    config = models.load_config(edited(name, **dict.fromkeys(absent, "absent")))
    found = getattr(config, setting)
    if setting == "sliding_layers" and found is None:
        found = tuple(sorted(config.layers_with_window))
    assert found == value


# The folder, a change of config.json, and a part of the message.
REFUSALS = [
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True .* expected false"),
    ("gemma2", {"query_pre_attn_scalar": 7.5}, "attention_scale=.* whole number n in family 'gemma2'"),
    ("gemma2", {"final_logit_softcapping": -1.0}, "final_logit_softcapping = -1.0 .* positive number"),
    (
        "gemma2",
        {"sliding_window": None},
        "layer_types = .* expected 'full_attention' in every layer if .*sliding_window",
    ),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0 .* expected null"),
    ("gemma3_text", {"layer_types": "absent", "sliding_window_pattern": 0}, "sliding_window_pattern = 0 .* at least 1"),
    ("gemma3_text", {"layer_types": ["full_attention"]}, "layer_types = .* a type for each of the 4 layers"),
    ("opt", {"hidden_size": 26}, "hidden_size=26 does not divide by num_heads=4"),
    ("phi3", {"attention_bias": True}, "attention_bias = True .* false in a phi3 config"),
    ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers = .* 0 or 1 for each of the 4 layers"),
    ("stablelm", {"num_key_value_heads": None}, "'num_key_value_heads' is missing"),
    ("granite", {"logits_scaling": 0}, "logits_scaling = 0 .* positive number"),
    ("gpt_neox", {"hidden_act": "swish2"}, "unknown activation 'swish2'"),
    ("mistral", {"mlp_bias": True}, "mlp_bias = True .* false in a mistral config"),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSALS)
def test_a_variant_that_is_not_computed_is_refused_with_the_field(name, changes, message, edited):
    with pytest.raises(ValueError, match=message):
        models.load_config(edited(name, **changes))


SIZES = dict(vocab_size=9, hidden_size=64, num_layers=3, num_heads=4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"family": "llama", "logit_cap": 30.0}, "family 'llama' fixes logit_cap=None; got 30.0"),
        ({"family": "llama", "attention_scale": 0.5}, "family 'llama' fixes attention_scale=0.25"),
        (
            {"family": "mistral", "sliding_window": 8, "sliding_layers": (1,)},
            "'mistral' has the sliding window in every layer",
        ),
        ({"family": "opt", "norms": "residual"}, "norms='residual' with final_norm=False"),
        ({"family": "opt", "mlp_bias": False}, "family 'opt' has all biases or none"),
        ({"family": "gpt_neox", "parallel_norms": 1}, "parallel_norms=2, or 0"),
        ({"family": "gpt_neox", "parallel_norms": 3}, "unknown parallel_norms 3; known: 0, 1, 2"),
        ({"family": "stablelm", "qk_norm": "width"}, "qk_norm 'none' or 'each_head'"),
        ({"family": "smollm3", "unrotated_layers": (3,)}, r"unrotated_layers=\(3,\) must be indices of the 3 layers"),
        ({"family": "gemma2", "logit_cap": 0.0}, "logit_cap=0.0 must be a positive number"),
        ({"family": "llama", "experts_per_token": 2}, "experts_per_token=2, .* need num_experts above 0"),
    ],
)
def test_settings_that_config_json_cannot_express_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        models.ModelConfig(**SIZES, **settings)


@pytest.mark.parametrize("family", sorted({load(name)[0].config.family for name in WITH_GREEDY}))
def test_every_parameter_of_a_new_model_has_a_place_on_disk_and_on_a_mesh(family, tmp_path):
    experts = {"num_experts": 4, "experts_per_token": 2} if family in ("mixtral", "qwen3_moe") else {}
    model = models.from_config(models.ModelConfig(family=family, **SIZES, **experts))
    numbers = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(numbers.normal(size=leaf.shape), leaf.dtype), model.abstract_params()
    )
    sharding.tree_shardings(sharding.make_mesh(2, 2, 2), params)  # a parameter without a rule is an error
    models.save_pretrained(tmp_path / "new", model, params)
    again, read = models.load_pretrained(tmp_path / "new")
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, read, params)


def test_a_fused_tensor_is_read_slice_by_slice_and_gathered_again(tmp_path):
    mesh = sharding.make_mesh(1, 2, 4)
    for name in ("gpt_neox", "phi3", "stablelm_parallel"):
        model, whole, _ = load(name)
        _, params = models.load_pretrained(TINY / name, shardings=lambda tree: sharding.tree_shardings(mesh, tree))
        jax.tree.map(np.testing.assert_array_equal, params, whole)
        models.save_pretrained(tmp_path / name, model, params)
        ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / name, TINY / name))
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_chosen_layers_keep_their_window_rotation_and_place():
    model, params, expected = load("smollm3_window")  # layers 1 and 3 have a window and no rotary positions
    student, taken = models.take_layers(model, params, [3, 0])
    assert student.config.layers_with_window == {0} and student.config.unrotated_layers == (0,)
    assert taken["layers"]["1"] is params["layers"]["0"]
    full, _ = models.take_layers(model, params, [0, 2])
    assert full.config.sliding_window is None and full.config.unrotated_layers == ()
    gemma, gemma_params, _ = load("gemma3_text")
    rotary = gemma.config.window_rotary
    assert models.take_layers(gemma, gemma_params, [0, 2])[0].config.window_rotary == rotary
    assert models.take_layers(gemma, gemma_params, [2])[0].config.window_rotary is None


@pytest.mark.parametrize("name", ["gemma3_text", "smollm3_window"])
def test_layer_by_layer_gives_the_same_hidden_states(name):
    model, params, expected = load(name)
    tokens, mask = expected["padded_ids"], expected["padded_mask"]
    one = model.hidden_by_layers(params, lambda i: params["layers"][str(i)], tokens, mask)
    np.testing.assert_allclose(one[mask], model.hidden(params, tokens, mask)[mask], rtol=0, atol=1e-5)


def test_attention_of_jax_has_the_window_and_the_scale():
    model, params, expected = load("smollm3_window")
    other = dataclasses.replace(model, attention="xla")
    logits = jax.jit(other.logits)(params, expected["input_ids"])
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-5 * np.ptp(expected["logits"]))


def test_gemmas_factor_of_the_embedding_is_rounded_to_the_type_of_the_computation():
    model, params, expected = load("gemma2")
    half = dataclasses.replace(model, dtype=jnp.dtype(jnp.bfloat16))
    module = nnx.merge(_split(half)[0], params)
    x = module.begin(jnp.asarray(expected["input_ids"]), None, None)[0]
    factor = jnp.bfloat16(24**0.5)
    assert float(factor) == 4.90625
    rows = params["embed"]["embedding"][expected["input_ids"]].astype(jnp.bfloat16)
    np.testing.assert_array_equal(x, rows * factor)


def test_granites_factors_are_not_rounded_to_the_type_of_the_computation():
    model, params, expected = load("granite")
    config = dataclasses.replace(model.config, embedding_multiplier=1.1)
    half = models.from_config(config, dtype=jnp.bfloat16)
    x = nnx.merge(_split(half)[0], params).begin(jnp.asarray(expected["input_ids"]), None, None)[0]
    rows = params["embed"]["embedding"][expected["input_ids"]].astype(jnp.bfloat16)
    np.testing.assert_array_equal(x, (rows.astype(jnp.float32) * 1.1).astype(jnp.bfloat16))
    assert np.any(np.asarray(x != rows * jnp.bfloat16(1.1)))
