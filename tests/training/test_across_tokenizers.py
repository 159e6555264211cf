"""Training with a teacher of another tokenizer: terms over spans of text, and runs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from configs import base
from kd_jax import data, models, span_divergences, spans, train
from kd_jax.data.alignment import ByteReader
from kd_jax.models.paths import folder
from kd_jax.objectives import make_terms
from kd_jax.objectives.span_terms import OF_STUDENT
from kd_jax.prefixes import rollouts
from kd_jax.teachers.aligned import Aligned, AlignedRow, aligned_arrays
from kd_jax.train_step import init_state, make_train_step
from tests.helpers.axes import CASES, arrays, closed, inputs, numbered, span_of_positions
from tests.helpers.folders import llama
from tests.helpers.runs import WHOLE, assert_same_run, smoke, until
from tests.helpers.steps import Logits

DIVERGENCES = {
    "binary_ce": "binary_cross_entropy",
    "reverse_binary_kl": "reverse_binary_kl",
    "binary_kl_temp_limit": "poisson_kl",
    "abs": "absolute_difference",
}


class Capped(Logits):
    """A model whose logits have a cap, which the model's parameters lack."""

    logit_cap = 2.0


def batch_of(case):
    """Returns a batch of a published case. A further position holds the logits after the last token."""
    ids = inputs(case, "student_ids")
    rows = [
        AlignedRow(np.append(of_row, 0), np.append(span, -1), np.append(of_student, -1))
        for of_row, span, of_student in zip(
            inputs(case, "teacher_ids"),
            span_of_positions(case, "teacher"),
            span_of_positions(case, "student"),
            strict=True,
        )
    ]
    length, teacher_length = ids.shape[1], inputs(case, "teacher_ids").shape[1]
    made = aligned_arrays(rows, len(rows), length=length, teacher_length=teacher_length, pad_id=0)
    ones = np.ones(ids.shape, bool)
    targets = np.pad(ids[:, 1:], ((0, 0), (0, 1)))
    return made | {"tokens": ids, "targets": targets, "mask": ones, "loss_mask": ones}


def run_step(case, term, microbatches=1, mesh=None, batch=None, model=None, teacher_logits=None):
    """Returns the loss and the gradient of a training step with the logits of a published case."""
    teacher = Aligned(
        model or Logits(), vocab_size=inputs(case, "teacher_logits").shape[-1], begins_word=inputs(case, "teacher_space"),
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
    logits = inputs(case, "teacher_logits") if teacher_logits is None else teacher_logits
    params = {"logits": jnp.asarray(logits)}
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


@pytest.mark.parametrize("spans", [None, {"spans": {"name": "sorted_distance"}}], ids=["likelihood", "sorted_distance"])
def test_the_cap_of_the_teachers_logits_is_applied(spans):
    case = CASES["c0154"]
    logits, cap = inputs(case, "teacher_logits"), Capped.logit_cap
    term = term_of(case) if spans is None else spans
    with jax.enable_x64(True):
        found = run_step(case, term, model=Capped())
        expected = run_step(case, term, teacher_logits=cap * np.tanh(logits / cap))
        uncapped = run_step(case, term)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-9)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-9, atol=1e-12)
    assert abs(uncapped[0] / expected[0] - 1) > 1e-3


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
            texts = [
                ByteReader(tokenizer).join(row.tolist()) for tokenizer, row in zip((student, teacher), ids, strict=True)
            ]
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
    prompts = [
        row[mask].tolist() for row, mask in zip(batch["teacher_span_tokens"], batch["teacher_span_mask"], strict=True)
    ]
    assert all(ids[0] == run.models.writer.tokenizer.bos_id for ids in prompts)


@pytest.mark.usefixtures("one_device")
def test_responses_of_the_student_are_aligned(data_dir, teacher_folder):
    run = train.build(config_of(data_dir, teacher_folder, prefixes={"name": "student"}))
    params = run.init_state().params
    batch = run.feed.next(0, params)
    assert check_spans(run, batch) > 20
    state, metrics = run.train_step(run.init_state(), run.models.frozen_params, run.put(batch))
    assert np.isfinite(metrics["loss"][0]) and metrics["loss"][0] > 0


WITH_ENDS = LIKELIHOOD | {"word_ends": True, "join_at_most": 0.4}


def whole_loss(run, batch, spec, params):
    """Returns the loss from the logits of all tokens, in one piece."""
    teacher, frozen = run.models.compared_teacher, run.models.frozen_params
    log_probs = {}
    for name, model, of_model, tokens, mask in (
        ("teacher", teacher.model, frozen, "teacher_span_tokens", "teacher_span_mask"),
        ("student", run.models.student, params, "tokens", "mask"),
    ):
        size = teacher.vocab_size if name == "teacher" else run.tokenizer.vocab_size
        hidden, (head, tied) = model.hidden(of_model, batch[tokens], batch[mask]), model.stored_head(of_model)
        log_probs[name] = jax.nn.log_softmax((hidden @ (head.T if tied else head))[..., :size])
    of_student, of_teacher = np.asarray(batch[OF_STUDENT]), np.asarray(batch["teacher_span_of_teacher"])
    picked = {
        "student": np.asarray(batch["targets"]), "teacher": np.asarray(batch["teacher_span_targets"])
    }  # fmt: skip
    begins = {"teacher": teacher.begins_word, "student": teacher.student_begins_word}
    values = []
    for row in range(len(of_student)):
        sums = {"student": 0.0, "teacher": 0.0}
        for index in range(of_student[row].max() + 1):
            at = {
                "student": np.flatnonzero(of_student[row] == index),
                "teacher": np.flatnonzero(of_teacher[row] == index),
            }
            if spec["name"] == "sorted_distance":
                values.append(
                    spans.sorted_distance(*(log_probs[name][row, at[name][0]] for name in ("teacher", "student")))
                )
                continue
            following = {name: int(where[-1]) + 1 for name, where in at.items()}
            known = following["student"] < len(of_student[row]) and batch["loss_mask"][row, following["student"]]
            known &= (
                following["teacher"] < len(of_teacher[row]) and batch["teacher_span_mask"][row, following["teacher"]]
            )
            end = {}
            for name in ("student", "teacher"):
                of_row = log_probs[name][row]
                sums[name] = sums[name] + of_row[at[name], picked[name][row, at[name]]].sum()
                end[name] = jax.nn.logsumexp(of_row[following[name]][begins[name]]) if known else 0.0
            if spec.get("join_at_most") and known and index < of_student[row].max():
                if np.exp(float(end["teacher"])) <= spec["join_at_most"]:
                    continue
            pair = [
                jnp.minimum(sums[n] + (end[n] if spec.get("word_ends") else 0.0), 0) for n in ("teacher", "student")
            ]
            values.append(span_divergences.binary_kl(*pair, temperature=spec["divergence"]["temperature"]))
            sums = {"student": 0.0, "teacher": 0.0}
    return sum(values) / len(values)


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize(
    "spec, prefixes",
    [
        pytest.param(WITH_ENDS, "data", marks=pytest.mark.slow),
        pytest.param(LIKELIHOOD, "data", marks=pytest.mark.slow),
        pytest.param({"name": "sorted_distance"}, "data", marks=pytest.mark.slow),
        pytest.param(WITH_ENDS, "student", marks=pytest.mark.slow),
        pytest.param({"name": "sorted_distance"}, "student", marks=pytest.mark.slow),
    ],
)
def test_a_step_equals_the_loss_from_all_logits(data_dir, teacher_folder, spec, prefixes):
    """Also with two microbatches on a mesh of eight devices."""
    config = config_of(data_dir, teacher_folder, spec, prefixes={"name": prefixes}, clip_norm=1e9)
    run = train.build(config)
    params = run.init_state().params
    batch = run.feed.next(0, params)
    state, metrics = run.train_step(run.init_state(), run.models.frozen_params, run.put(batch))
    expected, gradient = jax.value_and_grad(partial(whole_loss, run, batch, spec))(params)
    np.testing.assert_allclose(metrics["loss"][0], expected, rtol=2e-5)
    np.testing.assert_allclose(
        metrics["gradient_norm"][0], optax.tree.norm(gradient), rtol=1e-3
    )  # cancellation in float32
    config.update_from_flattened_dict({"microbatches": 2, "mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2})
    other = train.build(config)
    new, found = other.train_step(other.init_state(), other.models.frozen_params, other.put(batch))
    np.testing.assert_allclose(found["loss"][0], metrics["loss"][0], rtol=1e-5)
    np.testing.assert_allclose(found["gradient_norm"][0], metrics["gradient_norm"][0], rtol=1e-3)
    for a, b in zip(jax.tree.leaves(new.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.usefixtures("one_device")
def test_runs_that_need_no_common_vocabulary_have_any_teacher(data_dir, teacher_folder, tmp_path, monkeypatch):
    """The student learns from text that the teacher wrote, or only from the data."""
    own = dict(teacher__path=str(teacher_folder), tokenizer__path="package:docstrings_teacher")
    run = train.build(smoke("sft", data_dir, **own))
    assert run.models.writer is not None and run.models.teacher is None
    assert "forward_kl" not in run.evaluate(run.init_state().params)

    def answer(sampler, model, params, prompts, *args):
        """Returns rows in which the teacher answers each prompt with an emoji and its end token."""
        assert model is not run.models.student
        tokenizer, rows = sampler.tokenizer, []
        response = [*tokenizer.encode_pairs([("\n", "Say it 🙂")])[0][1], tokenizer.eos_id]
        tokens = np.full((len(prompts), sampler.max_length + 1), tokenizer.pad_id, np.int32)
        for i, prompt in enumerate(prompts):
            rows.append([*prompt, *response])
            tokens[i, : len(rows[i])] = rows[i]
        lengths, prompt_lengths = np.array([*map(len, rows)]), np.array([*map(len, prompts)])
        return dict(tokens=tokens, lengths=lengths, prompt_lengths=prompt_lengths, origin=np.ones(len(rows), np.int32))

    monkeypatch.setattr(rollouts.Sampler, "rows", answer)
    changes = own | dict(prefixes__num_rows=16, sampling__max_new_tokens=16, data__data_dir=str(tmp_path))
    run = train.build(smoke("seqkd", tmp_path, **changes))
    batch = run.feed.next(0, None)
    texts = [run.tokenizer.decode(row[mask]) for row, mask in zip(batch["targets"], batch["loss_mask"], strict=True)]
    assert set(texts) == {"Say it 🙂"}
    config = smoke("seqkd", tmp_path, **changes)
    base.set_terms(config, labels=base.hard_labels(), spans=base.term(kind="spans", spans=LIKELIHOOD))
    run = train.build(config)  # spans of the teacher's own text
    assert check_spans(run, run.feed.next(0, None)) >= 8 * 3


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(teacher__path=""), "objective.terms.spans has kind='spans', which compares the student with another model"),
        (dict(teacher__path="student"), "teacher.path='student'"),
        (dict(teacher__cache="folder"), "teacher.cache='folder' has values at the student's tokens"),
        (dict(teacher__view={"name": "template", "text": "{prompt}{response}"}), "teacher.view='template'"),
        (dict(student__init="layers", student__layers=(0,)), "student.init='layers' copies the teacher's embedding"),
        (dict(data__packing="rows"), "data.packing='rows' join rows"),
        (dict(prefixes={"name": "paired"}), "prefixes.name='paired' the teacher samples tokens"),
        (dict(sampling__teacher_share=0.2, prefixes={"name": "student"}), "sampling.teacher_share=0.2"),
        (dict(objective__temperature=2.0), "objective.temperature=2.0"),
        (dict(objective__terms__spans__spans={"name": "likelihod"}), "did you mean 'likelihood'"),
        (dict(objective__terms__spans__spans__divergence={"name": "binary_kl", "temperature": 0}), "temperature"),
        (dict(objective__terms__spans__spans__join_at_most=1.5), "join_at_most"),
        (dict(objective__terms__spans__tokens={"name": "first", "count": 2, "divide_by": "all"}), "compares spans of several"),
        (dict(objective__terms__spans__vocabulary={"support": "teacher_top_k", "k": 2}), "vocabulary=.* goes with kind='div"),
        (dict(objective__terms__kl=base.term()), "objective.terms.kl compares distributions over one vocabulary"),
        (dict(objective__terms__spans=None, objective__terms__kl=base.term()), "or compare spans of text with a term of"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(data_dir, teacher_folder, changes, message):
    config = config_of(data_dir, teacher_folder)
    for key, value in changes.items():
        *path, last = key.split("__")
        part = config
        for name in path:
            part = part[name]
        with part.unlocked():
            part[last] = ConfigDict(value) if isinstance(value, dict) else value
    with pytest.raises(ValueError, match=message):
        train.build(config)


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_a_run_ends_with_a_student(data_dir, teacher_folder, tmp_path):
    """The run evaluates, samples answers, and saves the student with the student's tokenizer."""
    config = config_of(data_dir, teacher_folder, WITH_ENDS, prefixes={"name": "mixture", "fraction": 0.5}, steps=4)
    result = train.train(config, str(tmp_path / "run"), quiet=True)
    assert np.isfinite(result["after"]["cross_entropy"]) and "forward_kl" not in result["after"]
    assert (
        data.Tokenizer.load(tmp_path / "run" / "student").vocabulary()
        == data.Tokenizer.load(folder("package:docstrings_teacher")).vocabulary()
    )


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("prefixes", ["data", "student"])
def test_a_killed_run_goes_on_exactly(data_dir, teacher_folder, tmp_path, prefixes):
    changes = dict(prefixes={"name": prefixes}) | WHOLE
    config = config_of(data_dir, teacher_folder, WITH_ENDS, **changes)
    train.train(config, str(tmp_path / "whole"), quiet=True)
    again = until(2, tmp_path / "whole", tmp_path / "again")
    train.train(config, str(again), quiet=True)
    assert_same_run(tmp_path / "whole", again)


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("method, share", [("alm", 0.8), ("uld", 0.9)])
def test_the_loss_of_spans_falls(data_dir, method, share):
    """The trained teacher of the package reads tokens of its own, which are the student's tokens here."""
    config = smoke(method, data_dir, steps=60)
    config.objective.terms.labels = None
    run = train.build(config)
    state, losses = run.init_state(), []
    for step in range(config.steps):
        state, sums = run.train_step(state, run.models.frozen_params, run.batch(step, state.params))
        losses.append(float(sums["distil/loss"][0] / sums["distil/loss"][1]))
    assert np.mean(losses[-10:]) < share * np.mean(losses[:10])


@pytest.mark.usefixtures("one_device")
def test_rows_whose_text_is_not_known_have_no_span(data_dir, teacher_folder):
    """A student may sample bytes that are no text. Other rows of the batch keep their spans."""
    run = train.build(config_of(data_dir, teacher_folder, prefixes={"name": "student"}))
    aligned, tokenizer = run.feed._rollout_arrays.aligned, run.tokenizer
    half = tokenizer.vocabulary()["Ċ"], tokenizer.vocabulary()["ł"]  # a line break, and a byte that begins no character
    rows = [[5, 6, 7, half[1], half[0]], [5, 6, 7, *tokenizer.encode("the sum"), tokenizer.eos_id], [5, 6, 7]]
    tokens = np.full((3, aligned.length + 1), tokenizer.pad_id, np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    sampled = dict(tokens=tokens, lengths=np.array([*map(len, rows)]), prompt_lengths=np.full(3, 3))
    batch = aligned.of_rollouts(aligned.with_arrays(sampled, np.arange(3)))
    assert np.all(batch[OF_STUDENT][[0, 2]] == -1) and np.all(batch["teacher_span_of_teacher"][[0, 2]] == -1)
    assert batch[OF_STUDENT][1].max() >= 1
