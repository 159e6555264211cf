"""Divergences of the likelihoods of spans, and distances between different vocabularies, against published values."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_jax import span_divergences, spans
from tests.helpers.axes import CASES, arrays, closed, inputs, numbered, span_of_positions

DIVERGENCES = {
    "binary_ce": "binary_cross_entropy",
    "reverse_binary_kl": "reverse_binary_kl",
    "binary_kl_temp_limit": "poisson_kl",
    "abs": "absolute_difference",
}


def likelihoods(case, model, logits):
    log_probs = jax.nn.log_softmax(logits)
    ids = jnp.asarray(inputs(case, f"{model}_ids"))[:, 1:, None]
    tokens = jnp.take_along_axis(log_probs[:, :-1], ids, axis=-1)[..., 0]
    after = None
    if f"{model}_space" in case["uses"]:
        begins = jnp.where(inputs(case, f"{model}_space"), log_probs, -jnp.inf)
        after = jax.nn.logsumexp(begins, axis=-1)[:, 1:]
    return spans.Likelihoods(tokens, jnp.asarray(span_of_positions(case, model)), after)


def likelihood_loss(case, logits):
    op = case["op"]
    teacher, student = (
        likelihoods(case, "teacher", inputs(case, "teacher_logits")),
        likelihoods(case, "student", logits),
    )
    if op["merge_above"] is not None:
        teacher, student = spans.join_spans(teacher, student, op["merge_above"])
    if not op["append_space"]:
        teacher, student = teacher._replace(after=None), student._replace(after=None)
    count = teacher.span.shape[1]
    tokens = spans.sums(jnp.ones_like(teacher.tokens), teacher.span, count)
    keywords = {} if op["difference"] in ("abs", "binary_kl_temp_limit") else {"temperature": op["temperature"]}
    divergence = partial(getattr(span_divergences, DIVERGENCES[op["difference"]]), **keywords)
    log_p, log_q = (spans.log_likelihoods(model, count) for model in (teacher, student))
    weights = jnp.where(tokens > 0, tokens if op["weights"] == "token_count" else 1.0, 0.0)
    is_used = tokens > 0
    values = divergence(jnp.where(is_used, log_p, -1.0), jnp.where(is_used, log_q, -1.0))
    return jnp.sum(weights * values) / jnp.sum(weights)


@pytest.mark.parametrize("key", numbered(closed(154, 161)))
def test_published_divergences_of_likelihoods(key):
    case = CASES[key]
    with jax.enable_x64(True):
        of_logits = jax.jit(jax.value_and_grad(partial(likelihood_loss, case)))
        loss, gradient = of_logits(jnp.asarray(inputs(case, "student_logits")))
    assert_published(key, loss, gradient)


def chunks_of_row(case, row):
    """Returns the ranges of the tokens of each chunk of a row: teacher's first and end, student's first and end."""
    chunks = [
        [max(first, 1), end, max(start, 1), stop] for first, end, start, stop in inputs(case, "chunks")[row].tolist()
    ]
    chunks = [chunk for chunk in chunks if chunk[1] > 1 and chunk[3] > 1]
    if case["op"]["aligned"]:
        return chunks
    length = min(max(chunk[1] for chunk in chunks), max(chunk[3] for chunk in chunks))
    return [[i, i + 1, i, i + 1] for i in range(1, length)]


def merged(case, log_probs, ids, first, end):
    """Returns the log-probabilities of a chunk's merged distribution, as the published code merges it."""
    picked = lambda token, position: log_probs[position, ids[token]]
    if case["op"]["merge"] == "bayesian":
        return log_probs[end - 2] + sum(picked(token, token - 1) for token in range(first, end - 1))
    # The published code reads the logits one position late.
    return log_probs[first] + sum(picked(token, token) for token in range(first + 1, end))


def sorted_loss(case, logits):
    temperatures = case["op"]["temperatures"]
    log_p = jax.nn.log_softmax(inputs(case, "teacher_logits") / temperatures["teacher"])
    log_q = jax.nn.log_softmax(logits / temperatures["student"])
    rows = []
    for row in range(len(logits)):
        values = [
            spans.sorted_distance(
                merged(case, log_p[row], inputs(case, "teacher_ids")[row], *chunk[:2]),
                merged(case, log_q[row], inputs(case, "student_ids")[row], *chunk[2:]),
            )
            for chunk in chunks_of_row(case, row)
        ]
        rows.append(sum(values) / len(values))
    return sum(rows) / len(rows)


@pytest.mark.parametrize("key", numbered(closed(162, 165)))
def test_published_sorted_distances(key):
    case = CASES[key]
    with jax.enable_x64(True):
        loss, gradient = jax.value_and_grad(partial(sorted_loss, case))(jnp.asarray(inputs(case, "student_logits")))
    assert_published(key, loss, gradient)


def assert_published(key, loss, gradient):
    expected = arrays()[f"{key}/grad"]
    np.testing.assert_allclose(loss, arrays()[f"{key}/loss"], rtol=1e-9)
    np.testing.assert_allclose(gradient, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())


@pytest.mark.parametrize("name", span_divergences.__all__)
@given(log_p=st.floats(-200, 0), log_q=st.floats(-200, 0))
@settings(max_examples=30, deadline=None)
def test_divergences_are_finite_and_least_at_equality(name, log_p, log_q):
    divergence = getattr(span_divergences, name)
    value, slope = jax.value_and_grad(divergence, argnums=1)(jnp.float32(log_p), jnp.float32(log_q))
    assert np.isfinite(value) and np.isfinite(slope)
    assert value >= divergence(jnp.float32(log_p), jnp.float32(log_p)) - 1e-4 * (1 + abs(value))


@pytest.mark.parametrize("name", ["binary_kl", "reverse_binary_kl", "poisson_kl", "absolute_difference"])
def test_equal_likelihoods_have_no_divergence(name):
    with jax.enable_x64(True):
        value = getattr(span_divergences, name)(jnp.array([-3.0, -1e-3, 0.0]), jnp.array([-3.0, -1e-3, 0.0]))
    np.testing.assert_allclose(value, 0, atol=1e-15)


def test_the_limit_of_large_temperatures():
    with jax.enable_x64(True):
        log_p, log_q = jnp.array([-1.0, -7.0]), jnp.array([-4.0, -0.5])
        value = 1e4 * span_divergences.binary_kl(log_p, log_q, temperature=1e4)
        np.testing.assert_allclose(value, span_divergences.poisson_kl(log_p, log_q), rtol=0.02)


def test_a_temperature_must_be_positive():
    with pytest.raises(ValueError, match="temperature"):
        span_divergences.binary_kl(jnp.zeros(1), jnp.zeros(1), temperature=0.0)


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=8), st.integers(0, 5), st.randoms())
@settings(max_examples=30, deadline=None)
def test_the_sorted_distance_ignores_order_and_tokens_of_no_probability(weights, extra, random):
    with jax.enable_x64(True):
        p = np.array(weights) / np.sum(weights)
        shuffled = [*p, *[0.0] * extra]
        random.shuffle(shuffled)
        log = lambda values: jnp.log(jnp.array(values))
        np.testing.assert_allclose(spans.sorted_distance(log(p), log(shuffled)), 0, atol=1e-12)
        other = np.ones(len(p) + extra) / (len(p) + extra)
        expected = np.abs(np.sort(np.pad(p, (0, extra))) - np.sort(other)).sum()
        np.testing.assert_allclose(spans.sorted_distance(log(p), log(other)), expected, atol=1e-12)
