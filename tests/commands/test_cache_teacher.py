"""Teachers' caches: correct values, errors for caches that do not fit, and training with the same results."""

import functools
import hashlib
import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from configs import base
from kd_jax import cache_teacher, divergences, metrics, train
from kd_jax.objectives import make_terms
from kd_jax.run import cache as setup_cache
from kd_jax.settings import Settings
from kd_jax.storage import directory
from kd_jax.teachers import cache_files as files
from kd_jax.teachers.cache_reading import Cache
from kd_jax.teachers.cached import CachedTopK, Draws, coarsen, draw, merged, sampled_forward_kl
from tests.helpers.commands import environment, free_port
from tests.helpers.divergences import KEYWORDS, NOT_LEAST_AT_EQUALITY, PLAIN, call
from tests.helpers.runs import smoke

pytestmark = pytest.mark.usefixtures("one_device")
PACKAGES = dict(data__options__packages=("optax",))  # 464 rows
K = 16


@pytest.fixture(scope="module")
def caches(tmp_path_factory, data_dir):
    """A function that returns the folder of a cache of a kind. The first call for a kind writes the cache."""
    folder, made = tmp_path_factory.mktemp("caches"), {}

    def get(kind, config=None, name=""):
        name = name or kind
        if name not in made:
            config = config or smoke("forward_kl", data_dir, **PACKAGES)
            cache_teacher.write(config, str(folder / name), kind, K, part_rows=100, quiet=True)
            made[name] = folder / name
        return made[name]

    return get


def cached(data_dir, cache="", method="forward_kl", **changes):
    return smoke(method, data_dir, **PACKAGES | dict(teacher__cache=str(cache)) | changes)


def losses(config, steps=2):
    """Returns the metrics of the first steps of a run, and the evaluation before these steps."""
    run = train.build(config)
    state, found = run.init_state(), []
    before = run.evaluate(state.params)
    for step in range(steps):
        state, sums = run.train_step(state, run.models.teacher_params, run.batch(step, state.params))
        found.append(metrics.averages(jax.device_get(sums)))
    return found, before


def two(seed, vocabulary, spread=3.0):
    """Returns the log-probabilities of two random distributions."""
    logits = spread * jax.random.normal(jax.random.key(seed), (2, vocabulary))
    return jax.nn.log_softmax(logits, axis=-1)


def test_coarse_probabilities_are_those_of_the_tokens_and_of_all_others():
    log_q = two(0, 50)
    ids = jnp.array([[3, 49, 7], [0, 1, 2]])
    coarse = np.asarray(coarsen(log_q, ids))
    q = np.exp(np.asarray(log_q, np.float64))
    for row, its in enumerate(np.asarray(ids)):
        expected = [*q[row, its], np.delete(q[row], its).sum()]
        np.testing.assert_allclose(np.exp(coarse[row]), expected, rtol=1e-5)


def test_the_others_mass_is_summed_and_not_what_is_left_of_one():
    logits = jnp.zeros(100).at[0].set(60.0)  # the other tokens have 99 exp(-60), but 1 - q(0) is 0 in float32
    rest = lambda logits: coarsen(jax.nn.log_softmax(logits), jnp.array([0]))[1]
    assert abs(float(rest(logits)) - (np.log(99) - 60)) < 1e-4
    gradient = jax.grad(rest)(logits)
    np.testing.assert_allclose(gradient[1:], 1 / 99, rtol=1e-4)
    np.testing.assert_allclose(gradient[0], -1, rtol=1e-4)


@pytest.mark.slow
def test_a_step_from_hidden_states_is_the_teachers_step(caches, data_dir):
    online, _ = losses(cached(data_dir), steps=1)
    from_cache, _ = losses(cached(data_dir, caches("hidden")), steps=1)
    assert from_cache[0]["loss"] == pytest.approx(online[0]["loss"], rel=1e-3)
    assert from_cache[0]["gradient_norm"] == pytest.approx(online[0]["gradient_norm"], rel=1e-2)


# These are not f-divergences with one fixed f, nor increasing functions of one.
NOT_OF_RATIOS = {
    "adaptive_kl", "alpha_beta", "concrete_score", "decoupled_kl", "entropy_ordered_kl", "logit_differences", "logit_mse",
}  # fmt: skip


@pytest.mark.slow
def test_a_teacher_with_a_view_may_be_a_cache(data_dir, tmp_path):
    def config(cache="", text="{prompt}\n{response}", **changes):
        made = smoke("forward_kl", data_dir, **PACKAGES, teacher__cache=str(cache), **changes)
        made.teacher.view = {"name": "template", "text": text}
        return made

    cache_teacher.write(config(), str(tmp_path / "viewed"), "hidden", part_rows=300, quiet=True)
    live, found = losses(config()), losses(config(tmp_path / "viewed"))
    plain = losses(smoke("forward_kl", data_dir, **PACKAGES))
    for one, two, other in zip(live[0], found[0], plain[0], strict=True):
        np.testing.assert_allclose(two["loss"], one["loss"], rtol=0.02)
        assert abs(other["loss"] - one["loss"]) > 0.05
    np.testing.assert_allclose(found[1]["forward_kl"], live[1]["forward_kl"], rtol=0.02)
    packed = losses(config(tmp_path / "viewed", data__packing="rows"))
    assert np.isfinite(packed[0][0]["loss"])
    with pytest.raises(ValueError, match=r"(?s)rows.view.spec: .*rows.view.texts: "):
        train.build(config(tmp_path / "viewed", text="{response} {prompt}"))
    with pytest.raises(ValueError, match=r"rows.view.spec: .* in the cache, None now"):
        train.build(cached(data_dir, tmp_path / "viewed"))


@pytest.mark.slow
def test_a_member_may_be_a_cache_beside_the_teacher(data_dir, tmp_path):
    """The student before training, and the teacher: live, one of them cached, and both cached."""
    mixture = dict(assistant={"name": "arithmetic_mixture"}, between=("reference", "teacher"), weight=0.5)

    def config(**caches):
        made = smoke("forward_kl", data_dir, **PACKAGES, teacher__cache=str(caches.get("teacher", "")))
        made.members.reference = base.member(path="student", cache=str(caches.get("reference", "")))
        return base.set_terms(made, distil=base.term(pair=("assistant", "student"), **mixture))

    folders = {member: tmp_path / member for member in ("teacher", "reference")}
    for member, folder in folders.items():
        cache_teacher.write(config(), str(folder), "hidden", part_rows=300, quiet=True, member=member)

    def steps(**caches):
        run = train.build(config(**caches))
        state, found = run.init_state(), []
        for step in range(2):
            state, sums = run.train_step(state, run.models.frozen_params, run.batch(step, state.params))
            found.append(float(sums["loss"][0]))
        return found, run

    live, _ = steps()
    for caches in ({"reference": folders["reference"]}, folders):
        found, run = steps(**caches)
        np.testing.assert_allclose(found, live, rtol=0.02)  # the stored states are bfloat16
        assert "teacher_hidden_of_reference" in run.feed.next(2, None)
    with pytest.raises(ValueError, match=r"members.reference.cache=.*does not fit this run[\s\S]*hash"):
        changed = config(reference=folders["reference"])
        changed.data.max_prompt_length = 30
        train.build(changed)
    with pytest.raises(ValueError, match="member second is no frozen model|--member=second is no frozen model"):
        cache_teacher.write(config(), str(tmp_path / "no"), "hidden", quiet=True, member="second")
    with pytest.raises(ValueError, match="kind 'top_k', but a member is compared beside other models"):
        cache_teacher.write(config(), str(tmp_path / "no"), "top_k", K, quiet=True, member="reference")


@pytest.mark.parametrize("name", sorted({*divergences.__all__} - NOT_LEAST_AT_EQUALITY - {"surrogate_reverse_kl"}))
def test_divergences_of_what_is_kept_are_proper_ones(name):
    divergence = functools.partial(call, name, target=jnp.array(2))
    for seed in range(3):
        log_p, log_q = two(seed, 40)
        ids = jax.lax.top_k(log_p, 5)[1]
        coarse_p = coarsen(log_p, ids)
        value = lambda log_q, ids=ids, p=coarse_p: divergence(p, coarsen(log_q, ids))
        part, gradient = jax.jit(jax.value_and_grad(value))(log_q)
        whole = float(divergence(log_p, log_q))
        assert part > 0 and abs(float(value(log_p))) < 1e-6
        if name not in NOT_OF_RATIOS:
            assert part <= whole + 1e-6
        assert np.isfinite(gradient).all()


@pytest.mark.slow
@pytest.mark.parametrize("power", [1.0, 0.7])
def test_draws_have_the_frequencies_that_they_should_have(power):
    log_p = two(1, 600)[0]  # more ids than a block
    draws, chunk = 400_000, 2000
    uniform = 1 - jax.random.uniform(jax.random.key(2), (draws // chunk, chunk, 2))
    found = jax.lax.map(lambda u: draw(log_p, u, power), uniform)
    ids, p = np.asarray(found["teacher_ids"]).ravel(), np.exp(np.asarray(log_p, np.float64))
    proposal = p**power / (p**power).sum()
    counts = np.bincount(ids, minlength=600)
    few = proposal * draws < 10  # ids with few draws are one outcome together
    expected, observed = (np.append(x[~few], x[few].sum()) for x in (proposal * draws, counts))
    assert stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-3
    weights = np.asarray(found["teacher_weights"]).ravel() * chunk
    np.testing.assert_allclose(weights, p[ids] / proposal[ids], rtol=1e-4)
    np.testing.assert_allclose(found["teacher_entropy"], -(p * np.log(p)).sum(), rtol=1e-5)


@pytest.mark.parametrize("power", [1.0, 0.7])
def test_the_sampled_kl_and_its_gradient_have_no_bias(power):
    log_p, logits = two(3, 300)
    many, k = 2000, 16
    uniform = 1 - jax.random.uniform(jax.random.key(4), (many, k, 2))

    def sampled(logits, uniform):
        drawn = draw(log_p, uniform, power)
        draws = Draws(drawn["teacher_weights"], drawn["teacher_entropy"])
        return sampled_forward_kl(draws, jax.nn.log_softmax(logits)[drawn["teacher_ids"]])

    exact = lambda logits: divergences.forward_kl(log_p, jax.nn.log_softmax(logits))
    value, gradient = jax.value_and_grad(exact)(logits)
    values, gradients = jax.jit(jax.vmap(jax.value_and_grad(sampled), in_axes=(None, 0)))(logits, uniform)
    assert abs(values.mean() - value) < 4 * values.std() / many**0.5
    # The test uses random directions, because most tokens are too rare for a normally distributed mean.
    directions = jax.random.normal(jax.random.key(5), (100, 300))
    along = gradients @ directions.T
    scores = (along.mean(axis=0) - directions @ gradient) / (along.std(axis=0) / many**0.5)
    assert stats.kstest(np.asarray(scores), "norm").pvalue > 1e-3 and abs(scores).max() < 4.5


def test_draws_of_one_token_are_added_up():
    ids, weights = np.array([[5, 2, 5, 5], [1, 1, 0, 3]]), np.array([[1, 2, 3, 4], [1, 2, 3, 4]], np.float32)
    found = merged({"teacher_ids": ids, "teacher_weights": weights})
    assert found["teacher_ids"].tolist() == [[2, 5, 0, 0], [0, 1, 3, 0]]
    assert found["teacher_weights"].tolist() == [[2, 8, 0, 0], [3, 3, 4, 0]]


def every_divergence(config):
    """Returns the config with a term for each divergence, three terms with assistants, and hard labels."""
    with config.unlocked():
        terms = {
            name: base.term(divergence={"name": name, **KEYWORDS.get(name, {})}, coefficient=0.1) for name in PLAIN
        }
        for name, more in (("arithmetic_mixture", {}), ("geometric_mixture", {}), ("alpha_mixture", {"alpha": -3.0})):
            terms[f"with_{name}"] = base.term(
                assistant={"name": name, **more}, weight=0.3, pair=("teacher", "assistant")
            )
        terms["labels"] = base.hard_labels()
        config.objective.terms = terms
    return config


@pytest.mark.slow
def test_hidden_states_give_every_divergence_as_the_teacher_does(caches, data_dir):
    online, before = losses(every_divergence(cached(data_dir)), steps=1)
    from_cache, before_cached = losses(every_divergence(cached(data_dir, caches("hidden"))), steps=1)
    names = [name for name in online[0] if name.endswith("/loss")]
    assert len(names) == len(PLAIN) + 4
    for name in names:
        assert abs(from_cache[0][name] / online[0][name] - 1) < 2e-3, name
    assert from_cache[0]["labels/loss"] == online[0]["labels/loss"]
    assert before_cached.keys() == before.keys()
    for name, value in before.items():
        assert abs(before_cached[name] - value) <= 2e-3 * abs(value), name


@pytest.mark.slow
def test_top_k_gives_every_divergence_on_the_k_tokens_and_the_rest(caches, data_dir):
    online, before = losses(every_divergence(cached(data_dir)), steps=1)
    config = every_divergence(cached(data_dir, caches("top_k")))
    from_cache, before_cached = losses(config, steps=1)
    assert from_cache[0]["labels/loss"] == pytest.approx(online[0]["labels/loss"], rel=1e-6)
    for name in ("forward_kl", "reverse_kl", "jensen_shannon", "total_variation", "with_arithmetic_mixture"):
        assert 0 < from_cache[0][f"{name}/loss"] < online[0][f"{name}/loss"]
    assert all(np.isfinite(value) for value in from_cache[0].values())
    assert before_cached["coarse_forward_kl"] < before["forward_kl"] and "forward_kl" not in before_cached
    for name in ("cross_entropy", "entropy", "top1_agreement"):
        assert before_cached[name] == pytest.approx(before[name], rel=1e-5)

    # Compares with the logits of the teacher and the student, row by row.
    run, teacher = train.build(config), train.build(cached(data_dir)).models
    params = run.init_state().params
    batch = run.batch(0, params)
    at = np.asarray(batch["loss_mask"])
    log_p = jax.nn.log_softmax(teacher.teacher.logits(teacher.teacher_params, batch["tokens"], batch["mask"])[at])
    log_q = jax.nn.log_softmax(run.models.student.logits(params, batch["tokens"], batch["mask"])[at])
    ids = jax.lax.top_k(log_p, K)[1]
    expected = divergences.forward_kl(coarsen(log_p, ids), coarsen(log_q, ids)).mean()
    assert from_cache[0]["forward_kl/loss"] == pytest.approx(float(expected), rel=1e-4)


SUPPORT = {"support": "teacher_top_k", "k": 3}
FROM_RECORD = {
    "tail": SUPPORT,
    "all": SUPPORT | {"k": 5},
    "renormalised": SUPPORT | {"rest": "renormalised"},
    "dropped": SUPPORT | {"rest": "dropped"},
    "sides": SUPPORT | {"teacher": "renormalised", "student": "whole"},
    "keep": SUPPORT | {"k": 5, "keep": {"name": "student_mass", "at_least": 0.4}},
}


@pytest.mark.parametrize("pair", [("teacher", "student"), ("student", "teacher")], ids="-".join)
@pytest.mark.parametrize("name", FROM_RECORD)
def test_a_support_within_the_record_gives_the_loss_and_gradient_of_the_teacher(name, pair):
    """The five likeliest tokens have less mass than all others together, which are one outcome of the record."""
    (term,) = make_terms({"kd": {"vocabulary": FROM_RECORD[name], "pair": pair}})
    (of_record,) = CachedTopK().terms([term])
    with jax.enable_x64(True):
        log_p, logits = jax.nn.log_softmax(jax.random.normal(jax.random.key(3), (2, 7, 60), float))
        ids = jax.lax.top_k(log_p, 5)[1]
        record, target = coarsen(log_p, ids), jnp.zeros(7, int)
        assert jnp.all(record[:, 5] > record[:, 0])

        def live(logits):
            return term.loss({"teacher": log_p, "student": logits}, target, {}).sum()

        def from_record(logits):
            sides = CachedTopK().align(None, jax.nn.log_softmax(logits), ids, record)
            return of_record.loss(dict(zip(("teacher", "student"), sides, strict=True)), target, {}).sum()

        found, expected = (jax.value_and_grad(loss)(logits) for loss in (from_record, live))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-12)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_a_run_with_a_support_within_the_record_has_the_losses_of_the_teacher(caches, data_dir):
    vocabulary = dict(support="teacher_top_k", k=4, rest="renormalised")
    changes = dict(objective__terms__distil__vocabulary=vocabulary)
    (online,), (from_cache,) = (
        losses(cached(data_dir, cache, **changes), steps=1)[0] for cache in ("", caches("top_k"))
    )
    assert from_cache["distil/loss"] == pytest.approx(online["distil/loss"], rel=1e-4)
    assert from_cache["distil/loss"] > 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            dict(vocabulary=SUPPORT | {"k": K + 1}),
            f"vocabulary.k={K + 1}, but the cache has only the teacher's {K} likeliest",
        ),
        (dict(vocabulary={"support": "union", "k": 3}), "whole vocabulary for its vocabulary"),
        (dict(vocabulary=SUPPORT | {"add_target": True}), "whole vocabulary for its vocabulary"),
        (dict(vocabulary=SUPPORT | {"outside": -9.0}), "whole vocabulary for its vocabulary"),
        (dict(vocabulary=SUPPORT, temperature=2.0), "whole vocabulary for its temperature,"),
        (
            dict(vocabulary=SUPPORT, pair=("teacher", "assistant"), assistant="geometric_mixture", weight=0.5),
            "whole vocabulary for its vocabulary",
        ),
    ],
)
def test_a_support_beyond_the_record_is_refused(changes, words):
    terms = make_terms({"distil": changes})
    with pytest.raises(ValueError, match=rf"objective\.terms\.distil.*{words}"):
        setup_cache.check_use(
            smoke("forward_kl", "unused"), terms, SimpleNamespace(authors=(), origins=("data",)), "top_k", K
        )


@pytest.mark.slow
def test_samples_give_the_forward_kl_on_average(caches, data_dir):
    online, before = losses(cached(data_dir), steps=1)
    from_cache, before_cached = losses(cached(data_dir, caches("samples")), steps=1)
    # The variance is small, because the student is nearly uniform.
    assert from_cache[0]["loss"] == pytest.approx(online[0]["loss"], rel=5e-3)
    assert before_cached["sampled_forward_kl"] == pytest.approx(before["forward_kl"], rel=5e-3)
    assert "forward_kl" not in before_cached and "reverse_kl" not in before_cached


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["top_k", "hidden", "samples"])
def test_a_mesh_and_microbatches_change_nothing(kind, caches, data_dir):
    one, _ = losses(cached(data_dir, caches(kind)))
    several, _ = losses(cached(data_dir, caches(kind), mesh__data=2, mesh__tensor=2, microbatches=2))
    for a, b in zip(one, several, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hidden", "top_k", "samples"])
def test_a_cache_written_on_a_mesh_is_the_same(kind, caches, data_dir, tmp_path):
    config = cached(data_dir, mesh__data=2, mesh__tensor=2)
    cache_teacher.write(config, str(tmp_path / "there"), kind, K, part_rows=100, quiet=True)
    assert_same_numbers(caches(kind), tmp_path / "there", data_dir)


def assert_same_numbers(a, b, data_dir):
    a, b = Cache.open(a), Cache.open(b)
    assert a.manifest == b.manifest
    rows = train_rows(data_dir)
    for index in range(0, len(rows), 7):
        mine, other = (kept(cache, rows).read(index) for cache in (a, b))
        for name, values in mine.items():
            if name == "teacher_hidden":
                values, its = (x.view(jnp.bfloat16).astype(np.float32) for x in (values, other[name]))
                np.testing.assert_allclose(values, its, atol=0.05, rtol=0.02)
            elif name == "teacher_ids":
                assert (values == other[name]).mean() > 0.98  # nearly equal ids may change places
            else:
                assert np.mean(np.isclose(values, other[name], atol=1e-3)) > 0.98


def train_rows(data_dir):
    from kd_jax.run.models import load_tokenizer
    from kd_jax.run.rows import load_rows

    config = cached(data_dir)
    settings = Settings.parse(config)
    return load_rows(settings, load_tokenizer(settings), "train")[0]


def kept(cache, rows):
    from kd_jax.teachers.cache_reading import CachedValues

    return CachedValues(cache, "train", rows)


@pytest.mark.slow
def test_a_stopped_call_goes_on_and_leaves_the_same_files(caches, data_dir, tmp_path, monkeypatch):
    write, done = files.write_part, []

    def stops(path, records, kind):
        if len(done) == 2:
            list(zip(records, range(30), strict=False))  # in the middle of a part
            raise KeyboardInterrupt
        write(path, records, kind)
        done.append((path, path.stat().st_mtime_ns))

    config, folder = cached(data_dir), tmp_path / "cache"
    monkeypatch.setattr(files, "write_part", stops)
    with pytest.raises(KeyboardInterrupt):
        cache_teacher.write(config, str(folder), "hidden", part_rows=100, quiet=True)
    with pytest.raises(ValueError, match=r"not complete: 4 parts are missing.*000002"):
        Cache.open(folder)
    monkeypatch.setattr(files, "write_part", write)
    with directory.alone(str(folder)), pytest.raises(ValueError, match="in use by another run"):
        cache_teacher.write(config, str(folder), "hidden", part_rows=100, quiet=True)
    (folder / "train" / "000002.array_record.partial-77").write_text("killed")
    cache_teacher.write(config, str(folder), "hidden", part_rows=100, quiet=True)
    assert all(path.stat().st_mtime_ns == written for path, written in done)
    whole = caches("hidden")
    names = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert all((folder / name).read_bytes() == (whole / name).read_bytes() for name in names)
    with pytest.raises(ValueError, match=r"another cache(.|\n)*kind: 'hidden' in the cache, 'top_k' now"):
        cache_teacher.write(config, str(folder), "top_k", K, part_rows=100, quiet=True)


@pytest.mark.slow
def test_flipped_and_missing_bytes_are_found_and_named(caches, data_dir, tmp_path):
    shutil.copytree(caches("top_k"), tmp_path / "cache")
    rows, cache = train_rows(data_dir), Cache.open(tmp_path / "cache")
    path = files.part_path(cache.folder, "train", 1)
    content = path.read_bytes()
    good = {index: kept(cache, rows).read(index) for index in range(100, 200)}
    found = 0
    for place in range(100, len(content), len(content) // 60):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :])
        reader = kept(cache, rows)
        try:
            for index, values in good.items():
                now = reader.read(index)
                assert all(np.array_equal(now[name], values[name]) for name in values)
        except ValueError as error:
            assert str(path) in str(error) and re.search(r"row \d+ is damaged", str(error))
            found += 1
    assert found > 20
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"000001.array_record: .*records instead of 100"):
        kept(cache, rows).read(150)
    shutil.copy(files.part_path(cache.folder, "train", 0), path)
    with pytest.raises(ValueError, match=r"is of row 50, with other tokens"):
        kept(cache, rows).read(150)
    path.unlink()
    with pytest.raises(ValueError, match=r"not complete: 1 parts"):
        train.build(cached(data_dir, cache.folder))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            # Alpaca's template has more tokens than a prompt may have in the smoke setting.
            dict(
                data__template="alpaca", data__max_prompt_length=128, data__max_length=160,
                student__config__max_positions=256,
            ),
            ("template: ", "data.template: 'plain' in the cache, 'alpaca' now"),
        ),
        (dict(data__max_length=40), ("held_out rows.hash", "data.max_length: 48 in the cache, 40 now")),
        (dict(data__loss_on="all"), ("train rows.tokens", "data.loss_on: 'response' in the cache, 'all' now")),
        (dict(data__eval_rows=5), ("held_out rows.rows: 8 in the cache, 5 now", "data.eval_rows")),
        (dict(data__options__packages=("flax",)), ("held_out rows.hash", "data.options.packages")),
        (dict(student__init="layers", student__layers=(0,)), ("copies layers of the teacher's model",)),
        (dict(prefixes__name="student()", objective__terms__distil__rows="student"), ("needs the teacher itself",)),
        (dict(prefixes__name="teacher()"), ("needs the teacher itself",)),
        (dict(teacher__cache="/nowhere"), ("/nowhere has no manifest.json",)),
        (dict(objective__temperature=2.0), ("objective.temperature: 1.0 in the cache, 2.0 now",)),
        (dict(objective__terms__distil__weight="distillm2_skew(rows='all')"), ("distil",)),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_what_differs(changes, words, caches, data_dir):
    with pytest.raises(ValueError, match=r".") as error:
        train.build(cached(data_dir, **dict(teacher__cache=str(caches("top_k"))) | changes))
    assert all(word in str(error.value) for word in words)


def test_the_options_of_a_chat_template_and_its_system_message_decide_the_fingerprint(data_dir):
    tokenizer = SimpleNamespace(chat_template="{{ messages }}", fingerprint=lambda: "t", vocab_size=9)
    changes = [{}, {"data__system": "Be brief."}, {"data__template_options__enable_thinking": False}]
    made = [
        setup_cache.made_from(Settings.parse(smoke("forward_kl", data_dir, data__template="chat", **change)), tokenizer)
        for change in changes
    ]
    assert made[0]["template"] == hashlib.sha256(b"chat{{ messages }}").hexdigest()[:12], "as before there were any"
    assert len({one["template"] for one in made}) == 3
    assert "data.system" not in made[0]["settings"] and made[1]["settings"]["data.system"] == "Be brief."


@pytest.mark.parametrize(
    "changes",
    [
        dict(divergence__name="reverse_kl"),
        dict(divergence__name="skew_forward_kl"),
        dict(pair=("student", "teacher")),
        dict(pair=("teacher", "assistant"), assistant__name="arithmetic_mixture", weight=0.5),
    ],
)
def test_draws_are_refused_for_what_they_are_no_good_for(changes, caches, data_dir, tmp_path):
    folder = shutil.copytree(caches("top_k"), tmp_path / "cache")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"kind": "samples"}))  # nothing else is read
    changes = {f"objective__terms__distil__{key}": value for key, value in changes.items()}
    with pytest.raises(ValueError, match="kind 'samples' gives unbiased values only for forward_kl"):
        train.build(cached(data_dir, folder, **changes))
    with pytest.raises(ValueError, match="kind 'samples' gives unbiased values only for forward_kl"):
        cache_teacher.write(cached(data_dir, **changes), "/nowhere", "samples", quiet=True)


def test_another_tokenizer_or_manifest_is_refused(caches, data_dir, tmp_path):
    shutil.copytree(caches("top_k"), tmp_path / "cache")
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())

    def refused(**changes):
        (tmp_path / "cache" / "manifest.json").write_text(json.dumps(manifest | changes))
        with pytest.raises(ValueError, match=r".") as error:
            train.build(cached(data_dir, tmp_path / "cache"))
        return str(error.value)

    assert "tokenizer: '0123' in the cache" in refused(tokenizer="0123")
    assert "vocab_size: 5000 in the cache, 4096 now" in refused(vocab_size=5000)
    assert "'k' is 'many' and not of type int" in refused(k="many")
    assert "out of range" in refused(k=10**12)
    assert "out of range" in refused(part_rows=0)
    assert "version 7" in refused(version=7)
    assert "head='../../x' is not" in refused(head="../../x")
    assert "the split 'held_out' is None" in refused(splits={"train": manifest["splits"]["train"]})
    (tmp_path / "cache" / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest.json"):
        train.build(cached(data_dir, tmp_path / "cache"))
    for number, words in ((0, "k=0 must be"), (4096, "less than the vocabulary's 4096")):
        with pytest.raises(ValueError, match=words):
            cache_teacher.write(cached(data_dir), str(tmp_path / "new"), "top_k", number, quiet=True)
    assert not (tmp_path / "new").exists()
    (tmp_path / "thesis" / "tokenizer of mine").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"a file that is not of a cache, tokenizer of mine;"):
        cache_teacher.write(cached(data_dir), str(tmp_path / "thesis"), "top_k", K, quiet=True)
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["tokenizer of mine"]


@pytest.mark.slow
def test_packed_rows_use_the_cache_of_the_rows_and_streams_their_own(caches, data_dir):
    for packing, name in (("rows", "hidden"), ("stream", "stream")):
        changes = dict(data__packing=packing)
        cache = caches("hidden", cached(data_dir, **changes), name)
        (online, *_), _ = losses(cached(data_dir, **changes), steps=1)
        (from_cache, *_), _ = losses(cached(data_dir, cache, **changes), steps=1)
        assert from_cache["loss"] == pytest.approx(online["loss"], rel=1e-3)
    with pytest.raises(ValueError, match=r"data.packing: 'none or rows' in the cache, 'stream' now"):
        train.build(cached(data_dir, caches("hidden"), data__packing="stream"))


@pytest.mark.slow
def test_a_second_stream_may_have_hard_labels(caches, data_dir):
    def config(cache):
        made = cached(data_dir, cache)
        base.set_terms(made, distil=base.term(), labels=base.hard_labels(rows="text"))
        made.text.name, made.text.options = "docstrings", made.data.options
        return made

    (online, *_), _ = losses(config(""), steps=1)
    (from_cache, *_), _ = losses(config(caches("hidden")), steps=1)
    for name in ("distil/loss", "labels/loss", "gradient_norm"):
        assert from_cache[name] == pytest.approx(online[name], rel=1e-3)
    (of_top_k, *_), _ = losses(config(caches("top_k")), steps=1)
    assert of_top_k["labels/loss"] == pytest.approx(online["labels/loss"], rel=1e-5)
    made = config(caches("hidden"))
    made.objective.terms.labels.kind = "divergence"
    with pytest.raises(ValueError, match=r"rows='text', but a cache has values only for"):
        train.build(made)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hidden", "top_k", "samples"])
def test_a_whole_run_goes_on_bit_for_bit(kind, caches, data_dir, tmp_path, monkeypatch):
    options = dict(steps=4, checkpoint_every=2, eval_every=2, log_every=1, eval_prompts=4)
    config = cached(data_dir, caches(kind), **options)
    whole = train.train(config, str(tmp_path / "whole"), quiet=True)
    assert set(whole) == {"before", "after"} and "rouge_l" in whole["after"]
    assert not any(name.startswith("own_") and name.endswith("kl") for name in whole["after"])
    evaluate, calls = train.Run.evaluate, []

    def stops(run, *params):
        calls.append(run)
        if len(calls) == 3:  # before training, after step 2, and after the last step
            raise KeyboardInterrupt
        return evaluate(run, *params)

    monkeypatch.setattr(train.Run, "evaluate", stops)
    with pytest.raises(KeyboardInterrupt):
        train.train(config, str(tmp_path / "part"), quiet=True)
    monkeypatch.setattr(train.Run, "evaluate", evaluate)
    assert train.train(config, str(tmp_path / "part"), quiet=True) == whole
    one, other = (
        [line for line in metrics.read(tmp_path / name) if line["split"] != "speed"] for name in ("whole", "part")
    )
    assert one == other


def by_two(data_dir, folder, *flags, its=((), ())):
    """Returns the exit codes and outputs of two processes. `its` holds further flags for each process."""
    port = free_port()
    command = [
        sys.executable, "-m", "kd_jax.cache_teacher", "--config=configs/forward_kl.py:smoke", "--kind=top_k", f"--k={K}",
        f"--out={folder}", "--part_rows=100", f"--config.data.data_dir={data_dir}",
        "--config.data.options.packages=('optax',)", "--config.mesh.data=-1", *flags,
    ]  # fmt: skip
    processes = [
        subprocess.Popen(
            [*command, f"--processes=127.0.0.1:{port},2,{i}", *own], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=environment(1), text=True,
        )
        for i, own in enumerate(its)
    ]  # fmt: skip
    try:
        texts = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], texts


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data", "tensor"])  # tensor: each process has a part of every row
def test_two_processes_write_together_what_one_writes(mesh, caches, data_dir, tmp_path):
    codes, texts = by_two(data_dir, tmp_path / "cache", f"--config.mesh.{mesh}=2")
    assert codes == [0, 0], texts
    assert "bytes per token" in texts[0]
    assert_same_numbers(caches("top_k"), tmp_path / "cache", data_dir)


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--k=8", "--power=0.5", "--part_rows=50", "--config.seed=7", "--out=elsewhere"])
def test_processes_that_were_told_different_things_stop_before_anything_is_written(flag, data_dir, tmp_path):
    codes, texts = by_two(data_dir, tmp_path / "cache", its=((), (flag,)))
    assert codes == [1, 1] and all("different configs or work directories" in text for text in texts), texts
    assert not (tmp_path / "cache").exists()
