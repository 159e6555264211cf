"""Compares scores, rules, gates and temperatures of tokens with published code, with loops, and with themselves.

`values_of` does what the objective does for a rule: it evaluates the scores and supplies the inputs. Most batches have
the same shape, because JAX compiles every operation once for each shape.
"""

import functools
import inspect
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from kd_jax import token_weights
from kd_jax.token_weights import make_gate, make_rule, statistics
from kd_jax.token_weights import scores as token_scores
from kd_jax.token_weights.temperatures import difficulty
from tests.helpers.axes import CASES as ALL_CASES
from tests.helpers.axes import arrays, closed, numbered

KEYS = numbered(closed(0, 13), closed(17, 19), closed(23, 25), closed(29, 40), 199, 200)
CASES = {key: ALL_CASES[key] for key in KEYS}
SHAPE = (5, 9)  # of the larger of the stored inputs


def rows_of(counted):
    return np.broadcast_to(np.arange(len(counted), dtype=np.int32)[:, None], counted.shape)


def batch_of(teacher, student, target, counted, drawn_log_q=None, row=None):
    """Returns the arrays that a rule may need, from logits or log-probabilities [B, L, V]."""
    counted = jnp.asarray(counted)
    row = jnp.asarray(rows_of(counted) if row is None else row)
    found = {"teacher": jax.nn.log_softmax(jnp.asarray(teacher)), "student": jax.nn.log_softmax(jnp.asarray(student))}
    found |= {"target": jnp.asarray(target), "counted": counted, "row": row}
    before = statistics.earlier_sums(counted.astype(jnp.int32), row)
    count = statistics.counts(counted, row, "row")
    log_q = token_scores.log_q(found["student"], found["target"])
    return found | {
        "position": before, "position_from_end": count - 1 - before,
        "drawn_log_q": log_q if drawn_log_q is None else jnp.asarray(drawn_log_q),
        "divergence": jnp.sum(jnp.exp(found["student"]) * (found["student"] - found["teacher"]), axis=-1),
        "has_view": row % 2 == 0,
    }  # fmt: skip


def values_of(rule, batch):
    scores = {label: score(**{name: batch[name] for name in score.reads}) for label, score in rule.scores.items()}
    return scores | {name: batch[name] for name in rule.inputs}


def padded(values):
    """Returns an array [B, L, ...], with zeros up to `SHAPE`."""
    missing = [(0, whole - size) for whole, size in zip(SHAPE, values.shape, strict=False)]
    return np.pad(values, missing + [(0, 0)] * (values.ndim - 2))


def golden_batch(case):
    stored = lambda name: padded(arrays()[f"inputs/{case['inputs']}/{name}"])
    temperature = case["params"].get("temperature", 1.0)
    drawn = stored("old_log_probs") if case["params"].get("old_log_probs") == "given" else None
    logits = (stored(f"{who}_logits") / temperature for who in ("teacher", "student"))
    return batch_of(*logits, stored("targets"), stored("mask"), drawn)


def close(found, key, name, counted):
    """Compares the counted entries of an array with the stored ones."""
    expected = padded(arrays()[f"{key}/{name}"])
    np.testing.assert_allclose(np.asarray(found)[counted], expected[counted], rtol=1e-9, atol=1e-9)


def loss_of(key):
    return pytest.approx(float(arrays()[f"{key}/loss"]), rel=1e-9)


def of_parts(params):
    """Returns the score of TIP and TA-OPD in the keys of a spec."""
    k, name = params["k"], params.get("score", params.get("mode"))
    scale = {"batch_quantile": "quantiles", "batch_minmax": "min_max", None: "min_max"}[params.get("scale")]
    mass = {"name": "teacher_mass_on_student_top", "k": k, "shared_only": not params.get("exact_mass")}
    d = {"name": "union_divergence", "k": k} if "score" in params else {"name": "top_k_divergence", "k": k}
    h = {"name": "student_top_entropy", "k": k} if "score" in params else "student_entropy"
    both = {"of": (d, mass), "combine": "product", "scale": "none"}
    return {"scale": scale} | {
        "soft_or": {"of": (h, d), "combine": "soft_or"},
        "entropy_only": {"of": h},
        "divergence_only": {"of": d},
        "teachability": {"of": (d, mass), "combine": "product"},
        "tip": {"of": (h, d), "combine": "soft_or"},
        "ca_softor": {"of": (h, both), "combine": "soft_or"},
    }[name]


def spec_of(key):
    params, name = CASES[key]["params"], CASES[key]["id"].split("/")[0]
    if name == "eopd":
        return {"name": "threshold", "of": "teacher_entropy", "at_least": params["threshold"]}
    if name == "fire":
        return {"name": "confidence_product", "alpha": params["alpha"], "beta": params["beta"]}
    if name == "tsdkd":
        return {"name": "relative_confidence"}
    if name == "adakd":
        return {"name": "top_fraction", "of": adakd_score(params), "fraction": params["ratio"], "ties": "first"}
    if name == "iw_opd":
        return {"name": "prefix_gap", "gamma": params["gamma"]}
    if name in ("tip", "ta_opd"):
        spec = {"name": "top_fraction", "fraction": params["fraction"], "round": "ceil"}
        return spec | of_parts(params) | {"at_least_per_row": params.get("min_per_row", 0)}
    if name == "selectkd":
        return {"name": "accept", "k": params["k"], "otherwise": params["otherwise"]}
    if name == "sdar":
        return {"name": "sigmoid", "of": "gap", "slope": params["beta"]}
    return {"name": "first" if "first" in CASES[key]["id"] else "last", "count": params["n"]}


def adakd_score(params):
    return {"hellinger": "hellinger", "entropy": "student_entropy", "ce": "cross_entropy"}[params["rule"]]


WEIGHTS = [key for key, case in CASES.items() if {"weights", "gate"} & set(case["arrays"])]


@pytest.mark.parametrize("key", WEIGHTS)
def test_published_weights(key):
    with jax.enable_x64(True):
        batch = golden_batch(CASES[key])
        rule = make_rule(spec_of(key) | {"divide_by": "all"})
        name = "gate" if "gate" in CASES[key]["arrays"] else "weights"
        close(rule(values_of(rule, batch)), key, name, batch["counted"])


@pytest.mark.parametrize("key", [key for key, case in CASES.items() if "score" in case["arrays"]])
def test_published_combinations_of_scores(key):
    """The inverse of the rule `sigmoid` gives the score itself."""
    with jax.enable_x64(True):
        batch = golden_batch(CASES[key])
        rule = make_rule({"name": "sigmoid", "slope": 1.0, "divide_by": "all"} | of_parts(CASES[key]["params"]))
        weights = np.where(batch["counted"], rule(values_of(rule, batch)), 0.5)
        close(np.log(weights / (1 - weights)), key, "score", batch["counted"])


@pytest.mark.parametrize("key", [key for key, case in CASES.items() if case["id"].startswith("tip/")])
def test_tips_tokens_are_those_at_or_above_a_quantile(key):
    params = CASES[key]["params"]
    with jax.enable_x64(True):
        batch = golden_batch(CASES[key])
        spec = {"name": "quantile", "at_least": 1 - params["fraction"], "divide_by": "kept"} | of_parts(params)
        rule = make_rule(spec)
        close(rule(values_of(rule, batch)), key, "weights", batch["counted"])


@pytest.mark.parametrize("key", [key for key, case in CASES.items() if "entropy_mask" in case["arrays"]])
def test_tsdkds_quantile_at_counted_tokens(key):
    with jax.enable_x64(True):
        batch = golden_batch(CASES[key])
        level = CASES[key]["params"]["threshold"]
        rule = make_rule({"name": "quantile", "of": "student_entropy", "at_least": level, "divide_by": "kept"})
        close(rule(values_of(rule, batch)), key, "entropy_mask", batch["counted"])


@pytest.mark.parametrize("key", [key for key, case in CASES.items() if "teacher_entropy" in case["arrays"]])
def test_published_entropies(key):
    with jax.enable_x64(True):
        batch = golden_batch(CASES[key])
        close(token_scores.teacher_entropy(batch["teacher"]), key, "teacher_entropy", batch["counted"])


@pytest.mark.parametrize("key", [key for key, case in CASES.items() if "kept_rows" in case["arrays"]])
def test_published_row_gates(key):
    percent = CASES[key]["params"]["traj_skip_percentile"]
    with jax.enable_x64(True):
        batch = golden_batch(CASES[key])
        gate = make_gate({"name": "drop_lowest", "of": "log_p", "fraction": percent / 100})
        found = np.asarray(gate(values_of(gate, batch)))
    assert found.dtype == bool and np.array_equal(found.all(axis=1), found.any(axis=1))
    expected = arrays()[f"{key}/kept_rows"]
    np.testing.assert_array_equal(found[: len(expected), 0], expected)
    assert not found[len(expected) :].any(), "rows without a counted token"


@pytest.mark.parametrize(
    "key", [k for k, c in CASES.items() if "temperatures" in c["arrays"] and c["params"]["adaptive_temperature"]]
)
def test_published_temperatures(key):
    params = CASES[key]["params"]
    with jax.enable_x64(True):
        batch = golden_batch(CASES[key])
        rule = make_rule(spec_of(key) | {"divide_by": "kept"})
        values = values_of(rule, batch)
        weights, direction = rule(values), "soften" if params["soften"] else "harden"
        score = values[adakd_score(params)]
        found = difficulty(score, batch["counted"], weights, scale=params["c"], direction=direction)
    kept = np.asarray(weights) > 0
    expected = arrays()[f"{key}/temperatures"]
    assert np.array_equal(kept[: len(expected), : expected.shape[1]], ~np.isnan(expected)) and kept.any()
    close(found, key, "temperatures", kept)
    assert np.all(np.asarray(found)[~kept] == 1)


def kl(p, q):
    return np.sum(p * (np.log(p) - np.log(q)), axis=-1)


@pytest.mark.parametrize("key", [key for key, case in CASES.items() if case["id"].startswith("atkd/")])
def test_atkds_loss_from_its_groups(key):
    alpha = CASES[key]["params"]["alpha"]
    of = {"name": "quantile", "of": "mass_off_target", "interpolation": "lower", "divide_by": "kept"}
    with jax.enable_x64(True):
        batch = golden_batch(CASES[key])
        p, q = np.exp(batch["teacher"]), np.exp(batch["student"])
        groups = [make_rule(of | bound) for bound in ({"below": 0.5}, {"at_least": 0.5})]
        easy, hard = (np.asarray(rule(values_of(rule, batch))) for rule in groups)
    if CASES[key]["params"]["reverse"]:
        p, q = q, p
    is_target = np.arange(p.shape[-1]) == np.asarray(batch["target"])[..., None]
    two = [np.stack([x[is_target], 1 - x[is_target]], axis=-1).reshape(*is_target.shape[:2], 2) for x in (p, q)]
    rest = [x[~is_target].reshape(*is_target.shape[:2], -1) for x in (p, q)]
    of_target, of_rest = kl(*two), kl(*(x / x.sum(-1, keepdims=True) for x in rest))
    mean = lambda values, group: np.sum(group * values) / group.sum()
    assert alpha * mean(of_rest, easy) + (1 - alpha) * mean(of_target + of_rest, hard) == loss_of(key)


@pytest.mark.parametrize("key", [key for key, case in CASES.items() if case["id"].startswith("sdar/")])
def test_sdars_loss_from_its_weights(key):
    with jax.enable_x64(True):
        batch = golden_batch(CASES[key])
        rule = make_rule(spec_of(key) | {"divide_by": "all"})
        values = values_of(rule, batch)
        counted = np.asarray(batch["counted"])
        loss = np.where(counted, rule(values) * values["gap"], 0)
    lengths = counted.sum(axis=1)
    per_row = loss.sum(axis=1)[lengths > 0] / lengths[lengths > 0]
    assert (per_row.mean() if "rows" in CASES[key]["id"] else loss.sum() / counted.sum()) == loss_of(key)


# An oracle for every score: one token's p, q and id, all of positive mass.
def union(p, q, k):
    top = lambda x: set(np.argsort(-x)[:k].tolist())
    own = lambda x, v, floor: max(x[v] / sum(x[w] for w in top(x)) if v in top(x) else 0, floor)
    ratio = lambda v: math.log(own(p, v, 1e-12) / own(q, v, 1e-12))
    return sum(own(p, v, 0) * ratio(v) for v in top(p) | top(q))


def top_entropy(q, k):
    best = np.sort(q)[::-1][:k] / np.sort(q)[::-1][:k].sum()
    return -np.sum(best * np.log(best)) / math.log(k)


ORACLES = {
    "accepted": lambda p, q, y, k: float(np.argmax(q) in np.argsort(-p)[:k]),
    "cross_entropy": lambda p, q, y: -math.log(q[y]),
    "gap": lambda p, q, y: math.log(p[y]) - math.log(q[y]),
    "hellinger": lambda p, q, y: math.sqrt(1 - np.sqrt(p * q).sum()),
    "log_p": lambda p, q, y: math.log(p[y]),
    "log_q": lambda p, q, y: math.log(q[y]),
    "mass_off_target": lambda p, q, y: sum(p[v] for v in range(len(p)) if v != y),
    "student_entropy": lambda p, q, y: -np.sum(q * np.log(q)),
    "student_mass_on_teacher_top": lambda p, q, y, k: sum(q[v] for v in np.argsort(-p)[:k]),
    "student_top_entropy": lambda p, q, y, k: top_entropy(q, k),
    "teacher_entropy": lambda p, q, y: -np.sum(p * np.log(p)),
    "teacher_mass_on_student_top": lambda p, q, y, k: sum(p[v] for v in np.argsort(-q)[:k]),
    "teacher_rank_of_student_top": lambda p, q, y: list(np.argsort(-p)).index(np.argmax(q)),
    "top_k_divergence": lambda p, q, y, k: sum(p[v] * math.log(p[v] / q[v]) for v in np.argsort(-p)[:k]),
    "union_divergence": lambda p, q, y, k: union(p, q, k),
}


def options_of(name):
    return {"k": 3} if "k" in inspect.signature(getattr(token_scores, name)).parameters else {}


def evaluate(name, arrays):
    function = getattr(token_scores, name)
    needs = [name for name in inspect.signature(function).parameters if name in arrays]
    return functools.partial(function, **options_of(name)), [arrays[name] for name in needs]


def random_scores_input(dtype, shape=SHAPE, vocab=9):
    random = np.random.default_rng(0)
    distribution = lambda: jax.nn.log_softmax(jnp.asarray(2 * random.normal(size=(*shape, vocab)), dtype))
    return {
        "teacher": distribution(),
        "student": distribution(),
        "target": jnp.asarray(random.integers(0, vocab, shape)),
    }


@pytest.mark.parametrize("name", token_scores.__all__)
def test_scores_against_their_definitions(name):
    assert name in ORACLES, f"add the definition of {name} to ORACLES"
    with jax.enable_x64(True):
        given = random_scores_input(np.float64)
        function, needs = evaluate(name, given)
        found = np.asarray(function(*needs))
        single = {key: value.astype(np.float32) if value.ndim == 3 else value for key, value in given.items()}
        function, needs = evaluate(name, single)
        in_single = np.asarray(jax.jit(function)(*needs))
        mixed = evaluate(name, given | {"student": single["student"]})
        in_mixed = np.asarray(mixed[0](*mixed[1]))
    p, q, ids = np.exp(given["teacher"]), np.exp(given["student"]), np.asarray(given["target"])
    for place in np.ndindex(ids.shape):
        expected = ORACLES[name](p[place], q[place], ids[place], **options_of(name))
        np.testing.assert_allclose(found[place], expected, rtol=1e-10, atol=1e-12)
    assert in_single.dtype == np.float32
    np.testing.assert_allclose(in_single, found, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(in_mixed, found, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", token_scores.__all__)
def test_scores_do_not_sort_the_vocabulary_and_commute_with_vmap(name):
    given = random_scores_input(np.float32)
    function, needs = evaluate(name, given)
    assert " sort[" not in str(jax.make_jaxpr(function)(*needs))
    np.testing.assert_allclose(jax.vmap(jax.vmap(function))(*needs), function(*needs), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", token_scores.__all__)
def test_scores_of_distributions_with_entries_of_no_mass(name):
    """The teacher is certain, and the student excludes one token; only the true infinities are infinite."""
    p, q = np.array([1.0, 0, 0, 0]), np.array([0.5, 0.5, 0, 0])
    with np.errstate(divide="ignore"):
        given = {"teacher": jnp.log(jnp.array(p)), "student": jnp.log(jnp.array(q)), "target": jnp.array(0)}
    function, needs = evaluate(name, given)
    assert np.isfinite(function(*needs))
    excluded = given | {"target": jnp.array(3)}
    function, needs = evaluate(name, excluded)
    expected = {"log_p": -np.inf, "log_q": -np.inf, "cross_entropy": np.inf, "gap": 0.0, "mass_off_target": 1.0}
    np.testing.assert_allclose(function(*needs), expected.get(name, function(*needs)))
    assert not np.isnan(function(*needs))


def test_a_score_is_infinite_only_where_its_true_value_is():
    p, q = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([1.0, 0.0]))
    assert float(token_scores.top_k_divergence(p, q, k=2)) == np.inf
    assert float(token_scores.gap(p, q, jnp.array(1))) == np.inf
    assert float(token_scores.gap(q, p, jnp.array(1))) == -np.inf


def test_ties_are_accepted():
    p, q = jnp.log(jnp.array([0.4, 0.2, 0.2, 0.2])), jnp.log(jnp.array([0.1, 0.1, 0.1, 0.7]))
    assert [float(token_scores.accepted(p, q, k=k)) for k in (1, 2)] == [0.0, 1.0]


def test_mass_on_shared_tokens_and_a_large_k():
    given = random_scores_input(np.float32)
    p, q = given["teacher"], given["student"]
    whole = token_scores.teacher_mass_on_student_top(p, q, k=3)
    shared = token_scores.teacher_mass_on_student_top(p, q, k=3, shared_only=True)
    assert np.all(shared <= whole + 1e-6) and np.any(shared < whole - 1e-3)
    np.testing.assert_allclose(token_scores.teacher_mass_on_student_top(p, q, k=99), 1, rtol=1e-5)


# Statistics against loops.


def first_line(values):
    """Returns an array of shape `SHAPE` that begins with the values, and has zeros elsewhere."""
    return jnp.asarray(padded(np.array([values], np.float32)))


def random_tokens(seed=0, ties=False):
    """Returns scores, counted and row, with packed rows, tokens that do not count, and a row without counted tokens."""
    random = np.random.default_rng(seed)
    score = (random.integers(0, 4, SHAPE) if ties else random.normal(size=SHAPE)).astype(np.float32)
    counted = random.random(SHAPE) < 0.7
    rows = [[0, 0, 1], [2, 2, 2], [3, 4, 5], [7, 7, 8], [9, 9, 9]]
    counted[3, 6:] = False
    return score, counted, np.repeat(rows, 3, axis=1).astype(np.int32)


def groups_of(row, within):
    return [np.ones(row.shape, bool)] if within == "batch" else [row == number for number in np.unique(row)]


def test_sums_of_rows():
    score, counted, row = random_tokens()
    on_device = [jnp.asarray(values) for values in (score, counted, row)]
    sums, earlier = (function(*on_device[::2]) for function in (statistics.row_sums, statistics.earlier_sums))
    means, one = statistics.row_means(*on_device)
    for group in groups_of(row, "row"):
        np.testing.assert_allclose(np.asarray(sums)[group], score[group].sum(), rtol=1e-5)
        np.testing.assert_allclose(np.asarray(earlier)[group], np.cumsum(score[group]) - score[group], atol=1e-5)
        inside = group & counted
        mean = score[inside].mean() if inside.any() else 0
        np.testing.assert_allclose(np.asarray(means)[group], mean, rtol=1e-5, atol=1e-6)
        assert np.asarray(one)[group].sum() == inside.any() and not np.any(np.asarray(one) & ~counted)


def test_sums_keep_the_digits_of_small_rows_behind_large_rows():
    values, row = first_line([1e9, 1e-3, 2e-3]), first_line([0, 1, 1, 2]).astype(int)
    np.testing.assert_allclose(statistics.row_sums(values, row)[0, :3], [1e9, 3e-3, 3e-3], rtol=1e-6)


@pytest.mark.parametrize("within", statistics.SCOPES)
@pytest.mark.parametrize("interpolation", ["linear", "lower"])
@pytest.mark.parametrize("level", [0.0, 0.05, 0.3, 0.5, 1.0])
def test_quantiles_are_numpys(within, interpolation, level):
    score, counted, row = random_tokens(1)
    on_device = [jnp.asarray(values) for values in (score, counted, row)]
    found = statistics.quantiles(*on_device, level, interpolation=interpolation, within=within)
    assert found.shape == row.shape and np.all(np.isfinite(found))
    for group in groups_of(row, within):
        if (group & counted).any():
            expected = np.quantile(score[group & counted], level, method=interpolation)
            np.testing.assert_allclose(np.asarray(found)[group], expected, rtol=1e-5, atol=1e-6)


def test_quantiles_of_infinite_values():
    values, counted = first_line([-np.inf, 1.0, np.inf, 5.0]), first_line([1, 1, 1]) > 0
    row = jnp.zeros(SHAPE, jnp.int32)
    found = [float(statistics.quantiles(values, counted, row, level)[0, 0]) for level in (0.25, 0.5, 0.75, 1)]
    assert found == [-np.inf, 1.0, np.inf, np.inf]


@pytest.mark.parametrize("within", statistics.SCOPES)
@pytest.mark.parametrize("ties", ["all", "first"])
def test_the_largest_are_those_of_a_loop(within, ties):
    score, counted, row = random_tokens(2, ties=True)
    on_device = [jnp.asarray(values) for values in (score, counted, row)]
    for count in (1, 2, 5, 99):
        found = statistics.largest(*on_device, jnp.full(row.shape, count), ties=ties, within=within)
        expected = np.zeros(row.shape, bool)
        for group in groups_of(row, within):
            places = np.flatnonzero(group & counted)
            order = sorted(places, key=lambda place: (-score.flat[place], place))
            chosen = order[:count]
            if ties == "all" and chosen:
                chosen = [place for place in order if score.flat[place] >= score.flat[chosen[-1]]]
            expected.flat[chosen] = True
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.07, 0.3, 1 / 3, 0.29, 0.7, 1 - 0.9, 1e-5, 1.0])
def test_shares_are_exact_in_single_precision(fraction):
    count = np.array([0, 1, 3, 7, 10, 100, 300, 999_983, 1_000_000, 16_777_217], np.int32)
    exact = Fraction(fraction).limit_denominator(10**6)
    for rounding in ("floor", "ceil"):
        found = statistics.share(fraction, jnp.asarray(count), rounding)
        np.testing.assert_array_equal(found, [getattr(math, rounding)(exact * int(n)) for n in count])


# Properties of the rules.


def mine(teacher_entropy, gap, counted, *, scale=1.0):
    """A rule of a user's own."""
    return jnp.where(counted, scale * teacher_entropy + jnp.abs(gap), 0)


def certain(teacher_entropy):
    return teacher_entropy < 1


def own_score(student, *, power):
    return jnp.sum(jnp.exp(power * student), axis=-1)


HERE = __name__
D = {"name": "top_k_divergence", "k": 4}
LOCAL = {
    "threshold": {"name": "threshold", "of": "teacher_entropy", "at_least": 0.8, "below": 1.9},
    "accept": {"name": "accept", "k": 2, "otherwise": 0.1},
    "relative_confidence": {"name": "relative_confidence", "scale": 2.0},
    "importance_now": {"name": "importance_now", "at_most": 1.5},
    "first": {"name": "first", "count": 2},
    "last": {"name": "last", "count": 2},
    "sigmoid": {"name": "sigmoid", "of": "gap", "slope": 2.0},
    "product": {
        "name": "product",
        "rules": {
            "early": {"name": "first", "count": 3},
            "sure": {"name": "sigmoid", "of": {"name": "accepted", "k": 2}, "slope": 1.0},
        },
    },
    "boolean": f"{HERE}:certain()",
    "own_score": {"name": "sigmoid", "of": {"name": f"{HERE}:own_score", "power": 2.0}, "slope": 1.0},
    "of_divergence": {"name": "threshold", "of": "divergence", "below": 1.0},
    "by_position": {"name": "threshold", "of": "position", "at_least": 2},
}
BATCH = {
    "quantile": {"name": "quantile", "of": "student_entropy", "at_least": 0.3},
    "quantile_of_row": {"name": "quantile", "of": "student_entropy", "below": 0.7, "within": "row"},
    "top_fraction": {"name": "top_fraction", "of": "hellinger", "fraction": 0.4},
    "top_fraction_of_row": {"name": "top_fraction", "of": "log_p", "fraction": 0.4, "within": "row", "ties": "first"},
    "top_fraction_and_one": {"name": "top_fraction", "of": "log_q", "fraction": 0.1, "at_least_per_row": 1},
    "confidence_product": {"name": "confidence_product", "alpha": 1.0, "beta": 0.5},
    "prefix_gap": {"name": "prefix_gap", "gamma": 0.5},
    "mine": {"name": f"{HERE}:mine", "scale": 2.0},
    "soft_or": {
        "name": "top_fraction", "of": ("student_entropy", D), "combine": "soft_or", "scale": "min_max", "fraction": 0.5,
    },
    "scaled_by_quantiles": {"name": "sigmoid", "of": "divergence", "scale": "quantiles", "slope": 2.0},
    "scaled_by_maximum": {"name": "sigmoid", "of": "teacher_entropy", "scale": "max", "slope": 2.0},
    "product_of_both": {
        "name": "product",
        "rules": {"early": {"name": "first", "count": 3}, "best": {"name": "quantile", "of": "gap", "below": 0.5}},
    },
}  # fmt: skip
SPECS = LOCAL | BATCH


def rule_of(name, divide_by="all"):
    spec = SPECS[name]
    return make_rule(
        spec[:-1] + f"divide_by='{divide_by}')" if isinstance(spec, str) else spec | {"divide_by": divide_by}
    )


@functools.cache
def packed_batch(dtype=np.float32):
    """Returns a batch of five packed rows in three lines, and two lines of nothing."""
    random = np.random.default_rng(3)
    logits = [jnp.asarray(1.5 * random.normal(size=(*SHAPE, 8)), dtype) for _ in range(2)]
    row = np.array([[0] * 4 + [1] * 5, [2] * 3 + [3] * 5 + [4], [5] * 9, [6] * 9, [7] * 9], np.int32)
    counted = np.zeros(SHAPE, bool)
    counted[:3] = [[0, 1, 1, 1, 1, 1, 1, 0, 1], [1, 1, 1, 1, 0, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1, 1, 0, 0]]
    drawn = -np.abs(random.normal(size=SHAPE)).astype(dtype)
    return batch_of(*logits, random.integers(0, 8, SHAPE), counted, drawn, row)


def test_every_rule_has_a_spec_here():
    tested = {spec["name"] for spec in SPECS.values() if not isinstance(spec, str)}
    assert set(token_weights.__all__) <= tested, "add a spec of the new rule to LOCAL or BATCH"


@pytest.mark.parametrize("name", SPECS)
def test_rules_say_what_they_look_at(name):
    rule = rule_of(name)
    assert rule.looks_at_batch == (name in BATCH)
    assert rule_of(name, "kept").looks_at_batch and rule_of(name, "kept").divide_by == "kept"
    batch = packed_batch()
    weights = np.asarray(rule(values_of(rule, batch)))
    assert weights.shape == SHAPE and weights.dtype == np.float32 and np.all(weights >= 0)
    assert np.ptp(weights[np.asarray(batch["counted"])]) > 0, "the batch is no test of the rule"
    if name in BATCH:
        assert np.all(weights[~np.asarray(batch["counted"])] == 0)


def with_schedules(spec, within=""):
    """Returns a spec whose numbers are constant schedules, and the numbers by the names of their values."""
    constant = lambda value: {"name": "constant_schedule", "value": value}
    is_number = {key: isinstance(value, int | float) for key, value in spec.items()}
    numbers = {f"tokens.{within}{key}": spec[key] for key, is_one in is_number.items() if is_one}
    made = {key: constant(value) if is_number[key] else value for key, value in spec.items()}
    for factor, of_factor in spec.get("rules", {}).items():
        made_factor, of_numbers = with_schedules(of_factor, f"rules.{factor}.")
        made["rules"] = made["rules"] | {factor: made_factor}
        numbers |= of_numbers
    return made, numbers


@pytest.mark.parametrize("double", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize("name", [name for name, spec in SPECS.items() if not isinstance(spec, str)])
def test_numbers_from_schedules_give_the_weights_of_constants(name, double):
    with jax.enable_x64(double):
        batch = packed_batch(np.float64 if double else np.float32)
        spec, numbers = with_schedules(SPECS[name])
        rule, constant = make_rule(spec | {"divide_by": "all"}), rule_of(name)
        assert rule.numbers.keys() == numbers.keys() and numbers
        arrays = {label: jnp.full(SHAPE, number, float) for label, number in numbers.items()}
        found = jax.jit(rule)(values_of(rule, batch) | arrays)
        np.testing.assert_allclose(found, constant(values_of(constant, batch)), rtol=1e-12 if double else 1e-5)


@pytest.mark.parametrize("double", [False, True], ids=["float32", "float64"])
def test_a_share_from_a_schedule_is_that_of_a_constant(double):
    with jax.enable_x64(double):
        count = jnp.arange(1, 20_000)
        for fraction in (0.0, 0.05, 0.07, 1 / 3, 0.95, 1.0):
            for rounding in ("floor", "ceil"):
                found = statistics.share(jnp.full(count.shape, fraction, float), count, rounding)
                np.testing.assert_array_equal(found, statistics.share(fraction, count, rounding))


@pytest.mark.parametrize("name", LOCAL)
def test_a_rule_of_one_token_gives_the_same_weight_in_any_part_of_the_batch(name):
    rule, batch = rule_of(name), packed_batch()
    values = values_of(rule, batch)
    whole = rule(values)
    flat = {label: value.reshape(-1)[3:7] for label, value in values.items()}
    np.testing.assert_array_equal(rule(flat), whole.reshape(-1)[3:7])
    np.testing.assert_allclose(jax.vmap(jax.vmap(rule))(values), whole, rtol=1e-6)


@pytest.mark.parametrize("name", SPECS)
def test_weights_are_those_of_double_precision(name):
    rule = rule_of(name)
    single = np.asarray(rule(values_of(rule, packed_batch())))
    with jax.enable_x64(True):
        double = np.asarray(rule(values_of(rule, packed_batch(np.float64))))
    assert double.dtype == np.float64
    np.testing.assert_allclose(single, double, rtol=2e-5, atol=2e-6)


def unpacked(batch):
    """Returns the batch with each row that counts in a line of its own, in another order, and the origin of its tokens.

    The second array is the flat index of each token in the packed batch, and the third is True where a token is.
    """
    row = np.asarray(batch["row"])
    places, is_token = np.zeros(SHAPE, int), np.zeros(SHAPE, bool)
    for line, number in enumerate([5, 3, 2, 1, 0]):
        found = np.flatnonzero(row == number)
        start = (9 - len(found)) // 2
        places[line, start : start + len(found)], is_token[line, start : start + len(found)] = found, True
    moved = {name: value.reshape(-1, *value.shape[2:])[places] for name, value in batch.items()}
    return moved | {"counted": moved["counted"] & is_token, "row": jnp.asarray(rows_of(places))}, places, is_token


@pytest.mark.parametrize("name", SPECS)
def test_weights_depend_neither_on_the_order_nor_on_the_packing_of_rows(name):
    rule, batch = rule_of(name), packed_batch()
    lines, places, is_token = unpacked(batch)
    weights = np.asarray(rule(values_of(rule, batch))).reshape(-1)
    moved = np.asarray(rule(values_of(rule, lines)))
    np.testing.assert_allclose(moved[is_token], weights[places[is_token]], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", BATCH)
def test_tokens_that_do_not_count_have_no_influence(name):
    rule, batch = rule_of(name), packed_batch()
    values, counted = values_of(rule, batch), batch["counted"]
    spoiled = {
        label: jnp.where(counted, value, jnp.nan) if jnp.issubdtype(value.dtype, jnp.floating) else value
        for label, value in values.items()
    }
    np.testing.assert_array_equal(rule(spoiled)[counted], rule(values)[counted])


@pytest.mark.parametrize("name", BATCH)
def test_nothing_is_nan_where_nothing_counts(name):
    rule, batch = rule_of(name), packed_batch()
    weights = np.asarray(rule(values_of(rule, batch | {"counted": jnp.zeros(SHAPE, bool)})))
    assert np.all(weights == 0)


@pytest.mark.parametrize("name", ["threshold", "quantile", "top_fraction"])
def test_a_score_that_is_not_a_number_is_not_a_weight_of_zero(name):
    rule, batch = rule_of(name), packed_batch()
    spoiled = {
        label: value.at[0, 2].set(jnp.nan) if label in rule.scores else value
        for label, value in values_of(rule, batch).items()
    }
    assert np.isnan(rule(spoiled)[0, 2])


def test_weights_are_the_same_under_jit_and_under_any_division_over_devices():
    mesh = jax.make_mesh((5,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:5])
    batch, rules = packed_batch(), {name: rule_of(name) for name in SPECS}
    values = {name: values_of(rule, batch) for name, rule in rules.items()}
    weigh = jax.jit(lambda values: {name: rule(values[name]) for name, rule in rules.items()})
    found = weigh(jax.device_put(values, NamedSharding(mesh, PartitionSpec("data"))))
    for name, rule in rules.items():
        np.testing.assert_allclose(found[name], rule(values[name]), rtol=1e-5, atol=1e-6, err_msg=name)


def test_weights_are_constants_to_the_gradient():
    rule, batch = rule_of("relative_confidence"), packed_batch()
    slope = jax.grad(lambda student: rule(values_of(rule, batch | {"student": student})).sum())(batch["student"])
    assert not np.any(slope)


def test_scores_are_shared_and_read_only_what_they_need():
    spec = {"a": {"name": "threshold", "of": "teacher_entropy", "below": 2.0}, "b": {"name": "relative_confidence"}}
    rule = make_rule({"name": "product", "rules": spec, "divide_by": "all"})
    assert {label: score.reads for label, score in rule.scores.items()} == {
        "teacher_entropy": ("teacher",),
        "student_entropy": ("student",),
    }
    two = {"name": "threshold", "of": ({"name": "accepted", "k": 1}, {"name": "accepted", "k": 2}), "below": 1}
    rule = make_rule(two | {"combine": "product", "divide_by": "all"})
    assert set(rule.scores) == {"accepted(k=1)", "accepted(k=2)"} and rule.inputs == ()
    assert rule_of("prefix_gap").inputs == ("counted", "row", "drawn_log_q")
    assert rule_of("first").inputs == ("position",) and not rule_of("first").scores


def test_a_rule_with_an_option_called_scale_keeps_it():
    spec = {"name": "relative_confidence", "scale": 3.0, "divide_by": "all"}
    entropies = {"teacher_entropy": jnp.array([0.0]), "student_entropy": jnp.array([1.0])}
    np.testing.assert_allclose(make_rule(spec)(entropies), 1 / (1 + np.exp(-3.0)), rtol=1e-6)


@pytest.mark.parametrize(
    ("scale", "expected"),
    [("max", [-0.25, 0.5, 1, 0]), ("min_max", [0, 0.6, 1, 0]), ("quantiles", [0, 0.6111111, 1, 0])],
)
def test_scales(scale, expected):
    """The counted scores are -1, 2 and 4, with quantiles -0.7 and 3.8."""
    spec = {"name": "sigmoid", "of": "teacher_entropy", "scale": scale, "slope": 1.0, "divide_by": "all"}
    values = {"teacher_entropy": first_line([-1.0, 2.0, 4.0, 9.0]), "counted": first_line([1, 1, 1]) > 0}
    expected = np.array(expected)
    if scale == "quantiles":
        expected[1] = (2 + 0.7) / 4.5
    np.testing.assert_allclose(
        make_rule(spec)(values)[0, :4], np.array([1, 1, 1, 0]) / (1 + np.exp(-expected)), rtol=1e-6
    )
    same = values | {"teacher_entropy": jnp.full(SHAPE, 2.0)}
    assert np.all(np.isfinite(make_rule(spec)(same)))


def test_soft_or_and_product():
    values = {"teacher_entropy": jnp.array([0.5, 0.1]), "student_entropy": jnp.array([0.2, 1.0])}
    for combine, expected in ("soft_or", [0.6, 1.0]), ("product", [0.1, 0.1]):
        of = {"of": ("teacher_entropy", "student_entropy"), "combine": combine}
        weights = make_rule({"name": "sigmoid", "slope": 1.0, "divide_by": "all"} | of)(values)
        np.testing.assert_allclose(weights, 1 / (1 + np.exp(-np.array(expected))), rtol=1e-6)


def test_importance_is_bounded_without_overflow():
    rule = rule_of("importance_now")
    values = {"log_q": jnp.array([-1.0, -1.0]), "drawn_log_q": jnp.array([-2000.0, -1.5])}
    np.testing.assert_allclose(rule(values), [1.5, 1.5], rtol=1e-6)


def test_specs_of_a_config_with_keys_that_are_none():
    best = SPECS["soft_or"] | {"of": ["student_entropy", D], "rules": None}
    factors = {"early": SPECS["first"] | {"of": None, "scale": None}, "best": best}
    rule = make_rule(ConfigDict({"name": "product", "rules": factors, "combine": None, "divide_by": "kept"}))
    assert set(rule.scores) == {"student_entropy", "top_k_divergence(k=4)"}
    assert rule.inputs == ("counted", "row", "position")
    batch, parts = packed_batch(), [rule_of("first"), rule_of("soft_or")]
    first, best = (part(values_of(part, batch)) for part in parts)
    np.testing.assert_array_equal(rule(values_of(rule, batch)), first * best)


def test_no_rule_is_none():
    for spec in (None, "none", {"name": "none"}):
        assert make_rule(spec) is None and make_gate(spec) is None


# Row gates and temperatures.


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.5, 1.0])
def test_rows_below_the_quantile_of_the_batch_are_dropped(fraction):
    batch = packed_batch()
    gate = make_gate({"name": "drop_lowest", "of": "log_p", "fraction": fraction})
    values = values_of(gate, batch)
    kept, row, counted = np.asarray(gate(values)), np.asarray(batch["row"]), np.asarray(batch["counted"])
    mean = {
        n: np.asarray(values["log_p"])[(row == n) & counted].mean() for n in (0, 1, 2, 3, 5)
    }  # others have no token
    least = np.quantile(list(mean.values()), fraction)
    expected = np.vectorize(lambda n: n in mean and mean[n] >= least - 1e-6)(row)
    np.testing.assert_array_equal(kept, expected)
    assert gate.looks_at_batch and not kept[1, 8]
    lines, places, is_token = unpacked(batch)
    np.testing.assert_array_equal(
        np.asarray(gate(values_of(gate, lines)))[is_token], kept.reshape(-1)[places[is_token]]
    )
    nothing = values | {"counted": jnp.zeros(SHAPE, bool)}
    assert not np.any(gate(nothing))


def test_rows_without_a_view_are_dropped():
    gate = make_gate("has_view")
    assert gate.inputs == ("has_view",) and not gate.scores and not gate.looks_at_batch
    np.testing.assert_array_equal(gate(values_of(gate, packed_batch())), packed_batch()["row"] % 2 == 0)


@pytest.mark.parametrize("direction", ["harden", "soften"])
def test_temperatures_are_finite_and_bounded(direction):
    score = first_line([0.0, 0.0, 0.0, 1.0, 3.0, 9.0])
    for kept in (score >= 0, score > 0, score > 99):
        found = np.asarray(difficulty(score, kept, jnp.ones(SHAPE), scale=0.5, direction=direction))
        assert np.all(found >= np.exp(-0.5) - 1e-6) and np.all(found <= np.exp(0.5) + 1e-6)
    harder = np.asarray(difficulty(score, score > 0, jnp.ones(SHAPE), scale=0.5, direction=direction))[0, 3:6]
    assert harder[1] == 1 and np.all(np.diff(harder) < 0 if direction == "harden" else np.diff(harder) > 0)


# Errors.


def misspelt(teacher_entropie):
    return teacher_entropie


def with_k(accepted):
    return accepted


def mean_of_all(teacher_entropy):
    return jnp.mean(teacher_entropy)


def over_the_vocabulary(teacher):
    return teacher


def reads_more(teacher, reference):
    return teacher


BASE = {"name": "threshold", "of": "teacher_entropy", "at_least": 0.8, "divide_by": "all"}
WRONG = [
    ({"name": "treshold"}, "unknown name 'treshold' .*did you mean 'threshold'"),
    ({"of": "teacher_entropi"}, "unknown score 'teacher_entropi'.*did you mean 'teacher_entropy'.*divergence"),
    ({"of": "counted"}, "unknown score 'counted'"),
    ({"of": {"name": "accepted"}}, "lacks k"),
    ({"of": {"name": "accepted", "k": 0}}, "k must be a whole number of at least 1, but is 0"),
    ({"of": {"name": "accepted", "k": 1.5}}, "k must be a whole number"),
    ({"of": {"name": "student_top_entropy", "k": 1}}, "k must be at least 2"),
    ({"of": {"name": "gap", "k": 1}}, "unknown keyword 'k'"),
    ({"of": {"of": "gap", "scales": "max"}}, "unknown keyword 'scales'"),
    ({"of": ("gap", "log_p")}, "needs combine, one of product, soft_or"),
    ({"of": ("gap", "log_p"), "combine": "soft_and"}, "combine='soft_and' is not one of product, soft_or"),
    ({"combine": "product"}, "combine='product' needs a list of scores"),
    ({"scale": "maxx"}, r"scale='maxx' is not one of none, max, min_max, quantiles \(did you mean 'max'"),
    ({"divide_by": None}, "lacks divide_by: 'all' divides .* 'kept' by"),
    ({"divide_by": "some"}, "divide_by='some' is not one of all, kept"),
    ({"at_leats": 1.0}, "unknown keyword 'at_leats' .*did you mean 'at_least'"),
    ({"at_least": "high"}, "at_least must be a finite number"),
    ({"of": {"name": "accepted", "k": {"name": "linear_schedule"}}}, "has a schedule for 'k'.* constant"),
    ({"name": "quantile", "within": {"name": "linear_schedule"}}, "within={'name': 'linear_schedule'} is not one of"),
    ({"at_least": None}, "needs at_least or below"),
    ({"below": 0.1}, "at_least=0.8 must be less than below=0.1"),
    ({"rules": {}}, "has no use for 'rules'"),
    ({"name": "quantile", "at_least": 1.5}, "at_least must be between 0 and 1"),
    ({"name": "quantile", "within": "rows"}, r"within='rows' is not one of row, batch \(did you mean 'row'"),
    ({"name": "quantile", "interpolation": "higher"}, "interpolation='higher'"),
]
WRONG_SPECS = [
    ("threshold(at_least=1.0, divide_by='all')", "lacks of, the score"),
    ("first(divide_by='all')", "lacks count"),
    ("first(count=0, divide_by='all')", "count must be between 1"),
    ("first(count=1.5, divide_by='all')", "count must be a whole number"),
    ("first(count=2, of='gap', divide_by='all')", "has no use for 'of': the rule reads position"),
    ("accept(k=0, otherwise=0.0, divide_by='all')", "k must be between 1"),
    ("accept(k=2, otherwise=-1.0, divide_by='all')", "otherwise must be between 0"),
    ("relative_confidence(scale=-1.0, divide_by='all')", "scale must be between 0"),
    ("confidence_product(alpha=-1.0, beta=1.0, divide_by='all')", "alpha must be between 0"),
    ("prefix_gap(gamma=-1.0, divide_by='all')", "gamma must be between 0"),
    ("importance_now(at_most=0.0, divide_by='all')", "at_most must be between"),
    ("top_fraction(of='gap', fraction=1.5, divide_by='all')", "fraction must be between 0 and 1"),
    ("top_fraction(of='gap', fraction=0.5, round='up', divide_by='all')", "round='up' is not one of floor, ceil"),
    ("top_fraction(of='gap', fraction=0.5, ties='last', divide_by='all')", "ties='last' is not one of all, first"),
    ("top_fraction(of='gap', fraction=0.5, at_least_per_row=0.5, divide_by='all')", "at_least_per_row must be a whole"),
    ("product(divide_by='all')", "lacks rules"),
    ({"name": "product", "divide_by": "all", "rules": {"a": BASE}}, "rules.a: unknown keyword 'divide_by'"),
    ({"name": "product", "divide_by": "all", "of": "gap", "rules": {"a": "first(count=1)"}}, "has no use for 'of'"),
    (
        {"name": f"{HERE}:misspelt", "divide_by": "all"},
        "'teacher_entropie', which is no score.*did you mean 'teacher_en",
    ),
    ({"name": f"{HERE}:with_k", "divide_by": "all"}, "this score needs k. Call the parameter 'score'"),
    ({"name": f"{HERE}:mean_of_all", "divide_by": "all"}, r"shape \(\) and type float32 .* a number for each token"),
    (BASE | {"of": f"{HERE}:over_the_vocabulary"}, r"returns an array of shape \(2, 3, 4\)"),
    (BASE | {"of": f"{HERE}:reads_more"}, "has a parameter 'reference', but a score reads teacher, student, target"),
    (5, "5 is not a spec"),
]


@pytest.mark.parametrize(("spec", "message"), [(BASE | change, text) for change, text in WRONG] + WRONG_SPECS)
def test_a_wrong_spec_is_an_error_that_names_the_key_and_says_what_is_right(spec, message):
    with pytest.raises(ValueError, match=f"^tokens: .*{message}"):
        make_rule(spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("drop_highest", "unknown name 'drop_highest'"),
        ("drop_lowest(of='log_p', fraction=2.0)", "fraction must be between 0 and 1"),
        ("drop_lowest(fraction=0.2)", "lacks of"),
        ("drop_lowest(of='log_p', fraction=0.2, divide_by='all')", "unknown keyword 'divide_by'"),
        (f"{HERE}:mine()", "must return True or False for each token"),
    ],
)
def test_a_wrong_gate_is_an_error(spec, message):
    with pytest.raises(ValueError, match=f"^row_gate: .*{message}"):
        make_gate(spec)


def test_a_wrong_temperature_is_an_error():
    array, truth = jnp.ones((1, 2)), jnp.ones((1, 2), bool)
    for keywords, message in ({"scale": -1.0}, "scale"), ({"scale": 0.5, "direction": "up"}, "direction='up'"):
        with pytest.raises(ValueError, match=message):
            difficulty(array, truth, array, **keywords)
