"""One step gives the same numbers on any mesh and with any number of microbatches, and ignores uncounted positions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from kd_jax import data, sharding
from kd_jax.objectives import make_terms
from kd_jax.train_step import init_state, make_train_step
from tests.helpers.steps import STUDENT, TEACHER, TERM, B, L, V, batch, step

TERMS = make_terms(
    {
        "distil": TERM | {"divergence": {"name": "jensen_shannon"}},
        "rows": TERM | {"average": "sequence", "coefficient": 0.5},
        "labels": TERM | {"kind": "hard_labels", "coefficient": 0.1},
    }
)
TX = optax.sgd(0.1)  # the update is proportional to the gradient; Adam would hide its size


SCORED = make_terms(
    {
        "policy": TERM
        | {"kind": "policy_gradient", "policy": base.policy(whiten="all", discount=0.9), "rows": "student"},
        "single_step": TERM | {"divergence": {"name": "reverse_kl"}, "rows": "student", "importance": True},
        "skewed": TERM
        | {
            "assistant": {"name": "arithmetic_mixture"},
            "pair": ("teacher", "assistant"),
            "rows": "teacher",
            "weight": {"name": "distillm2_skew", "reference_steps": 1, "low": 0.0},
        },
        "text": TERM | {"kind": "hard_labels", "rows": "text"},
    },
    teacher_share=0.2,
)


def drawn_batch(seed=0):
    random = np.random.default_rng(seed)
    origin = np.array([1, 2, 1, 2, 3, 2, 1, 3])
    return batch(seed) | {"origin": origin, "log_probs": -random.uniform(1, 5, (B, L)).astype(np.float32)}


def run(mesh=None, microbatches=1, steps=3, first=None, terms=TERMS, make_batch=batch):
    mesh = mesh or sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    place = lambda tree: sharding.tree_shardings(mesh, tree)
    key = jax.random.key(0)
    params, teacher_params = STUDENT.init(key, place), TEACHER.init(jax.random.key(1), place)
    state = init_state(params, TX, terms, key)
    state = jax.device_put(state, place(state))
    step = jax.jit(
        make_train_step(STUDENT, TEACHER, terms, TX, vocab_size=V, microbatches=microbatches, chunk=2, mesh=mesh)
    )
    losses = []
    for i in range(steps):
        state, metrics = step(state, teacher_params, sharding.put_batch(mesh, first or make_batch(i)))
        losses.append(float(metrics["loss"][0]))
    return np.array(losses), jax.device_get(state.params)


@pytest.fixture(scope="module")
def reference():
    return run()


def same(found, reference, rtol=2e-5):
    np.testing.assert_allclose(found[0], reference[0], rtol=rtol)
    for ours, theirs in zip(jax.tree.leaves(found[1]), jax.tree.leaves(reference[1]), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 1, 8)])
def test_any_mesh_gives_the_same_numbers(sizes, reference):
    same(run(sharding.make_mesh(*sizes)), reference)


def test_microbatches_give_the_same_numbers(reference):
    same(run(microbatches=4), reference)


@pytest.mark.slow
def test_scored_terms_give_the_same_numbers_in_microbatches_and_on_a_mesh():
    drawn = dict(terms=SCORED, make_batch=drawn_batch)
    one = run(**drawn)
    assert np.all(np.isfinite(one[0])) and len(set(one[0])) == 3
    same(run(microbatches=4, **drawn), one)
    same(run(sharding.make_mesh(8, 1, 1), **drawn), one)
    same(run(sharding.make_mesh(2, 2, 2), microbatches=2, **drawn), one)


def test_microbatches_on_a_mesh(reference):
    same(run(sharding.make_mesh(2, 2, 2), microbatches=2), reference)


def test_packed_rows_give_the_numbers_of_single_ones(reference):
    lengths = [4, 7, 3, 3, 2, 5, 2, 4]
    ids = np.random.default_rng(0).integers(0, V, sum(lengths)).astype(np.int32)
    first = np.array([1, 3, 1, 2, 1, 1, 1, 2])
    rows = data.Rows(ids, np.cumsum([0, *lengths]), first, first)
    packed = data.pack_rows(rows, max_length=L)
    assert len(packed) == 4 and sorted(sum(packed.groups, ())) == list(range(8))
    options = dict(batch_size=8, max_length=L, seed=0, shuffle=False, num_epochs=1, pad_id=0)
    alone, together = (next(iter(data.batches(source, **options))) for source in (rows, packed))
    assert together["mask"].max() == 3 and (together["mask"] > 0).sum() == alone["mask"].sum()
    same(run(first=together, steps=1), run(first=alone, steps=1))


def test_masked_tokens_are_never_read():
    clean = batch()
    dirty = dict(clean, tokens=np.where(clean["mask"], clean["tokens"], V - 1), targets=clean["targets"].copy())
    dirty["targets"][~clean["loss_mask"]] = 0
    for ours, theirs in zip(jax.tree.leaves(run(first=dirty)), jax.tree.leaves(run(first=clean)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_batch_with_nothing_to_count_changes_nothing():
    empty = batch() | {"loss_mask": np.zeros((B, L), bool)}
    losses, params = run(first=empty, steps=1)
    assert losses[0] == 0
    np.testing.assert_array_equal(params["norm"]["scale"], np.ones(16))


def test_terms_over_other_rows_are_averaged_apart():
    half = TERM | {"coefficient": 0.5}
    terms = make_terms(
        {name: half | {"rows": name} for name in ("data", "student")} | {"off": TERM | {"coefficient": 0.0}}
    )
    key = jax.random.key(0)
    state = init_state(STUDENT.init(key), TX, terms, key)
    teacher_params = TEACHER.init(jax.random.key(1))
    step = jax.jit(make_train_step(STUDENT, TEACHER, terms, TX, vocab_size=V))
    whole = batch() | {"origin": np.array([2, 0, 0, 2, 0, 0, 0, 0])}
    metrics = step(state, teacher_params, whole)[1]
    for name, rows in (("data", [1, 2, 4, 5, 6, 7]), ("student", [0, 3])):
        alone = {key: array[rows] for key, array in whole.items()}
        expected = step(state, teacher_params, alone)[1][f"{name}/loss"]
        np.testing.assert_allclose(metrics[f"{name}/loss"], expected, rtol=1e-5)
    assert metrics["off/loss"][0] == metrics["off/loss"][1] == 0


def test_a_term_that_is_infinite_at_tokens_of_another_term_leaves_no_trace():
    """The temperature of DTKD is a ratio of maxima. It is not finite if no logit is above 0."""
    random = np.random.default_rng(0)
    student, teacher = random.normal(size=(2, 2, 3, 7))
    student[1], teacher[1] = student[1] - 20, teacher[1] - 20
    student[1, 0] = teacher[1, 0] = 0.0  # 0 / 0
    targets = random.integers(0, 7, (2, 3)).astype(np.int32)
    first = {"loss_mask": np.ones((2, 3), bool), "targets": targets, "origin": np.array([0, 1])}
    ratio = base.term(temperature={"name": "relative_maximum"}, rows="data")
    both = {"ratio": ratio, "labels": base.hard_labels(rows="teacher")}
    loss, gradient = step(both, student, teacher, first)
    alone = [step({name: both[name]}, student, teacher, first) for name in both]
    np.testing.assert_allclose(loss, sum(value for value, _ in alone), rtol=1e-6)
    np.testing.assert_allclose(gradient, sum(of_term for _, of_term in alone), rtol=1e-5, atol=1e-7)
    assert np.abs(gradient).min(axis=-1).max(axis=-1).min() > 0


def test_an_adaptive_schedule_stays_where_its_term_counts_nothing():
    taid = {
        "assistant": {"name": "geometric_mixture"},
        "pair": ("assistant", "student"),
        "weight": {"name": "taid", "total_steps": 5},
    }
    terms = make_terms({"distil": TERM | taid | {"rows": "student"}})
    state = init_state(STUDENT.init(jax.random.key(0)), TX, terms, jax.random.key(0))
    step = jax.jit(make_train_step(STUDENT, TEACHER, terms, TX, vocab_size=V))
    after = step(state, TEACHER.init(jax.random.key(1)), batch())[0]
    for old, new in zip(jax.tree.leaves(state.schedules), jax.tree.leaves(after.schedules), strict=True):
        np.testing.assert_array_equal(old, new)


def test_rows_by_origin():
    terms = make_terms({"student": TERM | {"rows": "student"}})
    key = jax.random.key(0)
    state = init_state(STUDENT.init(key), TX, terms, key)
    teacher_params = TEACHER.init(jax.random.key(1))
    step = jax.jit(make_train_step(STUDENT, TEACHER, terms, TX, vocab_size=V))
    whole = batch() | {"origin": np.array([2, 0, 0, 2, 1, 0, 0, 1])}
    only = {name: array[[0, 3]] for name, array in whole.items()}
    found, expected = (step(state, teacher_params, b)[1]["loss"][0] for b in (whole, only))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_teacher_is_asked_for_when_it_is_needed():
    with pytest.raises(ValueError, match=r"distil.*teacher\.path"):
        make_train_step(STUDENT, None, TERMS, TX, vocab_size=V)


def test_mesh_errors_name_the_sizes():
    with pytest.raises(ValueError, match="'data': 3.*8 devices"):
        sharding.make_mesh(3, 1, 1)
    with pytest.raises(ValueError, match="at most one -1"):
        sharding.make_mesh(-1, -1, 1)


def test_a_path_without_a_rule_is_an_error():
    mesh = sharding.make_mesh()
    with pytest.raises(ValueError, match="layers/0/unknown/kernel"):
        sharding.tree_shardings(mesh, {"layers": {"0": {"unknown": {"kernel": jnp.zeros((2, 2))}}}})


def test_an_axis_that_does_not_divide_is_left_out():
    mesh = sharding.make_mesh(1, 2, 4)
    found = sharding.tree_shardings(mesh, {"embed": {"embedding": jnp.zeros((50257, 16))}})
    assert found["embed"]["embedding"].spec == jax.sharding.PartitionSpec(None, "fsdp")
