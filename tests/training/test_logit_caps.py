"""Caps of logits in training: a step with a Gemma teacher or student is the step of full, capped logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kd_jax import models, train_step
from kd_jax.divergences import forward_kl
from kd_jax.objectives import make_terms
from kd_jax.teachers import CachedHidden, Viewed
from kd_jax.teachers.compare import compare
from tests.helpers.paths import TINY

CAPS = {"gemma2": 3.0, "gemma3_text": 4.0, "mistral": None}
VOCABULARY = 37


@functools.cache
def load(name):
    model, params = models.load_pretrained(TINY / name)
    assert model.logit_cap == model.config.logit_cap == CAPS[name]
    return model, params


def batch(rows=2, length=6):
    tokens = np.random.default_rng(0).integers(3, VOCABULARY, (rows, length + 1)).astype(np.int32)
    mask = np.ones((rows, length), bool)
    return dict(tokens=tokens[:, :-1], targets=tokens[:, 1:], mask=mask, loss_mask=mask & (np.arange(length) > 1))


def mean_of_full_logits(student, params, teacher, teacher_params, rows):
    logits = student.logits(params, rows["tokens"], rows["mask"])
    target = teacher.logits(teacher_params, rows["tokens"], rows["mask"])
    values = forward_kl(jax.nn.log_softmax(target), jax.nn.log_softmax(logits))
    return jnp.sum(jnp.where(rows["loss_mask"], values, 0)) / rows["loss_mask"].sum()


@pytest.mark.parametrize(
    ("student_name", "teacher_name"), [("gemma2", "mistral"), ("mistral", "gemma2"), ("gemma3_text", "gemma2")]
)
def test_a_step_applies_the_cap_of_each_model(student_name, teacher_name):
    (student, params), (teacher, teacher_params), rows = load(student_name), load(teacher_name), batch()
    terms, tx = make_terms({"kd": {"divergence": "forward_kl"}}, 1.0), optax.sgd(1.0)
    step = train_step.make_train_step(student, teacher, terms, tx, vocab_size=VOCABULARY)
    state = train_step.init_state(params, tx, terms, jax.random.key(0))
    new, metrics = jax.jit(step)(state, teacher_params, rows)
    loss, gradient = jax.jit(
        jax.value_and_grad(lambda params: mean_of_full_logits(student, params, teacher, teacher_params, rows))
    )(params)
    np.testing.assert_allclose(metrics["loss"][0] / metrics["loss"][1], loss, rtol=1e-5)  # (sum, count)
    jax.tree.map(
        lambda before, after, slope: np.testing.assert_allclose(before - after, slope, rtol=1e-3, atol=2e-5),
        params, new.params, gradient,
    )  # fmt: skip


def test_cached_hidden_states_and_views_have_the_cap():
    (student, params), (teacher, teacher_params), rows = load("mistral"), load("gemma2"), batch()
    hidden = teacher.hidden(teacher_params, rows["tokens"], rows["mask"]).astype(jnp.bfloat16)
    stored = {"teacher_hidden": jax.lax.bitcast_convert_type(hidden, jnp.uint16)}
    cached = CachedHidden(tied=True, logit_cap=teacher.logit_cap)
    positions = np.broadcast_to(np.arange(rows["tokens"].shape[1], dtype=np.int32), rows["tokens"].shape)
    names = ("tokens", "mask", "positions")
    values = (rows["tokens"], rows["mask"], positions)
    viewed = {f"teacher_view_teacher_{name}": value for name, value in zip(names, values, strict=True)}
    loss = lambda log_p, log_q, _: forward_kl(log_p, log_q)
    coefficient = jnp.asarray(rows["loss_mask"], jnp.float32) / rows["loss_mask"].sum()
    expected = mean_of_full_logits(student, params, teacher, teacher_params, rows)
    for found, tolerance in ((cached, 1e-2), (Viewed(teacher), 1e-5), (teacher, 1e-5)):
        total = compare(
            loss, student, params, found, teacher_params, rows | stored | viewed, coefficient, vocab_size=VOCABULARY
        )[0]
        np.testing.assert_allclose(total, expected, rtol=tolerance)
    uncapped = compare(
        loss,
        student,
        params,
        CachedHidden(tied=True),
        teacher_params,
        rows | stored,
        coefficient,
        vocab_size=VOCABULARY,
    )[0]
    assert abs(uncapped - expected) > 0.05 * expected
