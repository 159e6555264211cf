"""Training with a teacher of another tokenizer: terms over spans of text, and runs."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from kd_jax import data, models, train
from kd_jax.data.alignment import ByteReader
from kd_jax.objectives import make_terms
from kd_jax.objectives.span_terms import OF_STUDENT
from kd_jax.teachers.aligned import Aligned, AlignedRow, aligned_arrays
from kd_jax.train_step import init_state, make_train_step
from tests.helpers.axes import CASES, arrays, closed, numbered
from tests.helpers.folders import llama
from tests.helpers.runs import smoke
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


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    """A small teacher with a tokenizer like Llama 2's."""
    folder = tmp_path_factory.mktemp("models") / "teacher"
    tokenizer = data.Tokenizer.load(llama(tmp_path_factory.mktemp("tokenizer")))
    sizes = dict(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=32, max_positions=256)
    model = models.from_config(models.ModelConfig(family="llama", vocab_size=tokenizer.vocab_size + 3, **sizes))
    models.save_pretrained(folder, model, model.init(jax.random.key(5)), tokenizer)
    return folder


LIKELIHOOD = {"name": "likelihood", "divergence": {"name": "binary_kl", "temperature": 10.0}}


def config_of(data_dir, folder, spans=LIKELIHOOD, **changes):
    """Returns the config of a run with a teacher whose tokenizer differs from the student's."""
    config = smoke("sft", data_dir, teacher__path=str(folder), tokenizer__path="package:docstrings_teacher")
    base.set_terms(config, spans=base.term(kind="spans", spans=spans))
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return config


def check_spans(run, batch):
    """Checks that the tokens of each span of a batch are the same text in both models. Returns the number of spans."""
    student, teacher = run.tokenizer, run.models.writer.tokenizer
    count = 0
    for i, of_student in enumerate(batch[OF_STUDENT]):
        of_teacher = batch["teacher_span_of_teacher"][i]
        assert set(of_student.tolist()) == set(of_teacher.tolist()) | {-1}
        for index in range(of_student.max() + 1):
            ids = batch["targets"][i][of_student == index], batch["teacher_span_targets"][i][of_teacher == index]
            texts = [ByteReader(tokenizer).join(row.tolist()) for tokenizer, row in zip((student, teacher), ids, strict=True)]
            if index == of_student.max() and ids[0][-1] == student.eos_id:
                assert ids[1].tolist() == [teacher.eos_id]
            else:
                assert texts[0].strip() == texts[1].strip() and len(texts[1]) - len(texts[0]) in (0, 1)
            count += 1
        assert np.all(batch["loss_mask"][i][of_student >= 0])
    return count


@pytest.mark.usefixtures("one_device")
def test_off_policy_rows_are_aligned(data_dir, teacher_folder):
    run = train.build(config_of(data_dir, teacher_folder))
    batch = run.feed.next(0, None)
    assert check_spans(run, batch) > 40
    prompts = [row[mask].tolist() for row, mask in zip(batch["teacher_span_tokens"], batch["teacher_span_mask"], strict=True)]
    assert all(ids[0] == run.models.writer.tokenizer.bos_id for ids in prompts)


@pytest.mark.usefixtures("one_device")
def test_responses_of_the_student_are_aligned(data_dir, teacher_folder):
    run = train.build(config_of(data_dir, teacher_folder, prefixes={"name": "student"}))
    params = run.init_state().params
    batch = run.feed.next(0, params)
    assert check_spans(run, batch) > 20
    state, metrics = run.train_step(run.init_state(), run.models.frozen_params, run.put(batch))
    assert np.isfinite(metrics["loss"][0]) and metrics["loss"][0] > 0
