"""The decisions of each source, the resulting rows, and restarts that change nothing."""

import json
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from configs import base
from kd_jax import metrics, prefixes, train
from kd_jax.objectives import ORIGINS
from kd_jax.prefixes import feed as feed_module
from kd_jax.prefixes import responses, rollouts
from kd_jax.prefixes.feed import Feed
from kd_jax.prefixes.pool import Pool
from kd_jax.prefixes.replay_buffer import ReplayBuffer
from tests.helpers.runs import ON_POLICY, smoke

pytestmark = pytest.mark.usefixtures("one_device")
DATA, TEACHER, STUDENT = (ORIGINS.index(name) for name in ("data", "teacher", "student"))
B, L = 4, 9
RISING = "linear_schedule(init_value=0.0, end_value=2.0, transition_steps=20)"


class Rows:
    """Batches in which each prompt is its position in the dataset."""

    def __init__(self):
        self.place = 0

    def __next__(self):
        ids = np.arange(self.place * B, (self.place + 1) * B)
        self.place += 1
        tokens = np.tile(ids[:, None] + 100, (1, L)).astype(np.int32)
        mask = np.ones((B, L), bool)
        return {"tokens": tokens, "targets": tokens, "mask": mask, "loss_mask": np.tile(np.arange(L) > 0, (B, 1))}

    def get_state(self):
        return {"place": self.place}

    def set_state(self, state):
        self.place = state["place"]


class Sampler:
    """A sampler whose responses hold the number of calls, the author and the student's parameters."""

    def __init__(self):
        self.calls = 0

    def rows(self, model, params, prompts, key, origin, mixture=None):
        self.calls += 1
        count = len(prompts)
        tokens = np.zeros((count, L + 1), np.int32)
        tokens[:, 0] = [prompt[0] for prompt in prompts]
        tokens[:, 1:3] = params, int(jax.random.bits(key)) % 1000
        return {
            "tokens": tokens, "log_probs": np.zeros((count, L), np.float32), "lengths": np.full(count, 3, np.int32),
            "prompt_lengths": np.ones(count, np.int32), "origin": np.full(count, ORIGINS.index(origin), np.int32),
        }  # fmt: skip

    def report(self, rows):
        return {}


def feed(source, **options):
    from kd_jax.prefixes.feed import Author

    authors = {"student": Author("student"), "teacher": Author("teacher", 7)}
    whole = dict(total_steps=20, batch_size=B, epoch_batches=3, seed=0) | options
    return Feed(source, Rows(), sampler=Sampler(), authors={name: authors[name] for name in source.authors}, **whole)


def steps(it, first, last, losses=()):
    """Returns the batches of the steps. The student's parameters are the number of the step."""
    found = []
    for step in range(first, last):
        if step % 4 == 0 and losses:
            it.observe(losses[step // 4])
        found.append(it.next(step, step))
    return found


@pytest.mark.parametrize(
    "source",
    [
        prefixes.data(), prefixes.student(), prefixes.student(every=2, epochs=2), prefixes.paired(), prefixes.mixture(0.5),
        prefixes.adaptive(threshold=0.6, capacity=10), prefixes.adaptive(threshold=0.6, capacity=10, as_published=True),
    ],
    ids=lambda source: type(source).__name__,
)  # fmt: skip
def test_a_restart_anywhere_changes_nothing(source):
    losses = (1.0, 2.0, 1.5, 3.0, 3.0)
    whole = steps(feed(source), 0, 16, losses)
    for stop in (1, 5, 6, 11):
        before, after = feed(source), feed(source)
        first = steps(before, 0, stop, losses)
        after.set_state(json.loads(json.dumps(before.get_state())))
        for one, other in zip(whole, first + steps(after, stop, 16, losses), strict=True):
            for name in one:
                np.testing.assert_array_equal(one[name], other[name])


def test_a_state_that_was_taken_stays_as_it_is():
    """A checkpoint is written while the feed continues."""
    for source, options in ((prefixes.student(every=2), {}), (prefixes.mixture(1.0), {"rollouts_per_prompt": 4})):
        it = feed(source, **options)
        steps(it, 0, 1)
        taken = it.get_state()
        kept = json.dumps(taken)
        steps(it, 1, 6)
        assert json.dumps(taken) == kept


def test_a_pool_is_drawn_at_once_and_every_row_is_used_once_an_epoch():
    it = feed(prefixes.student(every=3, epochs=2))
    batches = steps(it, 0, 12)
    assert it._sampler.calls == 6
    for phase in (0, 6):
        for epoch in (0, 3):
            rows = np.concatenate([batch["tokens"] for batch in batches[phase + epoch : phase + epoch + 3]])
            assert set(rows[:, 1]) == {phase}, "one student draws them all"
            np.testing.assert_array_equal(np.sort(rows[:, 0]), 100 + phase * 2 + np.arange(12))
    orders = [np.concatenate([b["tokens"][:, 0] for b in batches[i : i + 3]]) for i in (0, 3)]
    assert not np.array_equal(*orders)


def test_pairs_answer_the_same_prompt():
    it = feed(prefixes.paired(every=2))
    for batch in steps(it, 0, 8):
        np.testing.assert_array_equal(batch["origin"], [TEACHER, STUDENT] * 2)
        np.testing.assert_array_equal(batch["tokens"][::2, 0], batch["tokens"][1::2, 0])
        assert set(batch["tokens"][::2, 1]) == {7} and len(set(batch["tokens"][:, 0])) == 2
    assert it._sampler.calls == 8, "two authors, two batches of prompts, twice"
    assert steps(feed(prefixes.paired()), 0, 7)[6]["tokens"][1, 1] == 6, (
        "an epoch is three batches of prompts, six of rows"
    )


def test_a_mixture_draws_as_often_as_it_says():
    it = feed(
        prefixes.mixture({"name": "linear_schedule", "init_value": 0.0, "end_value": 1.0, "transition_steps": 400})
    )
    origins = np.array([batch["origin"][0] for batch in steps(it, 0, 400)])
    assert set(origins) == {DATA, STUDENT}
    assert (origins[:200] == STUDENT).mean() == pytest.approx(0.25, abs=0.1)
    assert (origins[200:] == STUDENT).mean() == pytest.approx(0.75, abs=0.1)


def test_several_rollouts_of_a_prompt_and_no_prompt_is_left_out():
    one, two = steps(feed(prefixes.student(), rollouts_per_prompt=2), 0, 2)
    assert sorted(one["tokens"][:, 0]) == [100, 100, 101, 101] and sorted(two["tokens"][:, 0]) == [102, 102, 103, 103]


def test_prompts_of_all_processes_are_in_the_order_of_one(monkeypatch):
    from jax.experimental import multihost_utils

    whole = {name: array for name, array in next(Rows()).items() if name in ("tokens", "loss_mask")}
    whole["row"] = np.arange(7, 7 + len(whole["tokens"]), dtype=np.int64)
    parts = [{name: array[process::2] for name, array in whole.items()} for process in range(2)]
    expected = feed_module._prompts(whole)
    assert [row for _, row in expected] == whole["row"].tolist()
    gathered = lambda array: np.stack([next(p[n] for n in p if whole[n].dtype == array.dtype) for p in parts])
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", gathered)
    assert feed_module._prompts(parts[0]) == expected


def test_the_last_phase_draws_no_more_than_is_used():
    it = feed(prefixes.paired(every=3), total_steps=10)
    steps(it, 0, 10)
    assert it._sampler.calls == 2 * (3 + 2)


def test_a_report_is_about_all_that_was_drawn():
    it = feed(prefixes.paired(every=3))
    steps(it, 0, 1)
    assert len(it.fresh["lengths"]) == 3 * B and np.all(it.fresh["origin"] == STUDENT)


def test_adaptive_as_in_the_paper():
    source = prefixes.adaptive(threshold=0.5, increase=0.25, tolerance=0.1, capacity=8)
    choose = lambda uniform, stored, state: source.choose(state, step=4, total=10, uniform=uniform, stored=stored)
    state = source.observe(source.init(), 2.0)
    assert [choose(u, 4, state) for u in (0.24, 0.26, 0.49, 0.51)] == ["fresh, then replay", "replay", "replay", "data"]
    assert choose(0.49, 0, state) == "fresh, then replay", "there is nothing to replay yet"
    assert source.observe(state, 2.05) == {"threshold": 0.5, "reference": 2.05}
    assert source.observe(state, 2.1) == {"threshold": 0.75, "reference": 2.1}
    published = prefixes.adaptive(threshold=0.5, as_published=True)
    assert published.observe({"threshold": 0.5, "reference": 2.0}, 2.05)["reference"] == 2.0


def test_the_buffer_keeps_the_newest():
    it = feed(prefixes.adaptive(threshold=1.0, capacity=6, fresh="constant"))
    for step, batch in enumerate(steps(it, 0, 20)):
        assert np.all(batch["origin"] == STUDENT)
        assert len(it._buffer.rows["lengths"]) <= 6
        assert set(batch["tokens"][:, 1]) <= set(range(max(0, step - 19), step + 1))
    assert len(it._buffer.rows["lengths"]) == 6


def test_the_saved_form_of_sampled_rows_stays_as_it_is():
    """Checkpoints of earlier versions have this form and can still be restored."""
    saved = {"lengths": {"dtype": "<i4", "shape": [2], "zlib": "eJxjYWBgYAdiAABEAAw="}}
    replay_buffer, pool = ReplayBuffer(capacity=2), Pool(seed=0, batch_size=2, group=1, epochs=1)
    replay_buffer.set_state(saved)
    pool.set_state(saved, start=3)
    for kept in (replay_buffer, pool):
        np.testing.assert_array_equal(kept.rows["lengths"], np.array([4, 7], np.int32))
        assert json.loads(json.dumps(kept.get_state()))["lengths"].keys() == saved["lengths"].keys()
    state = feed(prefixes.adaptive()).get_state()
    assert state.keys() == {"data", "text", "source", "store", "pool_start", "waiting", "waiting_rows"}


def test_the_state_of_an_earlier_version_has_no_indices_of_the_waiting_prompts():
    it = feed(prefixes.student(every=2))
    steps(it, 0, 1)
    state = it.get_state()
    del state["waiting_rows"]
    other = feed(prefixes.student(every=2))
    other.set_state(state)
    for one, two in zip(steps(it, 1, 3), steps(other, 1, 3), strict=True):
        np.testing.assert_array_equal(one["tokens"], two["tokens"])


def test_what_was_drawn_is_scored_to_its_end_and_no_further():
    rows = {
        "tokens": np.array([[5, 6, 7, 8, 0, 0], [5, 6, 7, 8, 9, 4]]), "lengths": np.array([4, 6]),
        "prompt_lengths": np.array([2, 3]), "origin": np.array([2, 2]), "log_probs": np.zeros((2, 5)),
    }  # fmt: skip
    batch = rollouts.as_batch(rows)
    counted = [row[mask].tolist() for row, mask in zip(batch["targets"], batch["loss_mask"], strict=True)]
    assert counted == [[7, 8], [8, 9, 4]]
    np.testing.assert_array_equal(batch["mask"], [[True] * 3 + [False] * 2, [True] * 5])
    np.testing.assert_array_equal(batch["tokens"][1], [5, 6, 7, 8, 9])


def test_the_students_log_probabilities_are_those_of_the_training_step(data_dir):
    """Drawn tokens are scored exactly: the ratio of the first step is 1 everywhere."""
    config = smoke("opd", data_dir, objective__terms__distil__policy__clip=0.0)
    run = train.build(config)
    state = run.init_state()
    batch = run.feed.next(0, state.params)
    logits = run.models.student.logits(state.params, batch["tokens"], batch["mask"])[..., : run.tokenizer.vocab_size]
    log_q = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), batch["targets"][..., None], -1)[..., 0]
    counted = batch["loss_mask"]
    np.testing.assert_allclose(batch["log_probs"][counted], log_q[counted], atol=1e-4)
    assert np.all(batch["log_probs"][~counted] == 0) and counted.sum(axis=1).max() == 8
    report = run.feed.report
    assert report["length"] == counted.sum(axis=1).mean() and report["student_rows"] == 1
    assert report["entropy"] == pytest.approx(-log_q[counted].mean(), abs=1e-4)


def test_a_teachers_responses_are_written_once_and_go_on_where_they_stopped(data_dir, tmp_path, monkeypatch):
    config = smoke("seqkd", tmp_path, prefixes__num_rows=40, data__data_dir=str(tmp_path), sampling__max_new_tokens=12)
    written = lambda: sorted(tmp_path.glob("kd_jax_responses/*/responses*"))
    draw, calls = rollouts.Sampler.rows, []

    def stop(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw(*args, **kwargs)

    monkeypatch.setattr(rollouts.Sampler, "rows", stop)
    with pytest.raises(KeyboardInterrupt):
        train.build(config)
    (partial,) = written()
    assert partial.name.endswith(".partial") and partial.read_text().count("\n") == 2
    partial.write_text(partial.read_text() + '[{"prompt": "cut o')
    run = train.build(config)
    (whole,) = written()
    assert len(calls) == 3 + 3, "five batches of eight, two of which were there"
    rows = [json.loads(line) for line in whole.read_text().splitlines()]
    assert 0 < len(rows) == run.counts["train"]["kept"] and set(rows[0]) >= {
        "prompt", "context", "response", "prompt_ids", "response_ids",
    }  # fmt: skip
    assert json.loads((whole.parent / "settings.json").read_text())["max_new_tokens"] == 12
    batch = run.feed.next(0, None)
    assert np.all(batch["origin"] == TEACHER)
    config.data.packing, config.data.loss_on = "rows", "all"
    packed = train.build(config)
    assert len(calls) == 6, "the next run uses them again"
    batch = packed.feed.next(0, None)
    assert (
        packed.counts["train"]["packed into"] and batch["mask"].dtype == np.int32 and np.all(batch["loss_mask"][:, 0])
    )
    whole.unlink()
    train.build(config)
    assert [json.loads(line) for line in whole.read_text().splitlines()] == rows, "drawn in one go they are the same"


def test_two_runs_that_want_the_same_responses_write_them_once(tmp_path):
    drawn = []

    class Writer:
        tokenizer = types.SimpleNamespace(decode=lambda ids: f"response {ids[0]}", strip_ends=lambda ids: ids[:-1])
        has_ended = staticmethod(lambda ids: True)

        def rows(self, model, params, prompts, key, origin):
            drawn.append(prompts)
            time.sleep(0.02)
            return prompts

        def responses(self, prompts):
            return [[ids[0], 0] for ids in prompts]

    rows = [{"prompt": str(i), "context": ""} for i in range(12)]
    prompts = [[i] for i in range(12)]
    write = lambda: responses.write_responses(
        tmp_path, rows, prompts, Writer(), None, None, batch_size=4, seed=0, settings={}, progress=iter
    )
    threads = [threading.Thread(target=write) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [json.loads(line)["prompt"] for line in (tmp_path / "responses.jsonl").read_text().splitlines()]
    assert found == [str(i) for i in range(12)] and len(drawn) == 3


def test_what_is_written_is_never_written_again(tmp_path, monkeypatch):
    partial, batches = tmp_path / "responses.jsonl.partial", '["é"]\n["b"]\n'
    assert responses._complete_batches(partial) == 0
    for cut in (b"", '["c", "é'.encode()[:-1]):
        monkeypatch.undo()
        partial.write_bytes(batches.encode() + cut)
        monkeypatch.setattr(type(partial), "write_text", None)  # a kill in write_text would lose the file
        written = partial.stat().st_mtime_ns
        assert responses._complete_batches(partial) == 2
        assert partial.read_bytes() == batches.encode()
        assert cut or partial.stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("gkd", {"prefixes__name": "gold"}, "unknown name 'gold'"),
        ("gkd", {"prefixes__fraction": 1.5}, "fraction must be between 0 and 1"),
        ("opd", {"prefixes__name": "data()"}, "rows='student' counts no row.*'data\\(\\)' gives rows of data"),
        ("opd", {"sampling__temperature": 0.7}, "sampling.temperature=0.7 is not objective.temperature"),
        ("opd", {"objective__terms__distil__rows": "all", "prefixes__name": "mixture(fraction=0.5)"}, "rows='student'"),
        ("gkd", {"data__packing": "rows"}, "data.packing='none'"),
        ("gkd", {"sampling__max_new_tokens": 40}, "do not fit into data.max_length=48"),
        ("gkd", {"sampling__rollouts_per_prompt": 3}, "does not divide into sampling.rollouts_per_prompt=3"),
        ("distillm2", {"data__batch_size": 7}, "does not divide"),
        ("minillm", {"text__name": ""}, "rows='text' counts no row"),
        ("minillm", {"objective__terms__policy__policy__whiten": "yes"}, "policy.whiten='yes'"),
        ("gkd", {"text__name": "docstrings"}, "no term has rows='text'"),
        ("opd", {"sampling__top_p": 0.9}, "sampling.top_p=0.9 and sampling.top_k=0 draw from a part of it"),
        ("minillm", {"sampling__teacher_share": 1.0}, "a share below 1"),
        ("gkd", {"sampling__teacher_share": 0.2, "sampling__temperature": 0.0}, "a share below 1"),
        ("forward_kl", {"sampling__rollouts_per_prompt": 2}, "the student writes nothing"),
        ("gkd", {"prefixes__fraction": 1.0, "objective__terms__distil__rows": "data"}, "rows='data' counts no row"),
        ("gkd", {"sampling__rollouts_per_prompt": 2, "sampling__temperature": 0.0}, "are all the same"),
        ("forward_kl", {"sampling__top_k": -1}, "sampling.top_k=-1 must be at least 0"),
        ("amid", {"objective__terms__distil__weight": RISING, "steps": 20}, "weight goes from 0 to 1.9 in 20 steps"),
        ("imitkd", {"prefixes__fraction__end_value": 1.5, "steps": 20}, "fraction must be between 0 and 1, but is 1."),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(method, changes, message, data_dir):
    with pytest.raises(ValueError, match=message):
        train.build(smoke(method, data_dir, **changes))


def test_what_has_no_prompt_cannot_be_answered(tmp_path):
    rows = [{"prompt": "" if i % 9 == 0 else f"Say {i}. ", "response": f"{i}"} for i in range(200)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = smoke("gkd", tmp_path, data__name="jsonl")
    config.data.options = dict(path=str(tmp_path / "rows.jsonl"), validation_fraction=0.1)
    with pytest.raises(ValueError, match=r"of the \d+ rows of data.name='jsonl' have an empty prompt"):
        train.build(config)


def test_any_term_goes_with_any_source_by_flags_alone(data_dir):
    config = smoke("gkd", data_dir, prefixes__name="student(every=1)")
    config.objective.terms.distil.assistant.name = "alpha_mixture(alpha=-3.0)"
    config.objective.terms.distil.divergence.name = "alpha_beta(alpha=0.2, beta=0.7)"
    config.objective.terms.distil.update(pair=("teacher", "assistant"), rows="student")
    config.objective.terms.distil.weight = "linear_schedule(init_value=0.1, end_value=0.2, transition_steps=100)"
    run = train.build(config)
    state = run.init_state()
    _, sums = run.train_step(state, run.models.teacher_params, run.batch(0, state.params))
    assert metrics.averages(sums)["distil/weight"] == pytest.approx(0.1) and metrics.averages(sums)["loss"] > 0


def test_a_fingerprint_is_the_same_on_any_mesh():
    params = {"a": jax.random.normal(jax.random.key(0), (8, 6)), "b": jnp.ones((), jnp.bfloat16)}
    mesh = jax.make_mesh((8,), ("x",))
    spread = params | {"a": jax.device_put(params["a"], NamedSharding(mesh, PartitionSpec("x")))}
    swapped = params | {"a": params["a"][:, ::-1]}
    one, other, third = (responses.fingerprint(tree, {"seed": 0}) for tree in (params, spread, swapped))
    assert one == other != third != responses.fingerprint(params, {"seed": 1})


def test_a_policy_has_no_other_keys():
    with pytest.raises(KeyError, match="discont"):
        base.policy(discont=1.0)
    assert {"imitkd", "gkd", "opd", "minillm", "distillm", "distillm2"} <= set(ON_POLICY)
