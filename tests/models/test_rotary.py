"""Rotary embeddings: frequencies and logits of transformers, both spellings of config.json, lengths in one row."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import models
from kd_jax.models import rotary as r
from kd_jax.models.families.rotary_fields import (
    RotaryNames,
    layered_rotary_from_hf,
    layered_rotary_to_hf,
    rotary_from_hf,
    rotary_to_hf,
)
from tests.helpers.paths import GOLDEN, TINY

CASES = json.loads((GOLDEN / "rotary.json").read_text())
PHI3 = RotaryNames(share="partial_rotary_factor", types=("default", "longrope"), aliases={"su": "longrope"})
NAMES = {
    "llama": RotaryNames(),
    "phi3": PHI3,
    "gpt_neox": RotaryNames(base="rotary_emb_base", share="rotary_pct", default_share=0.25),
    "stablelm": RotaryNames(share="partial_rotary_factor", default_share=0.25),
    "gemma3_text": RotaryNames(default_base=1e6),
}
FULL, LOCAL = "full_attention", "sliding_attention"


def read(fields):
    """Returns the keywords of `ModelConfig`, and the rotary embedding of each type of layers."""
    names = NAMES[fields["model_type"]]
    layered = fields["model_type"] == "gemma3_text"
    keywords = layered_rotary_from_hf(fields, names, window_base=1e4) if layered else rotary_from_hf(fields, names)
    rotary = r.Rotary(keywords["rope_theta"], keywords["rope_scaling"], keywords["rotary_share"])
    if not layered:
        return keywords, {FULL: rotary}
    return keywords, {FULL: rotary, LOCAL: keywords["window_rotary"]}


@pytest.mark.parametrize("case", CASES)
def test_frequencies_and_attention_factors_are_those_of_transformers(case):
    fields, head_dim = CASES[case]["fields"], 16
    _, rotaries = read(fields)
    for expected in CASES[case]["expected"]:
        rotary = rotaries[expected.get("layers", FULL)]
        rotary.check(head_dim)
        length = expected.get("length", 16)
        frequencies = r.rotary_frequencies(rotary, head_dim, length)
        assert isinstance(frequencies, np.ndarray) and frequencies.dtype == np.float32
        np.testing.assert_allclose(frequencies, expected["frequencies"], rtol=3e-6)
        lengths = jnp.full((1, 2), length)
        traced = jax.jit(lambda lengths, rotary=rotary: r.rotary_frequencies(rotary, head_dim, lengths))(lengths)
        np.testing.assert_allclose(np.broadcast_to(traced, (1, 2, frequencies.size))[0, 1], frequencies, rtol=3e-6)
        np.testing.assert_allclose(rotary.attention_factor, expected["attention_factor"], rtol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_both_spellings_are_written_and_read_again(case):
    fields = CASES[case]["fields"]
    keywords, rotaries = read(fields)
    names, kept = NAMES[fields["model_type"]], ("model_type", "max_position_embeddings")
    sizes = {name: fields[name] for name in kept}
    if LOCAL in rotaries:
        written = layered_rotary_to_hf(rotaries[FULL], rotaries[LOCAL], sizes["max_position_embeddings"], names)
    else:
        written = rotary_to_hf(rotaries[FULL], sizes["max_position_embeddings"], names)
    assert read(sizes | json.loads(json.dumps(written)))[0] == keywords
    assert hash(rotaries[FULL]) == hash(read(fields)[1][FULL])


def test_scalings_of_both_types_of_layers_are_written_and_read_again():
    scaling = r.LongRopeScaling((1.0, 1.5), (2.0, 3.0), 16, 5.0, 1.25)
    rotaries = r.Rotary(5e5, scaling), r.Rotary(2e4, r.LinearScaling(3.0))
    written = layered_rotary_to_hf(*rotaries, 64, NAMES["gemma3_text"])
    read_again = read({"model_type": "gemma3_text", "max_position_embeddings": 64} | written)[1]
    assert (read_again[FULL], read_again[LOCAL]) == rotaries


ROPE = {"factor": 2.0, "rope_type": "linear"}
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.0], "long_factor": [2.0, 2.0], "factor": 2.0}
MISFITS = {
    "an unknown type in the older spelling": (
        "llama", {"rope_scaling": {"type": "ntk"}}, "rope_type 'ntk' in rope_scaling = .*'default', 'linear', .* or 'llama3'",
    ),
    "an unknown type": ("llama", {"rope_parameters": {"rope_type": ["yarn"]}}, r"rope_type \['yarn'\] in rope_parameters"),
    "a type that the family lacks": ("phi3", {"rope_scaling": ROPE}, "'linear' .* expected rope_type 'default' or 'longrope'"),
    "layers of several types": ("llama", {"rope_parameters": {FULL: ROPE}}, "one rotary embedding for all layers"),
    "one object for several types": ("gemma3_text", {"rope_parameters": ROPE}, "rope_parameters = .* 'full_attention'"),
    "no object": ("gemma3_text", {"rope_parameters": {FULL: 3}}, "rope_parameters = .* an object"),
    "a share where there is none": ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 .* 1.0"),
    "a large share": ("gpt_neox", {"rotary_pct": 1.5}, "partial_rotary_factor = 1.5 .* at most 1"),
    "no factor": ("llama", {"rope_scaling": {"type": "linear"}}, "'factor' is missing"),
    "a negative factor": ("llama", {"rope_scaling": ROPE | {"factor": -1}}, "factor = -1 .* positive"),
    "a small factor": ("llama", {"rope_scaling": {"type": "dynamic", "factor": 0.5}}, "factor = 0.5 .* at least 1"),
    "no divisors": ("llama", {"rope_scaling": LONG | {"long_factor": 2.0}}, "long_factor = 2.0 .* list of positive numbers"),
    "a divisor of 0": ("llama", {"rope_scaling": LONG | {"long_factor": [2.0, 0]}}, "long_factor = 0 .* positive number"),
    "an original length of 1": (
        "llama", {"original_max_position_embeddings": 1, "rope_scaling": LONG}, "original_max_position_embeddings = 1",
    ),
    "betas in the other order": (
        "llama", {"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_slow": 40}}, "beta_slow = 40.0 .* at most beta_fast = 32",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
def test_a_misfit_is_refused_with_the_field(case):
    kind, fields, message = MISFITS[case]
    with pytest.raises(ValueError, match=message):
        read({"model_type": kind, "max_position_embeddings": 64} | fields)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"rotary_share": 0.2},
            "=0.2 of head_dim=16 gives 3 rotary .* even number from 2 to 16",
        ),
        ({"rope_scaling": r.LongRopeScaling((1.0,), (2.0,), 8, 4.0)}, "short_factor .* has 1 numbers; expected 2"),
        ({"rope_scaling": r.DynamicScaling(2.0, 32)}, "max_positions=32; expected the model's max_positions=64"),
        ({"rope_scaling": r.DynamicScaling(2.0, 64), "rotary_share": 0.125}, "even number from 4 to 16"),
    ],
)
def test_a_rotary_embedding_fits_the_heads(settings, message):
    sizes = {"vocab_size": 9, "hidden_size": 64, "num_layers": 1, "num_heads": 4, "max_positions": 64}
    with pytest.raises(ValueError, match=message):
        models.ModelConfig(family="stablelm", **sizes, **settings)


def test_only_the_first_coordinates_are_turned():
    x = jax.random.normal(jax.random.key(0), (1, 3, 2, 8))
    turned = r.rotate(x, *r.rotary_factors(r.Rotary(share=0.5), 8, jnp.arange(3)[None]))
    np.testing.assert_array_equal(turned[..., 4:], x[..., 4:])
    angle = 2 * 10000.0 ** (-2 / 4)  # pair 1 of the 4 turned coordinates, at position 2
    pair = x[0, 2, :, 1] + 1j * x[0, 2, :, 3]
    np.testing.assert_allclose(turned[0, 2, :, 1] + 1j * turned[0, 2, :, 3], pair * np.exp(1j * angle), rtol=1e-5)


# The settings with which transformers made rotary_llama.npz.
SCALINGS = {
    "dynamic": {"rope_scaling": r.DynamicScaling(3.0, 16), "max_positions": 16},
    "longrope": {
        "rope_scaling": r.LongRopeScaling(
            tuple(1 + 0.05 * i for i in range(6)), tuple(1.5 + 0.8 * i for i in range(6)), 16, 4.0
        )
    },
}


def load_scaled(case):
    """Returns a tiny Llama with large queries, keys and values and a scaling, its parameters, and the expected numbers."""
    model, params = models.load_pretrained(TINY / "llama")
    for layer in params["layers"].values():
        for name in ("query", "key", "value"):
            layer["attention"][name]["kernel"] *= 8
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, **SCALINGS[case]))
    with np.load(GOLDEN / "rotary_llama.npz") as file:
        return (
            model,
            params,
            {key.split("/")[-1]: file[key] for key in file.files if key.startswith((case, "input_ids"))},
        )


@pytest.fixture(scope="module", params=SCALINGS)
def scaled(request):
    return load_scaled(request.param)


def test_the_length_of_the_sequence_decides_the_frequencies(scaled):
    model, params, expected = scaled
    tokens = expected["input_ids"]
    np.testing.assert_allclose(model.logits(params, tokens), expected["logits"], atol=1e-3)
    np.testing.assert_allclose(model.logits(params, tokens[:, :10]), expected["short_logits"], atol=1e-3)


def test_padding_and_other_segments_do_not_count_as_length(scaled):
    model, params, expected = scaled
    tokens, short, long = expected["input_ids"][0], expected["short_logits"][0], expected["logits"][0]
    padded = np.stack([np.pad(tokens[:10], (14, 0)), tokens, np.pad(tokens[:10], (0, 14))])
    mask = np.ones(padded.shape, bool)
    mask[0, :14] = mask[2, 10:] = False
    logits = jax.jit(model.logits)(params, padded, mask)
    for row, part, values in ((0, slice(14, None), short), (1, slice(None), long), (2, slice(0, 10), short)):
        np.testing.assert_allclose(logits[row, part], values, atol=1e-3)
    packed = np.concatenate([tokens[:10], tokens, tokens[:10]])[None]
    segments = np.repeat([1, 2, 3], [10, 24, 10])[None]
    logits = model.project(params, model.hidden(params, packed, segments))[0]
    for part, values in ((slice(0, 10), short), (slice(10, 34), long), (slice(34, None), short)):
        np.testing.assert_allclose(logits[part], values, atol=1e-3)


def test_generation_with_a_cache_changes_the_frequencies_as_transformers_does(scaled):
    """LongRoPE: as Phi-3, which computes the cache again. Dynamic: as transformers, which keeps the keys in the cache."""
    model, params, expected = scaled
    tokens, logits = expected["generate"], []
    padded = np.stack([np.pad(tokens[0], (3, 0)), np.pad(tokens[0], (0, 3))])
    mask = np.stack([np.arange(31) >= 3, np.arange(31) < 28])
    cache = model.init_cache(2, 31)
    start = 11  # the first 8 tokens of the first row, and the first 11 tokens of the second row
    hidden, cache = model.extend(params, padded[:, :start], mask[:, :start], cache)
    extend = jax.jit(model.extend)
    for i in range(start, 31):
        logits.append(model.project(params, hidden[:, -1]))
        hidden, cache = extend(params, padded[:, i : i + 1], mask[:, i : i + 1], cache)
    logits = np.stack(logits, axis=1)
    np.testing.assert_allclose(logits[0], expected["step_logits"][0], atol=1e-3)
    np.testing.assert_allclose(logits[1, :17], expected["step_logits"][0, 3:], atol=1e-3)


def test_greedy_text_is_that_of_transformers_beyond_the_original_length():
    model, params, expected = load_scaled("dynamic")
    prompt = expected["generate"][:, :8]
    tokens, _, _ = models.generate(
        model, params, prompt, np.ones(prompt.shape, bool), max_new_tokens=20, key=jax.random.key(0), temperature=0.0,
        eos_id=131, pad_id=0,
    )  # fmt: skip
    np.testing.assert_array_equal(tokens, expected["generate"][:, 8:])
