"""Terms, their averages, and the error messages of wrong terms."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from kd_jax import assistants, divergences
from kd_jax.objectives import ORIGINS, cross_entropy, make_terms, token_coefficients, token_loss
from kd_jax.run.build import make_objective
from kd_jax.settings import Settings
from tests.helpers.runs import smoke
from tests.helpers.steps import TERM, B, V, batch, step

MIX = {"assistant": {"name": "geometric_mixture"}, "pair": ("teacher", "assistant")}
ENTROPY = {"divergence": {"name": "entropy"}, "pair": ("student",)}
SKEW = {"name": "distillm2_skew", "reference_steps": 1}


def loss_of(term, log_p, log_q, weight=0.0, **arrays):
    """Returns the loss of a term, for log-probabilities, which are valid logits."""
    weights = {"weight": jnp.full(log_q.shape[:-1], weight)}
    return term.loss({"teacher": log_p, "student": log_q}, jnp.zeros(log_q.shape[:-1], int), weights | arrays)


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


def test_terms_that_divide_the_rows_add_up_to_the_average_of_the_batch():
    """A row of plain text belongs to another stream, and does not count in the divisor."""
    specs = {name: TERM | {"where": {"domain": name}, "average": "batch_token"} for name in ("math", "code")}
    made = batch()
    is_math = np.broadcast_to((np.arange(B) < 3)[:, None], made["loss_mask"].shape)
    made |= {"where_math": is_math, "where_code": ~is_math, "origin": np.array([0] * (B - 1) + [ORIGINS.index("text")])}
    random = np.random.default_rng(0)
    student, teacher = random.normal(size=(2, *made["targets"].shape, V)).astype(np.float32)
    found, found_gradient = step(specs, student, teacher, made)
    expected, gradient = step({"both": TERM}, student, teacher, made)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(found_gradient, gradient, atol=1e-7)


def test_an_average_over_the_batch_refuses_the_divisor_of_a_rule():
    rule = {"name": "first", "count": 1, "divide_by": "kept"}
    with pytest.raises(ValueError, match="batch_token.*tokens.divide_by is 'kept'"):
        make_terms({"term": TERM | {"average": "batch_token", "tokens": rule}})


def test_cross_entropy_is_minus_the_log_probability():
    log_q = jax.nn.log_softmax(jnp.array([[0.3, -1.0, 2.0], [0.0, 1.0, -jnp.inf]]))
    target = jnp.array([2, 0])
    np.testing.assert_allclose(cross_entropy(log_q, target), [-log_q[0, 2], -log_q[1, 0]], rtol=1e-6)
    gradient = jax.grad(lambda z: cross_entropy(jax.nn.log_softmax(z), target).sum())(jnp.zeros((2, 3)))
    np.testing.assert_allclose(gradient, np.full((2, 3), 1 / 3) - np.eye(3)[np.array([2, 0])], rtol=1e-5)


def test_hard_labels_undo_the_temperature():
    logits, target = jnp.array([[0.3, -1.0, 2.0]]), jnp.array([1])
    (term,) = make_terms({"ce": TERM | {"kind": "hard_labels"}}, temperature=3.0)
    found = term.loss({"student": logits / 3}, target, {})
    np.testing.assert_allclose(found, cross_entropy(jax.nn.log_softmax(logits), target), rtol=1e-6)


def test_the_pair_and_the_stopped_gradient():
    log_p, log_q = jax.nn.log_softmax(jnp.array([[0.0, 1.0, 2.0], [1.0, -1.0, 0.5]]))
    mix = assistants.arithmetic_mixture
    skew = token_loss(divergences.forward_kl, mix, ("teacher", "assistant"))
    np.testing.assert_allclose(skew(log_p, log_q, 0.1), divergences.skew_forward_kl(log_p, log_q, skew=0.1), rtol=1e-5)
    cut = token_loss(divergences.forward_kl, mix, ("assistant", "student"), stop_gradient=True)
    gradient = jax.grad(lambda z: cut(log_p, jax.nn.log_softmax(z), 0.4))(log_q)
    expected = jnp.exp(log_q) - (0.4 * jnp.exp(log_p) + 0.6 * jnp.exp(log_q))  # the gradient q - r of KL(r || q)
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def unreduced(log_p, log_q):
    return log_p - log_q


def gap(log_p, log_q, *, power=1.0):
    return ((log_p - log_q) ** 2).sum(axis=-1) ** power


def nearer(log_p, log_q, weight, *, sharpness):
    return jax.nn.log_softmax(sharpness * (weight * log_p + (1 - weight) * log_q))


def test_a_divergence_and_an_assistant_of_another_module():
    log_p, log_q = jax.nn.log_softmax(jnp.array([[0.0, 1.0, 2.0], [1.0, -1.0, 0.5]]))
    sharpness = {"name": "linear_schedule", "init_value": 1.0, "end_value": 2.0, "transition_steps": 1}
    change = {
        "divergence": {"name": f"{__name__}:gap", "power": 2.0},
        "assistant": {"name": f"{__name__}:nearer", "sharpness": sharpness},
        "pair": ("assistant", "student"),
    }
    (term,) = make_terms({"distil": TERM | change})
    expected = gap(nearer(log_p, log_q, 0.3, sharpness=1.5), log_q, power=2.0)
    np.testing.assert_allclose(
        loss_of(term, log_p, log_q, 0.3, **{"assistant.sharpness": jnp.asarray(1.5)}), expected, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"divergence": {"name": "forward_lk"}}, "did you mean 'forward_kl'"),
        ({"divergence": {"name": "skew_forward_kl", "skew": 2.0}}, "2.0"),
        ({"rows": "techer"}, "rows='techer'"),
        ({"average": "mean"}, "average='mean'"),
        ({"kind": "ce"}, "kind='ce'"),
        ({"divergence": f"{__name__}:unreduced"}, "returns an array of shape (2,), but it must sum over the last axis"),
        ({"divergence": "nowhere:mine"}, "cannot be imported"),
        ({"pair": ("teacher", "assistant")}, "no assistant"),
        ({"assistant": {"name": "geometric_mixture"}}, "an assistant is given"),
        ({"pair": ("teacher", "pupil")}, "pupil"),
        ({"pair": ("student", "student")}, "must be two different names"),
        ({"pair": ("student",)}, "the functions of one distribution are entropy"),
        ({"divergence": {"name": "entropy"}}, "the functions of one distribution are entropy"),
        (ENTROPY | {"pair": ("teacher",)}, "no gradient"),
        (ENTROPY | {"vocabulary": {"support": "teacher_top_k", "k": 2}}, "use student_top_k"),
        (ENTROPY | {"temperature": "own_deviation"}, "compares others"),
        (MIX | {"weight": {"name": "taid", "total_steps": 0}}, "total_steps"),
        (MIX | {"weight": 1.5}, "1.5"),
        ({"weight": 0.5}, "there is no assistant for weight=0.5"),
        ({"weight": SKEW}, "there is no assistant"),
        ({"stop_gradient": True}, "set weight=0.0 and stop_gradient=False"),
        (MIX | {"kind": "hard_labels"}, "goes with kind='divergence', not with kind='hard_labels'"),
        ({"divergence": None}, "None is not a spec"),
        ({"coefficient": [1.0]}, "[1.0] is not a spec"),
        ({"kind": "hard_labels", "importance": True}, "importance=True goes with kind='divergence'"),
        (MIX | {"weight": SKEW, "rows": "student"}, "rows='teacher', but is the weight of a term with rows='student'"),
        ({"coefficient": SKEW, "rows": "teacher"}, "but is another number"),
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


@pytest.mark.parametrize("rest", ["whole", "renormalised", "tail", "dropped"])
def test_the_entropy_of_the_student_needs_no_teacher(rest):
    """Compares with sums in NumPy, also for a token that the student cannot give."""
    logits = np.array([[0.3, -1.0, 2.0, 0.9], [0.0, 1.0, -np.inf, 2.0]])
    support = {"support": "whole"} if rest == "whole" else {"support": "student_top_k", "k": 2, "rest": rest}
    (term,) = make_terms({"entropy": ENTROPY | {"vocabulary": support, "temperature": 2.0}})
    assert not term.needs_teacher and term.members == ()
    with jax.enable_x64(True):
        loss = lambda z: term.loss({"student": z}, jnp.zeros(2, int), {})
        found, slope = loss(jnp.asarray(logits)), jax.grad(lambda z: loss(z).sum())(jnp.asarray(logits))
    for row, value in zip(logits, found, strict=True):
        q = np.exp(row / 2) / np.exp(row / 2).sum()
        top = np.sort(q)[-2:]
        q = {"whole": q, "renormalised": top / top.sum(), "tail": [*top, 1 - top.sum()], "dropped": top}[rest]
        q = np.array(q)[np.array(q) > 0]
        np.testing.assert_allclose(value, -(q * np.log(q)).sum(), rtol=1e-12)
    assert np.all(np.isfinite(slope)) and np.abs(slope).max() > 1e-3


def test_an_entropy_that_is_always_zero_is_refused():
    config = smoke("tsd_kd", "unused")
    config.objective.terms.entropy.vocabulary = {"support": "student_top_k", "k": 1, "rest": "renormalised"}
    with pytest.raises(ValueError, match=r"objective\.terms\.entropy does not depend on the student"):
        make_objective(Settings.parse(config))
    config.objective.terms.entropy.vocabulary["k"] = 2
    make_objective(Settings.parse(config))


ENDS = {"alpha_mixture(alpha=-1)": "arithmetic_mixture", "alpha_mixture(alpha=1)": "geometric_mixture"}


@pytest.mark.parametrize("spec", ENDS)
@pytest.mark.parametrize("pair", [("teacher", "assistant"), ("assistant", "student"), ("student", "assistant")])
def test_amid_at_its_ends_is_the_skew_and_the_geometric_form(spec, pair):
    log_p, log_q = jax.nn.log_softmax(jnp.array([[0.0, 1.0, 2.0], [1.0, -1.0, 0.5]]))
    specs = {name: TERM | {"assistant": {"name": name}, "pair": pair, "weight": 0.1} for name in (spec, ENDS[spec])}
    one, other = (
        jax.value_and_grad(lambda z, term=term: loss_of(term, log_p, z, 0.1).sum())(log_q) for term in make_terms(specs)
    )
    np.testing.assert_allclose(one[0], other[0], rtol=1e-5)
    np.testing.assert_allclose(one[1], other[1], atol=1e-6)


def test_gkd_and_distillm_at_their_ends_are_the_kls():
    log_p, log_q = jax.nn.log_softmax(jnp.array([[0.0, 1.0, 2.0], [1.0, -1.0, 0.5]]))
    scaled = {  # the Jensen-Shannon divergence tends to 0 at the ends, and divided by its weight it tends to the KL
        "forward": ("jensen_shannon(weight=1e-4)", 1e4), "reverse": ("jensen_shannon(weight=0.9999)", 1e4),
        "distillm": ("skew_forward_kl(skew=0.0)", 1.0), "distillm_reverse": ("skew_reverse_kl(skew=0.0)", 1.0),
    }  # fmt: skip
    terms = make_terms({name: TERM | {"divergence": spec} for name, (spec, _) in scaled.items()})
    for term, (_, scale) in zip(terms, scaled.values(), strict=True):
        kl = divergences.reverse_kl if "reverse" in term.name else divergences.forward_kl
        found = jax.value_and_grad(lambda z, t=term: loss_of(t, log_p, z))(log_q)
        expected = jax.value_and_grad(lambda z, kl=kl: kl(log_p, jax.nn.log_softmax(z)))(log_q)
        tolerance = 1e-5 if scale == 1 else 3e-3
        np.testing.assert_allclose(scale * found[0], expected[0], rtol=tolerance)
        np.testing.assert_allclose(scale * found[1], expected[1], atol=tolerance)


def test_an_assistants_keyword_may_have_a_schedule():
    alpha = {"name": "linear_schedule", "init_value": -5.0, "end_value": 3.0, "transition_steps": 8}
    changes = {"pair": ("teacher", "assistant"), "weight": 0.3}
    log_p, log_q = jax.nn.log_softmax(jnp.array([[0.0, 1.0, 2.0], [1.0, -1.0, 0.5]]))
    (moving,) = make_terms({"it": TERM | changes | {"assistant": {"name": "alpha_mixture", "alpha": alpha}}})
    for time in (0, 4, 6, 8):  # alpha is -5, -1, 1, 3
        number = moving.numbers["assistant.alpha"]((), step=jnp.asarray(time))
        fixed = {"name": "alpha_mixture", "alpha": -5.0 + time}
        (still,) = make_terms({"it": TERM | changes | {"assistant": fixed}})
        expected = loss_of(still, log_p, log_q, 0.3)
        np.testing.assert_allclose(
            loss_of(moving, log_p, log_q, 0.3, **{"assistant.alpha": number}), expected, rtol=1e-5
        )


def test_an_objective_needs_terms_and_a_temperature():
    with pytest.raises(ValueError, match="empty"):
        make_terms({})
    with pytest.raises(ValueError, match="temperature=0"):
        make_terms({"distil": TERM}, temperature=0)


def test_a_term_of_a_config_that_was_read_from_json_has_lists():
    for term in (base.hard_labels(), base.term(), base.term(kind="policy_gradient")):
        make_terms({"it": json.loads(json.dumps(term.to_dict()))})
