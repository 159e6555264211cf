"""Generation: against full forward passes, and what it draws from."""

import functools
from pathlib import Path

import jax
import numpy as np
import pytest

from kd_jax import models
from kd_jax.models.generate import _generate, _truncate

TINY = Path(__file__).parent / "golden" / "hf_tiny"
PAD = 130


@functools.cache
def load_tiny(family):
    model, params = models.load_pretrained(TINY / family)
    with np.load(TINY / family / "expected.npz") as expected:
        return model, params, expected["input_ids"], expected["logits"]


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "qwen3"])
def test_decoding_gives_the_logits_of_a_full_pass_at_every_position(family):
    model, params, tokens, expected = load_tiny(family)
    # Row 0 starts with three tokens of padding, so that slots and positions differ.
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
    """Logits of right-padded rows of 24, by one program."""
    model, params, *_ = load_tiny("llama")
    forward = jax.jit(model.logits)

    def logits(rows):
        tokens, mask = np.full((3, 24), PAD), np.zeros((3, 24), bool)
        for i, row in enumerate(rows):
            tokens[i, : len(row)], mask[i, : len(row)] = row, True
        return np.asarray(forward(params, tokens, mask))

    return logits


def prompts_with_padding():
    """One prompt padded left, the same padded right, and a longer one."""
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
    *_, mask, _ = greedy(eos_id=tuple(range(131)), steps=9)  # settings of its own, so that it is traced here
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
    # Same key, same draws; another key or temperature, the same program.
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
        (2, 0.6, {3}),  # of what top-k left, token 3 has 5/8
        (2, 0.7, {1, 3}),
    ],
)
def test_truncation_keeps_the_likeliest(top_k, top_p, kept):
    logits = np.log(np.array([[0.03, 0.3, 0.15, 0.5, 0.02]], np.float32))
    truncated = np.asarray(_truncate(logits, top_k, top_p))[0]
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
