"""Generation: comparison with full forward passes, and the distribution of the drawn tokens."""

import functools

import jax
import numpy as np
import pytest
import scipy.stats

from kd_jax import models, sharding
from kd_jax.models.generate import _generate
from kd_jax.models.sampling import draw, forbid_repeats, truncate
from tests.helpers.paths import TINY

PAD = 130


@functools.cache
def load_tiny(family):
    model, params = models.load_pretrained(TINY / family)
    with np.load(TINY / family / "expected.npz") as expected:
        return model, params, expected["input_ids"], expected["logits"]


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "qwen3"])
def test_decoding_gives_the_logits_of_a_full_pass_at_every_position(family):
    model, params, tokens, expected = load_tiny(family)
    # Row 0 starts with three padding tokens, so that slots and positions differ.
    prompts = np.stack([np.concatenate([[PAD] * 3, tokens[0, :4]]), tokens[1, :7]])
    mask = np.stack([np.arange(7) >= 3, np.ones(7, bool)])
    extend = jax.jit(lambda params, *args: model.extend(params, *args))
    hidden, cache = extend(params, prompts, mask, model.init_cache(2, 7 + 12))
    logits = [np.asarray(model.project(params, hidden))]
    for i in range(12):
        following = np.stack([tokens[0, 4 + i], tokens[1, 7 + i]])[:, None]
        hidden, cache = extend(params, following, np.ones((2, 1), bool), cache)
        logits.append(np.asarray(model.project(params, hidden)))
    logits = np.concatenate(logits, axis=1)
    np.testing.assert_allclose(logits[0, 3:], expected[0, :16], atol=1e-4)
    np.testing.assert_allclose(logits[1], expected[1, :19], atol=1e-4)


@functools.cache
def full_pass():
    """A function that returns the logits of rows padded on the right to 24 tokens. Only one program is compiled."""
    model, params, *_ = load_tiny("llama")
    forward = jax.jit(model.logits)

    def logits(rows):
        tokens, mask = np.full((3, 24), PAD), np.zeros((3, 24), bool)
        for i, row in enumerate(rows):
            tokens[i, : len(row)], mask[i, : len(row)] = row, True
        return np.asarray(forward(params, tokens, mask))

    return logits


def prompts_with_padding():
    """Returns one prompt padded on the left, the same prompt padded on the right, and a longer prompt."""
    *_, tokens, _ = load_tiny("llama")
    short, long = tokens[0, :5], tokens[1, :8]
    padding = np.full(3, PAD)
    prompts = np.stack([np.concatenate([padding, short]), np.concatenate([short, padding]), long])
    mask = np.stack([np.arange(8) >= 3, np.arange(8) < 5, np.ones(8, bool)])
    return prompts, mask, [list(short), list(short), list(long)]


def greedy(eos_id, steps=10):
    model, params, *_ = load_tiny("llama")
    prompts, mask, _ = prompts_with_padding()
    drawn = models.generate(
        model,
        params,
        prompts,
        mask,
        max_new_tokens=steps,
        key=jax.random.key(0),
        temperature=0.0,
        eos_id=eos_id,
        pad_id=PAD,
    )
    return [np.asarray(array) for array in drawn]


def test_greedy_is_the_argmax_of_full_passes_whatever_the_padding():
    tokens, mask, log_probs = greedy(eos_id=-1)
    *_, rows = prompts_with_padding()
    for step in range(10):
        logits = full_pass()(rows)
        for i, row in enumerate(rows):
            last = logits[i, len(row) - 1]
            assert tokens[i, step] == last.argmax()
            expected = (last - np.logaddexp.reduce(last)).max()
            np.testing.assert_allclose(log_probs[i, step], expected, atol=1e-4)
            row.append(int(last.argmax()))
    assert mask.all()


def test_a_row_ends_at_any_of_the_ending_tokens_and_the_others_go_on():
    free, _, free_log_probs = greedy(eos_id=-1)
    ending = free[0, 3]
    assert ending not in free[2] and ending not in free[0, :3], "the tiny model repeats itself; choose another step"
    tokens, mask, log_probs = greedy(eos_id=(ending, 10**6))
    for row in (0, 1):
        np.testing.assert_array_equal(tokens[row], [*free[row, :4], *[PAD] * 6])
        np.testing.assert_array_equal(mask[row], np.arange(10) < 4)
        np.testing.assert_allclose(log_probs[row], np.where(np.arange(10) < 4, free_log_probs[row], 0), atol=1e-6)
    np.testing.assert_array_equal(tokens[2], free[2])
    assert mask[2].all()


def test_the_loop_stops_when_every_row_has_ended(monkeypatch):
    passes, extend = [], models.Model.extend

    def counted(*args):
        jax.debug.callback(lambda: passes.append(1))
        return extend(*args)

    monkeypatch.setattr(models.Model, "extend", counted)
    *_, mask, _ = greedy(eos_id=tuple(range(131)), steps=9)  # new settings, so that the function is traced here
    jax.effects_barrier()
    assert mask.sum() == 3 and len(passes) == 1, "every id ends a row, so nothing follows the pass over the prompts"


def test_drawn_tokens_follow_the_truncated_distribution_and_log_probs_the_whole_one():
    model, params, *_ = load_tiny("llama")
    _, _, rows = prompts_with_padding()
    prompt = np.tile(rows[2], (600, 1))
    settings = {"max_new_tokens": 1, "temperature": 0.5, "top_k": 3, "eos_id": -1, "pad_id": PAD}

    def draw(seed, **changed):
        key = jax.random.key(seed)
        drawn = models.generate(model, params, prompt, np.ones_like(prompt, bool), key=key, **(settings | changed))
        return [np.asarray(array[:, 0]) for array in drawn]

    tokens, _, log_probs = draw(0)
    last = full_pass()(rows)[2, 7] / 0.5
    whole = last - np.logaddexp.reduce(last)
    np.testing.assert_allclose(log_probs, whole[tokens], atol=1e-4)
    best = np.argsort(last)[-3:]
    assert set(tokens) == set(best)
    expected = np.exp(whole[best]) / np.exp(whole[best]).sum()
    frequency = (tokens[:, None] == best).mean(axis=0)
    np.testing.assert_allclose(frequency, expected, atol=0.08)  # four standard deviations
    # The same key gives the same draws. Another key or temperature uses the same program.
    programs = _generate._cache_size()
    np.testing.assert_array_equal(draw(0)[0], tokens)
    assert not np.array_equal(draw(1)[0], tokens)
    assert not np.array_equal(draw(0, temperature=3.0)[2], log_probs)
    assert _generate._cache_size() == programs


def test_log_probs_of_a_drawn_text_are_those_of_one_full_pass():
    model, params, *_ = load_tiny("llama")
    prompts, mask, rows = prompts_with_padding()
    drawn = models.generate(
        model,
        params,
        prompts,
        mask,
        max_new_tokens=10,
        key=jax.random.key(3),
        temperature=20.0,
        top_p=0.9,
        eos_id=-1,
        pad_id=PAD,
    )
    tokens, _, log_probs = (np.asarray(array) for array in drawn)
    logits = full_pass()([row + list(text) for row, text in zip(rows, tokens, strict=True)]) / 20.0
    for i, row in enumerate(rows):
        ahead = logits[i, len(row) - 1 : len(row) + 9]
        expected = ahead[np.arange(10), tokens[i]] - np.logaddexp.reduce(ahead, axis=-1)
        np.testing.assert_allclose(log_probs[i], expected, atol=1e-4)
        assert len(set(tokens[i])) > 5, "the steps share their randomness"
    assert not np.array_equal(tokens[0], tokens[1]), "the rows share their randomness"


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (0, 1.0, {0, 1, 2, 3, 4}),
        (2, 1.0, {1, 3}),
        (9, 1.0, {0, 1, 2, 3, 4}),
        (0, 0.49, {3}),
        (0, 0.51, {1, 3}),
        (0, 0.9, {1, 2, 3}),
        (0, 1e-9, {3}),
        (2, 0.6, {3}),  # token 3 has 5/8 of the mass that top-k keeps
        (2, 0.7, {1, 3}),
    ],
)
def test_truncation_keeps_the_likeliest(top_k, top_p, kept):
    logits = np.log(np.array([[0.03, 0.3, 0.15, 0.5, 0.02]], np.float32))
    truncated = np.asarray(truncate(logits, top_k, top_p))[0]
    assert set(np.flatnonzero(truncated > -np.inf)) == kept
    np.testing.assert_array_equal(truncated[sorted(kept)], logits[0, sorted(kept)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_k": -1}, "top_k=-1"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size=-1"),
        ({"mixture": (None, None, 1.5)}, "weight 1.5"),
        ({"mixture": (None, None, 0.5), "temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"prompt_mask": np.ones((1, 3), bool)}, r"shape \(1, 2\) and prompt_mask \(1, 3\)"),
        ({"max_new_tokens": 64}, "65 tokens is longer than the 64 positions"),
    ],
)
def test_settings_out_of_range_are_errors(settings, message):
    model, params, *_ = load_tiny("gpt2")
    good = {
        "prompts": np.ones((1, 2), int),
        "prompt_mask": np.ones((1, 2), bool),
        "max_new_tokens": 4,
        "key": jax.random.key(0),
        "eos_id": -1,
        "pad_id": 0,
    }
    with pytest.raises(ValueError, match=message):
        models.generate(model, params, **(good | settings))


def next_token(family, prompt):
    model, params, *_ = load_tiny(family)
    logits = np.asarray(model.logits(params, prompt[None]))[0, -1].astype(np.float64)
    return np.exp(logits - np.logaddexp.reduce(logits))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["plain", "top_k", "top_p", "mixture"])
def test_100_000_draws_pass_a_chi_square_test(how):
    model, params, tokens, _ = load_tiny("llama")
    other, other_params, *_ = load_tiny("qwen3")
    p, q = next_token("qwen3", tokens[0, :5]), next_token("llama", tokens[0, :5])
    settings = {"plain": {}, "top_k": {"top_k": 9}, "top_p": {"top_p": 0.4}, "mixture": {}}[how]
    ranked = np.argsort(-q)
    if how == "mixture":
        settings = {"mixture": (other, other_params, 0.3)}
        q = 0.7 * q + 0.3 * p
    elif how != "plain":
        kept = 9 if how == "top_k" else int((np.cumsum(q[ranked]) - q[ranked] < 0.4).sum())
        q = np.where(np.isin(np.arange(len(q)), ranked[:kept]), q, 0)
        q /= q.sum()
    prompts = np.tile(tokens[0, :5], (20_000, 1))
    counts = np.zeros(len(q))
    for seed in range(5):
        drawn, *_ = models.generate(
            model, params, prompts, np.ones_like(prompts, bool), max_new_tokens=1, key=jax.random.key(seed),
            eos_id=-1, pad_id=PAD, **settings,
        )  # fmt: skip
        counts += np.bincount(np.asarray(drawn)[:, 0], minlength=len(q))
    assert counts[q == 0].sum() == 0
    expected = q[q > 0] * 100_000
    assert expected.min() > 5, "too few to compare; the tiny model is more peaked than it was"
    assert scipy.stats.chisquare(counts[q > 0], expected).pvalue > 1e-3


def test_a_row_is_the_same_whatever_is_beside_it_and_on_any_mesh():
    model, params, tokens, _ = load_tiny("llama")
    prompts = [list(tokens[i % 2, : 3 + i]) for i in range(8)]

    def text(prompts, width_from=None, place=lambda array: array, its_params=params):
        ids, mask = models.left_pad(prompts, PAD)
        if width_from:  # more padding
            ids, mask = (
                np.pad(a, ((0, 0), (width_from, 0)), constant_values=v) for a, v in ((ids, PAD), (mask, False))
            )
        drawn = models.generate(
            model, its_params, place(ids), place(mask), max_new_tokens=6, key=jax.random.key(0), temperature=3.0,
            no_repeat_ngram_size=2, eos_id=-1, pad_id=PAD,
        )  # fmt: skip
        return np.asarray(drawn[0]), np.asarray(drawn[2])

    whole = text(prompts)
    assert left_pad_width(prompts) == 32
    np.testing.assert_array_equal(text(prompts[:3])[0], whole[0][:3])
    np.testing.assert_array_equal(text(prompts, 5)[0], whole[0])
    mesh = sharding.make_mesh(2, 2, 2)
    placed = jax.device_put(params, sharding.tree_shardings(mesh, params))
    on_mesh = text(prompts, place=lambda array: sharding.put_whole(mesh, array), its_params=placed)
    np.testing.assert_array_equal(on_mesh[0], whole[0])
    np.testing.assert_allclose(on_mesh[1], whole[1], atol=1e-4)


def left_pad_width(prompts):
    return models.left_pad(prompts, PAD)[0].shape[1]


def test_prompts_are_padded_to_few_widths():
    assert [left_pad_width([[1] * n]) for n in (1, 32, 33)] == [32, 32, 64]
    assert models.left_pad([[1] * 33], 0, most=40)[0].shape[1] == 40
    assert models.left_pad([[1] * 33], 0, most=10)[0].shape[1] == 33


def test_no_ngram_occurs_twice():
    model, params, tokens, _ = load_tiny("llama")
    prompt = np.array([[3, 4, 3, 4, 3]])
    drawn = lambda size: np.asarray(
        models.generate(
            model, params, prompt, np.ones_like(prompt, bool), max_new_tokens=24, key=jax.random.key(0), top_k=2,
            temperature=0.2, no_repeat_ngram_size=size, eos_id=-1, pad_id=PAD,
        )[0]
    )[0]  # fmt: skip
    for size in (1, 2, 3):
        row = [*prompt[0], *drawn(size)]
        new = [tuple(row[i - size + 1 : i + 1]) for i in range(5, len(row))]
        assert not any(
            gram in {tuple(row[j : j + size]) for j in range(5 + i - size + 1)} for i, gram in enumerate(new)
        )
    free = [*prompt[0], *drawn(0)]
    assert len({tuple(free[i : i + 2]) for i in range(28)}) < 28, "it would not have repeated itself anyway"


def test_forbidden_are_exactly_the_tokens_that_repeat():
    tokens = np.array([[9, 9, 1, 2, 3, 1, 2, 0, 0], [1, 2, 4, 1, 2, 5, 1, 2, 0]])
    mask = np.array([[False] * 2 + [True] * 5 + [False] * 2, [True] * 7 + [False] * 2])
    logits = jax.numpy.zeros((2, 10))
    forbidden = np.asarray(forbid_repeats(logits, tokens, mask, 7, 3)) == -np.inf
    assert [set(np.flatnonzero(row)) for row in forbidden] == [{3}, set()]  # the second row ends with 5, 1
    forbidden = np.asarray(forbid_repeats(logits, tokens, mask, 7, 2)) == -np.inf
    assert [set(np.flatnonzero(row)) for row in forbidden] == [{3}, {2}]


def test_what_has_no_probability_is_never_drawn():
    probs = np.zeros((4, 300), np.float32)
    probs[0, [7, 290]] = 1e-30, 1e-30
    probs[1, 299] = 3.0
    probs[2, 0] = 1.0
    probs[3, 128:256] = 1 / 128
    ends = np.float32(1) - np.finfo(np.float32).eps / 2
    low, high = (np.asarray(draw(np.full(4, u, np.float32), probs)) for u in (0.0, ends))
    assert list(low) == [7, 299, 0, 128] and list(high) == [290, 299, 0, 255]
