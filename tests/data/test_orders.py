"""The orders of the rows: the rows of each stage, restarts, shares of processes, the ranking of a run, and bad input."""

import itertools
import json

import jax
import numpy as np
import pytest

from kd_jax import data, evaluate, schedules, train
from kd_jax.data import orders
from kd_jax.prefixes import rollouts
from kd_jax.run import ranking
from kd_jax.run.build import make_objective
from kd_jax.run.rows import load_rows
from kd_jax.settings import Sampling, Settings
from kd_jax.storage import directory
from tests.helpers.runs import assert_same_run, smoke
from tests.training.test_processes import together

pytestmark = pytest.mark.usefixtures("one_device")
PAD = 99


def numbered(count):
    """Returns rows of one prompt token and one response token, which is the number of the row plus 100."""
    tokens = np.stack([np.full(count, 5), np.arange(count) + 100], axis=1).reshape(-1).astype(np.int32)
    ones = np.ones(count, np.int32)
    return data.Rows(tokens, np.arange(count + 1) * 2, ones, ones)


def batches(count, **options):
    return data.batches(numbered(count), **dict(batch_size=4, max_length=6, seed=3, pad_id=PAD) | options)


def numbers(batch):
    """Returns the numbers of the `numbered` rows in a batch."""
    return (batch["targets"][:, 0] - 100).tolist()


def curriculum(count, stages, total_steps, batch_size=4, seed=3):
    """Returns a random ranking of `count` rows, and its order."""
    ranking = np.random.default_rng(0).permutation(count)
    return ranking, orders.curriculum(stages).row_at(
        ranking, batch_size=batch_size, total_steps=total_steps, seed=seed
    )  # fmt: skip


def test_the_order_without_a_curriculum_is_that_of_earlier_versions():
    read = [numbers(batch) for batch in itertools.islice(batches(10), 6)]
    assert read == [[4, 7, 0, 8], [2, 5, 3, 6], [1, 9, 6, 0], [4, 3, 2, 1], [9, 8, 7, 5], [4, 0, 5, 3]]


@pytest.mark.parametrize(("steps", "stages", "count"), [(12, 4, 10), (7, 3, 11), (5, 5, 5), (9, 1, 6), (400, 7, 30)])
def test_each_step_reads_rows_of_its_stage(steps, stages, count):
    ranking, row_at = curriculum(count, stages, steps)
    stage_of = schedules.by_stage(list(range(stages)), total_steps=steps)
    sizes = orders.stage_sizes(count, stages)
    assert sizes[-1] == count and sizes[:-1] == [(s + 1) * (count // stages) for s in range(stages - 1)]
    read = [{row_at(step * 4 + i) for i in range(4)} for step in range(steps)]
    for stage in range(stages):
        easy = set(ranking[: sizes[stage]].tolist())
        steps_of_stage = [step for step in range(steps) if int(stage_of(step)) == stage]
        found = set().union(*(read[step] for step in steps_of_stage))
        assert steps_of_stage and found <= easy
        if len(steps_of_stage) * 4 >= sizes[stage]:
            assert found == easy


def test_each_pass_of_a_stage_reads_each_row_once_in_another_order():
    ranking, row_at = curriculum(40, stages=4, total_steps=80)
    # A stage has 20 steps with 80 positions: 8 passes over 10 rows, 4 over 20, 2 2/3 over 30, and 2 over 40.
    passes = [
        [row_at(stage * 80 + start + i) for i in range(size)]
        for stage, size in enumerate((10, 20, 30, 40))
        for start in range(0, 80 - size + 1, size)
    ]
    assert len(passes) == 8 + 4 + 2 + 2
    for rows in passes:
        assert sorted(rows) == sorted(ranking[: len(rows)])
    assert len(set(map(tuple, passes))) == len(passes)
    other = curriculum(40, stages=4, total_steps=80, seed=4)[1]
    assert [other(i) for i in range(10)] != passes[0] == [curriculum(40, 4, 80)[1](i) for i in range(10)]
    assert {row_at(i) for i in range(320, 360)} == set(range(40)), "after the run the last stage goes on"


def test_equal_places_in_two_stages_have_unrelated_rows():
    """Stages of equal seeds would have similar orders, because the shuffle of n numbers depends little on n."""
    _, row_at = curriculum(4000, stages=4, total_steps=4000)
    first, second = ([row_at(start + i) for i in range(1000)] for start in (0, 4000))
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 10


def test_a_state_resumes_in_the_middle_of_a_stage():
    _, order = curriculum(11, stages=3, total_steps=8)
    whole = [numbers(batch) for batch in itertools.islice(batches(11, order=order), 10)]
    reading = iter(batches(11, order=order))
    for step in range(10):
        resumed = iter(batches(11, order=curriculum(11, stages=3, total_steps=8)[1]))
        resumed.set_state(reading.get_state())
        assert numbers(next(resumed)) == numbers(next(reading)) == whole[step]


def test_processes_share_each_global_batch():
    _, order = curriculum(11, stages=3, total_steps=8)
    whole = [numbers(batch) for batch in itertools.islice(batches(11, order=order), 8)]
    for count in (2, 4):
        for index in range(count):
            share = itertools.islice(batches(11, order=order, process_index=index, process_count=count), 8)
            assert [numbers(batch) for batch in share] == [batch[index::count] for batch in whole]


def test_ranks_are_fused_and_ties_keep_the_order_before():
    rouge_l, cross_entropy = np.array([1.0, 3.0, 2.0, 2.0]), np.array([1.0, 4.0, 2.0, 2.0])
    # The ranks in ROUGE-L are 4, 1, 2, 3, and in cross-entropy 1, 4, 2, 3. The scores of rows 0 and 1 are equal.
    assert orders.easy_first(rouge_l, cross_entropy).tolist() == [2, 0, 1, 3]
    assert orders.easy_first(rouge_l, cross_entropy, constant=0).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (0, "stages must be between 1 and inf, but is 0"),
        (2.5, "stages must be a whole number, but is 2.5"),
        ("2", "stages must be a finite number, not '2'"),
    ],
)
def test_wrong_numbers_of_stages(stages, message):
    with pytest.raises(ValueError, match=message):
        orders.curriculum(stages)


def test_more_stages_than_steps_or_rows():
    for count, steps, message in ((9, 3, "more than the 3 steps"), (3, 9, "more than the 3 training rows")):
        with pytest.raises(ValueError, match=f"stages=4 is {message}"):
            curriculum(count, stages=4, total_steps=steps)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(data__order__name="curiculum"), r"data.order: unknown name 'curiculum' .*did you mean 'curriculum'"),
        (dict(data__order__name="shuffled"), r"data.order: unknown keyword 'stages' .*'shuffled\(\)', ignores"),
        (dict(data__order__name="collections:Counter()"), "is no order of kd_jax.data.orders, which has curriculum, shuffled"),
        (dict(data__order__stages=0), "data.order: stages must be between 1 and inf"),
        (dict(data__order__stages=5), "stages=5 is more than steps=4; set fewer stages"),
        (dict(data__packing="rows"), "data.packing='rows'; set data.packing='none'"),
        (dict(data__name="text"), "data.name='text' and data.packing='none'; set"),
        (dict(prefixes__name="teacher"), "prefixes={'name': 'teacher'} and .*rollouts_per_prompt=1. Set prefixes.name"),
        (dict(prefixes__name="adaptive"), "each step must read one batch .*prefixes={'name': 'adaptive'}"),
        (dict(prefixes__name="student(every=2)"), "each step must read one batch"),
        (dict(prefixes__name="student(epochs=2)"), "each step must read one batch"),
        (dict(prefixes__name="student", sampling__rollouts_per_prompt=2), "sampling.rollouts_per_prompt=2. Set"),
        (dict(sampling__max_new_tokens=40), "sampling.max_new_tokens=40 do not fit"),
    ],
)  # fmt: skip
def test_a_curriculum_that_cannot_be_made_is_refused_early(changes, message):
    with pytest.raises(ValueError, match=message):
        make_objective(Settings.parse(smoke("pocl", "", **changes)))


@pytest.mark.parametrize("name", ["student", "mixture", "mixture(fraction=0.0)"])
def test_sources_that_read_one_batch_in_each_step_may_have_a_curriculum(name):
    make_objective(Settings.parse(smoke("pocl", "", prefixes__name=name)))


def test_work_directories_of_earlier_versions_have_the_shuffled_order(tmp_path):
    config = smoke("sft", tmp_path).to_dict()
    old = config | {"data": {key: value for key, value in config["data"].items() if key != "order"}}
    directory.write_config(str(tmp_path), old)
    assert directory.config_difference(str(tmp_path), config) == []
    changed = smoke("sft", tmp_path, data__order__name="curriculum").to_dict()
    assert directory.config_difference(str(tmp_path), changed) == [
        "data.order.name: 'shuffled' in the work directory, 'curriculum' now"
    ]


def a_file(folder, count=21):
    """Writes rows of different lengths, and returns the changes of a config that reads them."""
    words = ["red", "green", "blue", "yellow"]
    rows = [{"prompt": f"{i} {words[i % 4]}", "response": " ".join(words[: 1 + i % 4]) + f" {i}"} for i in range(count)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = dict(data__name="jsonl", data__options={"path": str(folder / "rows.jsonl")}, data__eval_split="train")
    return options | dict(data__data_dir=str(folder), mesh__data=1)


@pytest.fixture
def run(tmp_path):
    """A run of POCL on a small file, with the changes of its config."""
    changes = a_file(tmp_path)
    return train.build(smoke("pocl", tmp_path, **changes)), changes


@pytest.mark.slow
def test_the_scores_are_those_of_each_row_alone(run, tmp_path):
    built, _ = run
    params, tokenizer, student = built.init_state().params, built.tokenizer, built.models.student
    rows = load_rows(built.config, tokenizer, "train")[0]
    greedy = Sampling(max_new_tokens=8, temperature=0.0)
    sampler = rollouts.make_sampler(built.mesh, tokenizer, 48, greedy)
    (file,) = tmp_path.glob("kd_jax_rankings/*/scores.jsonl")
    scores = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(scores) == len(rows) == 20
    for i, line in enumerate(scores):
        ids, length = rows[i], rows.prompt_lengths[i]
        log_q = jax.nn.log_softmax(student.logits(params, ids[None, :-1])[0, :, : tokenizer.vocab_size])
        expected = -np.mean([log_q[t - 1, ids[t]] for t in range(length, len(ids))])
        np.testing.assert_allclose(line["cross_entropy"], expected, rtol=1e-5)
        answer = evaluate.respond(sampler, student, params, [ids[:length].tolist()], batch_size=1, seed=7)
        response = tokenizer.decode(ids[length:-1].tolist())
        assert line["rouge_l"] == evaluate.rouge_l(sampler.text(answer)[0][1], [response])
    same = ranking.score_rows(rows, sampler, student, params, batch_size=3)
    np.testing.assert_allclose(*([list(line.values()) for line in lines] for lines in (same, scores)), rtol=1e-5)


def test_a_run_reads_its_rows_by_stage(run, tmp_path):
    built, _ = run
    rows = load_rows(built.config, built.tokenizer, "train")[0]
    (file,) = tmp_path.glob("kd_jax_rankings/*/scores.jsonl")
    scores = [json.loads(line) for line in file.read_text().splitlines()]
    easy = orders.easy_first(*(np.array([line[name] for line in scores]) for name in ("rouge_l", "cross_entropy")))
    index_of = {tuple(rows[i].tolist()): i for i in range(len(rows))}
    assert len(index_of) == 20
    for step, size in enumerate((5, 10, 15, 20)):
        batch = built.feed.next(step, None)
        ends = batch["mask"].sum(axis=1)
        ids = [
            (*tokens[:end], target[end - 1])
            for tokens, target, end in zip(*(batch[n] for n in ("tokens", "targets")), ends, strict=True)
        ]
        assert {index_of[row] for row in ids} <= set(easy[:size].tolist())


def test_the_ranking_is_computed_once_for_a_student_and_its_rows(run, tmp_path, monkeypatch):
    _, changes = run
    score_rows, calls = ranking.score_rows, []
    monkeypatch.setattr(ranking, "score_rows", lambda *args, **options: calls.append(1) or score_rows(*args, **options))
    same = ("data__loss_on", "all"), ("data__eval_batch_size", 4), ("steps", 9), ("data__batch_size", 2)
    for key, value in same:
        train.build(smoke("pocl", tmp_path, **changes | {key: value}))
    assert not calls
    all_rows = changes["data__options"] | {"validation_fraction": 0.0}
    for number, (key, value) in enumerate((("seed", 1), ("sampling__max_new_tokens", 7), ("data__options", all_rows))):
        for _ in range(2):
            train.build(smoke("pocl", tmp_path, **changes | {key: value}))
            assert len(calls) == number + 1


def test_a_ranking_of_other_rows_or_without_finite_scores_is_refused(tmp_path, monkeypatch):
    changes = a_file(tmp_path)
    build_run = lambda: train.build(smoke("pocl", tmp_path, **changes))
    line = {"rouge_l": 1.0, "cross_entropy": float("nan")}
    monkeypatch.setattr(ranking, "score_rows", lambda *args, **options: [line] * 20)
    with pytest.raises(ValueError, match="cross-entropy is not finite on 20 of the 20 training rows"):
        build_run()
    assert not list(tmp_path.glob("kd_jax_rankings/*/scores.jsonl"))
    monkeypatch.undo()
    build_run()
    (file,) = tmp_path.glob("kd_jax_rankings/*/scores.jsonl")
    file.write_text(file.read_text().partition("\n")[0])
    with pytest.raises(ValueError, match=r"scores.jsonl has not the scores of the 20 training rows; delete this file"):
        build_run()


def test_rows_without_a_prompt_and_fewer_rows_than_stages(tmp_path):
    few = a_file(tmp_path, count=4)  # one row is held out
    with pytest.raises(ValueError, match="data.order: stages=4 is more than the 3 training rows"):
        train.build(smoke("pocl", tmp_path, **few))
    rows = [{"prompt": "" if i == 2 else f"{i}", "response": "red"} for i in range(9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="1 of the 8 rows .* have an empty prompt, to which the student cannot answer"):
        train.build(smoke("pocl", tmp_path, **few))


class Interrupted(Exception):
    pass


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, monkeypatch):
    config = smoke("pocl", tmp_path, **a_file(tmp_path), steps=6, checkpoint_every=2, eval_every=6, log_every=1)
    whole = train.train(config, str(tmp_path / "whole"), quiet=True)
    put, calls = train.Run.put, itertools.count()

    def stop(run, batch):
        if next(calls) == 3:
            raise Interrupted
        return put(run, batch)

    monkeypatch.setattr(train.Run, "put", stop)
    with pytest.raises(Interrupted):
        train.train(config, str(tmp_path / "parts"), quiet=True)
    assert train.train(config, str(tmp_path / "parts"), quiet=True) == whole
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_two_processes_rank_and_read_the_rows_of_one(tmp_path):
    (tmp_path / "two").mkdir(), (tmp_path / "one").mkdir()
    options, mesh = a_file(tmp_path), dict(mesh__data=4, mesh__fsdp=2)
    spec = lambda name, **more: {"pocl": ["pocl", options | dict(data__data_dir=str(tmp_path / name), steps=20) | more]}
    both = together(spec("two", **mesh), tmp_path / "two", tmp_path, 2, 4)
    (reader,) = together(spec("two"), tmp_path / "two", tmp_path, 1, 1)
    rows = [sorted(itertools.chain(*parts)) for parts in zip(*(its["pocl"]["rows"] for its in both), strict=True)]
    assert rows == [sorted(step) for step in reader["pocl"]["rows"]]
    np.testing.assert_allclose(both[0]["pocl"]["losses"], reader["pocl"]["losses"], rtol=1e-5)
    together(spec("one"), tmp_path / "one", tmp_path, 1, 1)
    files = [next(tmp_path.glob(f"{name}/kd_jax_rankings/*/scores.jsonl")) for name in ("two", "one")]
    assert files[0].parent.name == files[1].parent.name
    scores = [[list(json.loads(line).values()) for line in file.read_text().splitlines()] for file in files]
    np.testing.assert_allclose(*scores, rtol=1e-5)
