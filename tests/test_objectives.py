"""Terms, their averages, and what a wrong one is told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import assistants, divergences
from kd_jax.objectives import cross_entropy, make_terms, token_coefficients, token_loss

TERM = dict(
    kind="divergence", divergence={"name": "forward_kl"}, assistant=None, pair=("teacher", "student"),
    stop_gradient=False, weight=0.0, coefficient=1.0, rows="all", average="token", importance=False,
)  # fmt: skip
MASK = np.array([[True, True, False, False], [True, False, False, False], [False, False, False, False]])


@pytest.mark.parametrize("average", ["token", "sequence"])
def test_coefficients_give_the_average(average):
    loss = np.arange(12.0).reshape(3, 4)
    token, sequence = loss[MASK].mean(), np.mean([loss[0, :2].mean(), loss[1, 0]])
    found = float((token_coefficients(average, jnp.array(MASK)) * loss).sum())
    assert found == pytest.approx(token if average == "token" else sequence, rel=1e-6)


@pytest.mark.parametrize("average", ["token", "sequence"])
def test_nothing_to_count_is_zero(average):
    assert not np.any(token_coefficients(average, jnp.zeros((2, 3), bool)))


def test_cross_entropy_is_minus_the_log_probability():
    log_q = jax.nn.log_softmax(jnp.array([[0.3, -1.0, 2.0], [0.0, 1.0, -jnp.inf]]))
    target = jnp.array([2, 0])
    np.testing.assert_allclose(cross_entropy(log_q, target), [-log_q[0, 2], -log_q[1, 0]], rtol=1e-6)
    gradient = jax.grad(lambda z: cross_entropy(jax.nn.log_softmax(z), target).sum())(jnp.zeros((2, 3)))
    np.testing.assert_allclose(gradient, np.full((2, 3), 1 / 3) - np.eye(3)[np.array([2, 0])], rtol=1e-5)


def test_hard_labels_undo_the_temperature():
    logits, target = jnp.array([[0.3, -1.0, 2.0]]), jnp.array([1])
    (term,) = make_terms({"ce": TERM | {"kind": "hard_labels"}}, temperature=3.0)
    found = term.loss(None, jax.nn.log_softmax(logits / 3), target, 0.0)
    np.testing.assert_allclose(found, cross_entropy(jax.nn.log_softmax(logits), target), rtol=1e-6)


def test_the_pair_and_the_stopped_gradient():
    log_p, log_q = jax.nn.log_softmax(jnp.array([[0.0, 1.0, 2.0], [1.0, -1.0, 0.5]]))
    mix = assistants.arithmetic_mixture
    skew = token_loss(divergences.forward_kl, mix, ("teacher", "assistant"))
    np.testing.assert_allclose(skew(log_p, log_q, 0.1), divergences.skew_forward_kl(log_p, log_q, skew=0.1), rtol=1e-5)
    cut = token_loss(divergences.forward_kl, mix, ("assistant", "student"), stop_gradient=True)
    gradient = jax.grad(lambda z: cut(log_p, jax.nn.log_softmax(z), 0.4))(log_q)
    expected = jnp.exp(log_q) - (0.4 * jnp.exp(log_p) + 0.6 * jnp.exp(log_q))  # q - r: the gradient of KL(r || q)
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"divergence": {"name": "forward_lk"}}, "did you mean 'forward_kl'"),
        ({"divergence": {"name": "skew_forward_kl", "skew": 2.0}}, "2.0"),
        ({"rows": "techer"}, "rows='techer'"),
        ({"average": "mean"}, "average='mean'"),
        ({"kind": "ce"}, "kind='ce'"),
        ({"pair": ("teacher", "assistant")}, "no assistant"),
        ({"assistant": {"name": "geometric_mixture"}}, "an assistant is given"),
        ({"pair": ("teacher", "pupil")}, "pupil"),
        ({"weight": {"name": "taid", "total_steps": 0}}, "total_steps"),
        (
            {"assistant": {"name": "geometric_mixture"}, "pair": ("teacher", "assistant"), "stop_gradient": True},
            "no gradient",
        ),
    ],
)
def test_errors_name_the_term_and_the_value(change, words):
    with pytest.raises(ValueError, match=r"objective\.terms\.distil") as error:
        make_terms({"distil": TERM | change})
    assert words in str(error.value)


def test_an_objective_needs_terms_and_a_temperature():
    with pytest.raises(ValueError, match="empty"):
        make_terms({})
    with pytest.raises(ValueError, match="temperature=0"):
        make_terms({"distil": TERM}, temperature=0)
