"""Further frozen models: their place in the step, their loading by a run, and their errors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from kd_jax import train
from kd_jax.objectives import make_terms
from kd_jax.optimizer import Follow, with_followers
from kd_jax.train_step import init_state, make_train_step
from tests.helpers.runs import smoke
from tests.helpers.steps import Logits

RANDOM = np.random.default_rng(0)
LOGITS = {name: RANDOM.normal(size=(2, 3, 7)) for name in ("student", "teacher", "reference")}
BATCH = dict(
    tokens=np.zeros((2, 3), np.int32), targets=RANDOM.integers(0, 7, (2, 3)).astype(np.int32),
    mask=np.ones((2, 3), bool), loss_mask=np.ones((2, 3), bool),
)  # fmt: skip


def loss_and_gradient(specs):
    """Returns the loss of a step with the members teacher and reference, and the gradient of the student's logits."""
    with jax.enable_x64(True):
        terms, tx = make_terms(specs, members=("reference",)), optax.sgd(1.0)
        params = {"logits": jnp.asarray(LOGITS["student"])}
        frozen = {name: Logits() for name in ("teacher", "reference")}
        step = make_train_step(Logits(), frozen, terms, tx, vocab_size=7)
        state = init_state(params, tx, terms, jax.random.key(0))
        new, metrics = jax.jit(step)(state, {name: {"logits": jnp.asarray(LOGITS[name])} for name in frozen}, BATCH)
        return float(metrics["loss"][0]), np.asarray(params["logits"] - new.params["logits"])


def written_out(loss):
    """Returns the mean over tokens of loss(log-probabilities by name), and its gradient in the student's logits."""
    with jax.enable_x64(True):
        frozen = {name: jax.nn.log_softmax(jnp.asarray(values)) for name, values in LOGITS.items()}
        mean = lambda student: loss(frozen | {"student": jax.nn.log_softmax(student)}).mean()
        value, gradient = jax.value_and_grad(mean)(jnp.asarray(LOGITS["student"]))
        return float(value), np.asarray(gradient)


def kl(log_p, log_q):
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def mixture(a, b, w):
    return jnp.log(w * jnp.exp(a) + (1 - w) * jnp.exp(b))


BETWEEN = {"assistant": {"name": "extrapolation"}, "between": ("reference", "teacher"), "weight": 1.25}
AMONG = {"assistant": {"name": "arithmetic_mixture"}, "weights": {"teacher": 0.7, "reference": 0.3}}
PAIR = {"pair": ("assistant", "student")}
CASES = {
    "a member of the pair": ({"pair": ("reference", "student")}, lambda m: kl(m["reference"], m["student"])),
    "beyond the teacher": (
        BETWEEN | PAIR,
        lambda m: kl(jax.nn.log_softmax(1.25 * m["teacher"] - 0.25 * m["reference"]), m["student"]),
    ),
    "a mean of two": (AMONG | PAIR, lambda m: kl(mixture(m["teacher"], m["reference"], 0.7), m["student"])),
    "the student among three": (
        {
            "assistant": {"name": "geometric_mixture"}, "pair": ("teacher", "assistant"),
            "weights": {"teacher": 0.2, "reference": 0.3, "student": 0.5},
        },
        lambda m: kl(
            m["teacher"], jax.nn.log_softmax(0.2 * m["teacher"] + 0.3 * m["reference"] + 0.5 * m["student"])
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_loss_is_that_of_full_distributions(case):
    change, expected = CASES[case]
    found, wanted = loss_and_gradient({"distil": change}), written_out(expected)
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-12)
    np.testing.assert_allclose(found[1], wanted[1], atol=1e-14)


def test_the_reward_of_a_policy_gradient_may_weigh_several_members():
    own = dict(discount=0.0, include_current=True, length_normalised=False, clip=0.0)
    specs = {"distil": {"kind": "policy_gradient", "policy": own | {"members": {"teacher": 1.25, "reference": -0.25}}}}
    picked = lambda values: jnp.take_along_axis(values, jnp.asarray(BATCH["targets"])[..., None], -1)[..., 0]

    def expected(m):
        reward = 1.25 * picked(m["teacher"]) - 0.25 * picked(m["reference"]) - picked(m["student"])
        return -jax.lax.stop_gradient(reward) * picked(m["student"])

    np.testing.assert_allclose(loss_and_gradient(specs)[1], written_out(expected)[1], atol=1e-14)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pair": ("second", "student")}, "pair=('second', 'student') must be two different names out of"),
        ({"pair": ("reference", "teacher")}, "no gradient"),
        (BETWEEN | PAIR | {"between": ("reference", "other")}, "between=('reference', 'other')"),
        (AMONG | PAIR | {"weights": {"teacher": 0.7, "reference": 0.4}}, "sum to 1.1"),
        (AMONG | PAIR | {"weights": {"teacher": 0.7, "third": 0.3}}, "define members.third"),
        (AMONG | PAIR | {"weights": {"teacher": 1.5, "reference": -0.5}}, "weights.teacher must be between 0 and 1"),
        (AMONG | PAIR | {"weight": 0.5}, "weight=0.0"),
        (AMONG | PAIR | {"assistant": {"name": "alpha_mixture", "alpha": 0.0}}, "is between two members"),
        ({"kind": "policy_gradient", "policy": {"members": {"other": 1.0}}}, "define members.other"),
        ({"kind": "policy_gradient", "policy": {"members": {}}}, "no coefficient other than 0"),
    ],
)
def test_errors_name_the_term_and_the_value(change, words):
    with pytest.raises(ValueError, match=r"objective\.terms\.distil") as error:
        make_terms({"distil": change}, members=("reference",))
    assert words in str(error.value)


def test_a_missing_member_is_an_error_before_the_step():
    terms = make_terms({"distil": {"pair": ("reference", "student")}}, members=("reference",))
    with pytest.raises(ValueError, match=r"define members\.reference"):
        make_train_step(Logits(), {"teacher": Logits()}, terms, optax.sgd(1.0), vocab_size=7)


def test_a_run_loads_the_student_before_training_as_a_member(data_dir):
    config = smoke("forward_kl", data_dir, mesh__data=-1)
    config.members.start = base.member(path="student")
    config.objective.terms.distil.pair = ("start", "student")
    run = train.build(config)
    state = run.init_state()
    first = jax.device_get(run.models.member_params["start"])
    batch = run.batch(0, state.params)
    jax.tree.map(np.testing.assert_array_equal, first, jax.device_get(state.params))
    state, metrics = run.train_step(state, run.models.frozen_params, batch)
    assert float(metrics["distil/loss"][0]) == pytest.approx(0, abs=1e-5)  # before the first update both are equal


@pytest.mark.parametrize(
    ("member", "words"),
    [
        ({"path": ""}, "members.second.path is empty"),
        ({"path": "nowhere/at/all"}, "members.second.path"),
        ({"folder": "x"}, "members.second has no key 'folder'"),
        ({"path": "student", "dtype": "int4"}, "members.second.dtype"),
    ],
)
def test_a_wrong_member_is_an_error_that_names_the_key(data_dir, member, words):
    config = smoke("forward_kl", data_dir, mesh__data=-1)
    with config.unlocked():
        config.members.second = member
    with pytest.raises(ValueError, match=words.replace(".", r"\.")):
        train.build(config)


def test_a_teacher_that_follows_the_student_is_a_part_of_the_state(data_dir):
    config = smoke("forward_kl", data_dir, mesh__data=-1)
    config.teacher.path, config.teacher.follow, config.tokenizer.path = "student", 0.25, "package:docstrings_teacher"
    # The loss of the divergence is 0 at first. The hard labels move the student.
    base.set_terms(config, distil=base.term(temperature=2.0), labels=base.hard_labels())
    run = train.build(config)
    state = run.init_state()
    start = jax.device_get(state.params)
    state, metrics = run.train_step(state, run.models.frozen_params, run.batch(0, state.params))
    assert float(metrics["distil/loss"][0]) == pytest.approx(0, abs=1e-4)
    followed, student = jax.device_get((state.opt_state.followers["teacher"], state.params))
    average = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, start, student)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), followed, average)
    _, metrics = run.train_step(state, run.models.frozen_params, run.batch(1, state.params))
    assert float(metrics["distil/loss"][0]) > 0  # the teacher is behind the student


@pytest.mark.parametrize("follow", [Follow(0.05, every=3), Follow(0.1, copy_first=True), Follow(1.0)])
def test_an_average_is_that_of_a_loop(follow):
    students = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
    tx = with_followers(optax.sgd(1.0), {"teacher": follow})
    params = jnp.asarray(students[0])
    state, expected = tx.init(params), students[0]
    for step, student in enumerate(students[1:], start=1):
        updates, state = tx.update(params - student, state, params)
        params = optax.apply_updates(params, updates)
        if step == 1 and follow.copy_first:
            expected = student
        elif step % follow.every == 0:
            expected = (1 - follow.rate) * expected + follow.rate * student
        np.testing.assert_allclose(state.followers["teacher"], expected, rtol=1e-5, atol=1e-6)


def test_only_the_student_can_follow_the_student(data_dir):
    config = smoke("forward_kl", data_dir, mesh__data=-1, teacher__follow=0.1)
    with pytest.raises(ValueError, match=r"teacher\.follow=0\.1.*path='student'"):
        train.build(config)
