"""Training with a teacher of another tokenizer: terms over spans of text, and runs."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kd_jax.objectives import make_terms
from kd_jax.objectives.span_terms import OF_STUDENT
from kd_jax.teachers.aligned import Aligned, AlignedRow, aligned_arrays
from kd_jax.train_step import init_state, make_train_step
from tests.helpers.axes import CASES, arrays, closed, numbered
from tests.helpers.steps import Logits

DIVERGENCES = {
    "binary_ce": "binary_cross_entropy",
    "reverse_binary_kl": "reverse_binary_kl",
    "binary_kl_temp_limit": "poisson_kl",
    "abs": "absolute_difference",
}


@dataclasses.dataclass(frozen=True)
class Teacher(Logits):
    """A teacher whose parameters are its logits, whose tokens the batch has."""


def inputs(case, name):
    return arrays()[f"inputs/{case['inputs']}/{name}"]


def spans_of(case, model):
    chunks, first = inputs(case, "chunks"), 0 if model == "teacher" else 2
    span = np.full(inputs(case, f"{model}_ids").shape, -1)
    for row, of_row in enumerate(chunks):
        for index, chunk in enumerate(of_row):
            if chunk[0] >= 0:
                span[row, chunk[first] : chunk[first + 1]] = index
    span = np.where(inputs(case, f"{model}_mask"), span, -1)
    # The span of token 0, which has no prediction, does not count.
    return np.where(span[:, 1:] == 0, -1, span[:, 1:] - (span[:, 1:] > 0))


def batch_of(case):
    """Returns a batch of a published case. A further position holds the logits after the last token."""
    ids = inputs(case, "student_ids")
    rows = [
        AlignedRow(np.append(of_row, 0), np.append(span, -1), np.append(of_student, -1))
        for of_row, span, of_student in zip(
            inputs(case, "teacher_ids"), spans_of(case, "teacher"), spans_of(case, "student"), strict=True
        )
    ]
    length, teacher_length = ids.shape[1], inputs(case, "teacher_ids").shape[1]
    made = aligned_arrays(rows, len(rows), length=length, teacher_length=teacher_length, pad_id=0)
    ones = np.ones(ids.shape, bool)
    targets = np.pad(ids[:, 1:], ((0, 0), (0, 1)))
    return made | {"tokens": ids, "targets": targets, "mask": ones, "loss_mask": ones}


def run_step(case, term, microbatches=1, mesh=None, batch=None):
    """Returns the loss and the gradient of a training step with the logits of a published case."""
    teacher = Aligned(
        Logits(), vocab_size=inputs(case, "teacher_logits").shape[-1], begins_word=inputs(case, "teacher_space"),
        student_begins_word=inputs(case, "student_space"), mesh=mesh,
    )  # fmt: skip
    terms, tx = make_terms({"spans": {"kind": "spans"} | term}), optax.sgd(1.0)
    teacher = teacher.for_terms(terms)
    terms = teacher.terms(terms)
    student = jnp.asarray(inputs(case, "student_logits"))
    state = init_state({"logits": student}, tx, terms, jax.random.key(0))
    train_step = make_train_step(
        Logits(), teacher, terms, tx, vocab_size=student.shape[-1], microbatches=microbatches, mesh=mesh
    )
    params = {"logits": jnp.asarray(inputs(case, "teacher_logits"))}
    new, metrics = jax.jit(train_step)(state, params, batch_of(case) if batch is None else batch)
    return float(metrics["loss"][0]), np.asarray(student - new.params["logits"]), metrics


def term_of(case):
    op = case["op"]
    divergence = {"name": DIVERGENCES[op["difference"]]}
    if op["difference"] not in ("abs", "binary_kl_temp_limit"):
        divergence["temperature"] = op["temperature"]
    spans = {"name": "likelihood", "divergence": divergence, "word_ends": op["append_space"]}
    return {"spans": spans | {"join_at_most": op["merge_above"] or 0.0}}


@pytest.mark.parametrize("key", numbered(closed(154, 160)))
def test_published_loss_and_gradient_of_a_step(key):
    case = CASES[key]
    with jax.enable_x64(True):
        loss, gradient, metrics = run_step(case, term_of(case))
    expected = arrays()[f"{key}/grad"]
    np.testing.assert_allclose(loss, arrays()[f"{key}/loss"], rtol=1e-9)
    np.testing.assert_allclose(gradient, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())
    np.testing.assert_allclose(metrics["spans/loss"][0] / metrics["spans/loss"][1], loss, rtol=1e-6)
