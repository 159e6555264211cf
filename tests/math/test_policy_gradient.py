"""Compares returns with explicit sums, and the policy gradient with the exact gradient that it estimates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base, opd
from kd_jax import policy_gradient
from kd_jax.objectives import ORIGINS, make_terms
from tests.helpers.steps import TERM, step

COUNTED = np.array([[False, True, True, True, False], [True, True, False, False, False], [False] * 5])
REWARDS = np.where(COUNTED, np.arange(1.0, 16.0).reshape(3, 5), 0)


@pytest.mark.parametrize("discount", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("include_current", [False, True])
@pytest.mark.parametrize("length_normalised", [False, True])
def test_returns_are_the_sums_that_they_say(discount, include_current, length_normalised):
    found = policy_gradient.returns(
        jnp.asarray(REWARDS), jnp.asarray(COUNTED), discount=discount, include_current=include_current,
        length_normalised=length_normalised,
    )  # fmt: skip
    expected = np.zeros_like(REWARDS)
    for row, t in np.argwhere(COUNTED):
        first = t if include_current else t + 1
        later = [i for i in range(first, 5) if COUNTED[row, i]]
        total = sum(discount ** (i - first) * REWARDS[row, i] for i in later)
        expected[row, t] = total / max(1, len(later)) if length_normalised else total
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_whitening():
    found = np.asarray(policy_gradient.whiten(jnp.asarray(REWARDS), jnp.asarray(COUNTED)))[COUNTED]
    assert found.mean() == pytest.approx(0, abs=1e-6) and found.std(ddof=1) == pytest.approx(1, rel=1e-5)


def test_whitening_over_all_is_over_what_a_response_could_have_been():
    """Prompts, rows of other models and positions beyond the longest possible response are excluded."""
    policy = {"whiten": "all", "include_current": True, "discount": 0.0, "length_normalised": False}
    specs = {"it": TERM | {"kind": "policy_gradient", "policy": base.policy(**policy), "rows": "student"}}
    (term,) = make_terms(specs, max_new_tokens=3)
    zero = jnp.zeros(COUNTED.shape)
    scores = lambda rows: policy_gradient.Scores(
        jnp.asarray(REWARDS)[rows], zero[rows], zero[rows], jnp.asarray(COUNTED)[rows]
    )
    advantage = np.asarray(term.signals(scores(slice(None)))["advantage"])
    slots = np.array([[0, 1, 1, 1, 0], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]], bool)  # positions after the end count
    values = REWARDS[slots]
    np.testing.assert_allclose(advantage[COUNTED], ((REWARDS - values.mean()) / values.std(ddof=1))[COUNTED], rtol=1e-5)
    np.testing.assert_allclose(advantage[:2], term.signals(scores(slice(2)))["advantage"], rtol=1e-6)


def test_importance_weights_are_bounded_and_finite():
    one = jnp.array([[True] * 4])
    log_p, log_q = jnp.array([[-1.0, -200.0, -1.0, -3.0]]), jnp.array([[-1.0, -1.0, -200.0, -2.0]])
    found = policy_gradient.importance(policy_gradient.Scores(log_p, log_q, log_q, one), 0.2)
    p, q = np.exp(-3.0), np.exp(-2.0)
    np.testing.assert_allclose(found, [[1, 1 / 0.8, 0, q / (0.8 * q + 0.2 * p)]], rtol=1e-5, atol=1e-30)
    later = policy_gradient.Scores(log_p, log_q + 0.5, log_q, one)  # the student was trained after drawing
    np.testing.assert_allclose(policy_gradient.importance_now(later, 0.2), np.exp(0.5) * found, rtol=1e-5, atol=1e-30)


def test_the_surrogate_follows_the_ratio_only_so_far():
    log_q = jnp.log(jnp.array([1.5, 0.5, 1.5, 0.5]))
    advantage = jnp.array([1.0, 1.0, -1.0, -1.0])
    surrogate = lambda log_q, clip: policy_gradient.clipped_surrogate(log_q, jnp.zeros(4), advantage, jnp.ones(4), clip)
    np.testing.assert_allclose(surrogate(log_q, 0.2), [-1.2, -0.5, 1.5, 0.8], rtol=1e-6)
    np.testing.assert_allclose(surrogate(log_q, 0.0), [-1.5, -0.5, 1.5, 0.5], rtol=1e-6)
    gradient = jax.grad(lambda log_q: surrogate(log_q, 0.2).sum())(log_q)
    np.testing.assert_allclose(gradient, [0, -0.5, 1.5, 0], atol=1e-6)


def drawn_gradients(specs, logits, teacher, groups=24, rows=2000):
    """Returns the step's gradient for each group of tokens drawn from the student."""
    random = np.random.default_rng(0)
    probs = np.exp(logits - np.logaddexp.reduce(logits))
    found = []
    for _ in range(groups):
        targets = random.choice(len(logits), size=(rows, 1), p=probs).astype(np.int32)
        batch = {"targets": targets, "loss_mask": np.ones((rows, 1), bool), "origin": np.full(rows, 2)}
        batch["log_probs"] = np.log(probs)[targets].astype(np.float32)
        spread = lambda values: np.tile(values.astype(np.float32), (rows, 1, 1))
        found.append(step(specs, spread(logits), spread(teacher), batch)[1].sum(axis=(0, 1)))
    return np.array(found)


@pytest.mark.slow
@pytest.mark.parametrize("baseline", ["kl", "none"])
def test_opds_expected_gradient_is_the_exact_one(baseline):
    assert ORIGINS[2] == "student"
    random = np.random.default_rng(1)
    logits, teacher = random.normal(size=7), random.normal(size=7)
    specs = opd.get_config("smoke").objective.terms
    specs.distil.policy.baseline = baseline
    found = drawn_gradients(specs, logits, teacher)
    one = {"targets": np.zeros((1, 1), np.int32), "loss_mask": np.ones((1, 1), bool), "origin": np.array([2])}
    exact = TERM | {"divergence": {"name": "reverse_kl"}, "rows": "student"}
    as_array = lambda values: values.astype(np.float32)[None, None]
    expected = step({"exact": exact}, as_array(logits), as_array(teacher), one)[1][0, 0]
    error = found.std(axis=0, ddof=1) / len(found) ** 0.5
    assert np.all(np.abs(found.mean(axis=0) - expected) < 4 * error)
    assert np.all(error < 0.3 * np.abs(expected).max()), "too noisy to tell"


def test_a_policy_that_makes_no_sense_is_named():
    wrong = ({"baseline": "v"}, "policy.baseline='v'"), ({"discount": 2.0}, "policy.discount")
    for policy, message in (*wrong, ({"length_normalised": True}, "baseline='kl' is the mean of a token's own reward")):
        specs = opd.get_config("smoke").objective.terms
        specs.distil.policy.update(policy)
        with pytest.raises(ValueError, match=message):
            make_terms(specs)
